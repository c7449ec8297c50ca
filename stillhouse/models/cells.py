"""Networks made of cells: small graphs whose edges are operations, all of them at once (a supernet) or one each.

Two spaces, by name. `darts` (Liu et al. 2019): a cell has the outputs of the two cells before it as inputs, every node
adds up two edges, the nodes are concatenated; cells at 1/3 and 2/3 of the depth halve the picture. `nas-bench-201`
(Dong and Yang 2020): a cell has one input and an edge between every two of its nodes, the last node is its output;
residual blocks halve the picture twice.

An architecture is a `Genotype`, written `sep_conv_3x3@0-skip_connect@1/...`: operation@input, edges of a node joined by
"-", nodes by "/", the reduction cell after "+".
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from stillhouse.errors import ConfigError, require

Weights = Mapping[str, Float[Tensor, "edges operations"]]
"""How much of every operation each edge has, by kind of cell."""


class Edge(NamedTuple):
    """An operation on an input of the cell (0, 1, …) or a node before (numbered on from there)."""

    operation: str
    source: int


Node = tuple[Edge, ...]
Cell = tuple[Node, ...]


class Genotype(NamedTuple):
    """The cells of an architecture; `reduce` is empty in a space without reduction cells."""

    normal: Cell
    reduce: Cell = ()

    def __str__(self) -> str:
        cells = ["/".join("-".join(f"{e.operation}@{e.source}" for e in node) for node in cell) for cell in self]
        return "+".join(filter(None, cells))


class Space(NamedTuple):
    """What a search chooses from."""

    operations: tuple[str, ...]
    inputs: int  # of a cell
    kept: int | None  # edges that a node keeps when the supernet is cut; None: all
    nodes: int  # beside the inputs, as published
    kinds: tuple[str, ...]
    none: bool  # whether an edge may end as "none"


SPACES = {
    "darts": Space(("none", "max_pool_3x3", "avg_pool_3x3", "skip_connect", "sep_conv_3x3", "sep_conv_5x5",
                    "dil_conv_3x3", "dil_conv_5x5"), 2, 2, 4, ("normal", "reduce"), False),
    "nas-bench-201": Space(("none", "skip_connect", "conv_1x1", "conv_3x3", "avg_pool_3x3"), 1, None, 3, ("normal",),
                           True),
}

DARTS_V2 = ("sep_conv_3x3@0-sep_conv_3x3@1/sep_conv_3x3@0-sep_conv_3x3@1/sep_conv_3x3@1-skip_connect@0/"
            "skip_connect@0-dil_conv_3x3@2+max_pool_3x3@0-max_pool_3x3@1/skip_connect@2-max_pool_3x3@1/"
            "max_pool_3x3@0-skip_connect@2/skip_connect@2-max_pool_3x3@1")
"""The cells that the second-order search of Liu et al. (2019, figures 5 and 6) found on CIFAR-10."""


def space_named(name: str) -> Space:
    """Raises ConfigError for an unknown space."""
    require(name in SPACES, f"the space is one of {', '.join(SPACES)}, not {name!r}")
    return SPACES[name]


def parsed(text: str, space: str = "darts") -> Genotype:
    """The inverse of `str(genotype)`. Raises ConfigError for what is no architecture of the space."""
    form = space_named(space)
    cells = []
    for words in str(text).split("+"):
        cell: list[Node] = []
        for part in words.split("/"):
            node = []
            for edge in filter(None, part.split("-")):
                operation, _, source = edge.partition("@")
                require(operation in OPERATIONS or operation == "none", f"'{operation}' in '{edge}' is no operation; "
                        f"choose from none, {', '.join(OPERATIONS)}")
                require(source.isdigit() and int(source) < form.inputs + len(cell), f"'{edge}' reads no input or "
                        "earlier node; write operation@number, inputs first")
                node.append(Edge(operation, int(source)))
            require(len({e.source for e in node}) == len(node) > 0, f"'{part}' in '{words}' is no node: it needs an "
                    "edge, and two edges need different inputs")
            cell.append(tuple(node))
        cells.append(tuple(cell))
    require(len(cells) == len(form.kinds), f"an architecture of {space} has {len(form.kinds)} kind(s) of cells, not "
            f"{len(cells)}")
    require(len({len(cell) for cell in cells}) == 1, "normal and reduction cells need as many nodes")
    return Genotype(*cells)


# -------------------------------------------------------------------- operations


def _relu_conv_norm(channels: int, out: int, kernel: int, stride: int, affine: bool) -> nn.Sequential:
    return nn.Sequential(nn.ReLU(), nn.Conv2d(channels, out, kernel, stride, kernel // 2, bias=False),
                         nn.BatchNorm2d(out, affine=affine))


def _separable(kernel: int, dilation: int = 1, times: int = 2) -> Callable[[int, int, bool], nn.Module]:
    """ReLU, depthwise and pointwise convolution, BatchNorm: `times` in a row."""

    def build(channels: int, stride: int, affine: bool) -> nn.Module:
        layers: list[nn.Module] = []
        for i in range(times):
            pad = dilation * (kernel // 2)
            layers += [nn.ReLU(), nn.Conv2d(channels, channels, kernel, stride if i == 0 else 1, pad, dilation,
                                            channels, bias=False),
                       nn.Conv2d(channels, channels, 1, bias=False), nn.BatchNorm2d(channels, affine=affine)]
        return nn.Sequential(*layers)

    return build


def _plain(kernel: int) -> Callable[[int, int, bool], nn.Module]:
    return lambda channels, stride, affine: _relu_conv_norm(channels, channels, kernel, stride, affine)


def _average(channels: int, stride: int, affine: bool) -> nn.Module:
    return nn.AvgPool2d(3, stride, 1, count_include_pad=False)


def _largest(channels: int, stride: int, affine: bool) -> nn.Module:
    return nn.MaxPool2d(3, stride, 1)


def _skip(channels: int, stride: int, affine: bool) -> nn.Module:
    return nn.Identity() if stride == 1 else FactorizedReduce(channels, channels, affine)


class FactorizedReduce(nn.Module):
    """Half the size without losing pixels: two 1 x 1 convolutions of stride 2, one of them moved by a pixel."""

    def __init__(self, channels: int, out: int, affine: bool = True):
        super().__init__()
        self.even = nn.Conv2d(channels, out - out // 2, 1, 2, bias=False)
        self.odd = nn.Conv2d(channels, out // 2, 1, 2, bias=False)
        self.norm = nn.BatchNorm2d(out, affine=affine)

    def forward(self, x: Tensor) -> Tensor:
        x = x.relu()
        moved = nn.functional.pad(x[:, :, 1:, 1:], (0, 1, 0, 1))
        return self.norm(torch.cat([self.even(x), self.odd(moved)], 1))


OPERATIONS: dict[str, Callable[[int, int, bool], nn.Module]] = {
    "skip_connect": _skip, "max_pool_3x3": _largest, "avg_pool_3x3": _average,
    "sep_conv_3x3": _separable(3), "sep_conv_5x5": _separable(5),
    "dil_conv_3x3": _separable(3, 2, 1), "dil_conv_5x5": _separable(5, 2, 1),
    "conv_1x1": _plain(1), "conv_3x3": _plain(3),
}
"""Builders (channels, stride, affine) of all operations but "none", which is a sum that it is not in."""


# -------------------------------------------------------------------- the network


class _Cell(nn.Module):
    """One cell. `edges[node][source][operation]` are its modules; without weights every edge's operations are added
    as they are."""

    def __init__(self, space: str, kind: str, plan: Sequence[Sequence[tuple[int, Sequence[str]]]],
                 before: tuple[int, int], channels: int, was_reduced: bool, affine: bool):
        super().__init__()
        self.kind, self.inputs, self.drop = kind, SPACES[space].inputs, 0.0
        self.out = channels if self.inputs == 1 else len(plan) * channels
        self.plan = [[(source, tuple(operations)) for source, operations in node] for node in plan]
        if space == "darts":
            first = FactorizedReduce(before[0], channels, affine) if was_reduced else _relu_conv_norm(
                before[0], channels, 1, 1, affine)
            self.entry = nn.ModuleList([first, _relu_conv_norm(before[1], channels, 1, 1, affine)])
        self.edges = nn.ModuleList()
        for node in self.plan:
            built: Any = nn.ModuleDict()
            for source, operations in node:
                stride = 2 if kind == "reduce" and source < self.inputs else 1
                built[str(source)] = nn.ModuleDict({name: _operation(name, channels, stride, affine, space)
                                                    for name in operations if name != "none"})
            self.edges.append(built)

    def forward(self, before: Tensor, last: Tensor, weights: Weights | None) -> Tensor:
        states = [last] if self.inputs == 1 else [enter(x) for enter, x in zip(self.entry, (before, last), strict=True)]
        rows = iter(()) if weights is None else iter([row.unbind(0) for row in weights[self.kind].unbind(0)])
        built: Any
        for node, built in zip(self.plan, self.edges, strict=True):
            terms = []
            for source, operations in node:
                row = None if weights is None else next(rows)
                for i, name in enumerate(operations):
                    if name != "none":
                        y = self._dropped(built[str(source)][name], states[source])
                        terms.append(y if row is None else row[i] * y)
            states.append(torch.stack(terms).sum(0) if len(terms) > 2 else sum(terms[1:], terms[0]) if terms
                          else torch.zeros_like(states[0]))
        return states[-1] if self.inputs == 1 else torch.cat(states[self.inputs :], 1)

    def _dropped(self, operation: nn.Module, x: Tensor) -> Tensor:
        """Drop-path (Larsson et al. 2017): the edge is missing for a share `drop` of the samples, the rest is scaled
        up; an identity never is."""
        y = operation(x)
        if not (self.training and self.drop) or isinstance(operation, nn.Identity):
            return y
        kept = torch.rand(len(y), 1, 1, 1, device=y.device, dtype=y.dtype) >= self.drop
        return y * kept / (1 - self.drop)


def _operation(name: str, channels: int, stride: int, affine: bool, space: str) -> nn.Module:
    """Where BatchNorm has no scale (in a supernet of `darts`), poolings are normalised as all others are."""
    built = OPERATIONS[name](channels, stride, affine)
    if "pool" in name and space == "darts" and not affine:
        return nn.Sequential(built, nn.BatchNorm2d(channels, affine=False))
    return built


class _Halve(nn.Module):
    """The residual block of stride 2 between two stages of `nas-bench-201`."""

    kind = "reduce"

    def __init__(self, channels: int, out: int):
        super().__init__()
        self.out = out
        self.body = nn.Sequential(*_relu_conv_norm(channels, out, 3, 2, True), *_relu_conv_norm(out, out, 3, 1, True))
        self.shortcut = nn.Sequential(nn.AvgPool2d(2, 2, ceil_mode=True), nn.Conv2d(channels, out, 1, bias=False))

    def forward(self, before: Tensor, last: Tensor, weights: Weights | None) -> Tensor:
        return self.shortcut(last) + self.body(last)


Plan = Mapping[str, Sequence[Sequence[tuple[int, Sequence[str]]]]]


def reductions(cells: int) -> set[int]:
    """Which cells of `darts` halve the picture: those at 1/3 and 2/3, never the first."""
    return {cells // 3, 2 * cells // 3} - {0}


class _Body(nn.Module):
    """Stem, cells, global average pooling, linear layer."""

    def __init__(self, space: str, plan: Plan, channels_in: int, classes: int, channels: int, cells: int,
                 affine: bool):
        super().__init__()
        require(min(channels_in, classes, channels, cells) >= 1, "channels_in, classes, channels and cells must be 1 "
                f"or more; got {channels_in}, {classes}, {channels} and {cells}", ConfigError)
        self.layers = nn.ModuleList()
        width = 3 * channels if space == "darts" else channels
        self.stem = nn.Sequential(nn.Conv2d(channels_in, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width))
        before, last, reduced = width, width, False
        for i in range(cells):
            if space == "darts":
                kind = "reduce" if i in reductions(cells) else "normal"
                channels *= 2 if kind == "reduce" else 1
            else:
                kind = "normal"
                if i in reductions(cells):
                    self.layers.append(_Halve(channels, 2 * channels))
                    channels *= 2
            cell = _Cell(space, kind, plan[kind], (before, last), channels, reduced, affine)
            self.layers.append(cell)
            before, last, reduced = last, cell.out, kind == "reduce"
        self.end = nn.Identity() if space == "darts" else nn.Sequential(nn.BatchNorm2d(last), nn.ReLU())
        self.linear = nn.Linear(last, classes)

    def forward(self, image: Tensor, weights: Weights | None = None) -> Tensor:
        before = last = self.stem(image)
        for layer in self.layers:
            before, last = last, layer(before, last, weights)
        return self.linear(self.end(last).mean((2, 3)))


class Supernet(nn.Module):
    """Every edge computes sum_o softmax(alpha)_o o(x) over all operations, with BatchNorm without scale and shift.

    `alpha` has one row per edge for each kind of cell, about 0 at the start; edges are numbered by node, then by
    source. Called with `weights`, those take the place of softmax(alpha).
    """

    def __init__(self, space: str = "darts", channels_in: int = 3, classes: int = 10, channels: int = 16,
                 cells: int = 8, nodes: int | None = None, operations: Sequence[str] | None = None):
        super().__init__()
        form = space_named(space)
        self.space, self.nodes = space, nodes or form.nodes
        self.operations = tuple(operations or form.operations)
        unknown = [o for o in self.operations if o not in OPERATIONS and o != "none"]
        require(not unknown and len(set(self.operations)) == len(self.operations), "operations are different ones of "
                f"none, {', '.join(OPERATIONS)}; got {', '.join(self.operations)}")
        require(len(set(self.operations) - {"none"}) >= 1 and self.nodes >= 1, "a supernet needs an operation other "
                "than none, and a node")
        self.shape = {"channels_in": channels_in, "classes": classes, "channels": channels, "cells": cells}
        full = [[(source, self.operations) for source in range(form.inputs + n)] for n in range(self.nodes)]
        self.body = _Body(space, dict.fromkeys(form.kinds, full), affine=False, **self.shape)
        edges = sum(len(node) for node in full)
        self.alpha = nn.ParameterDict({kind: 1e-3 * torch.randn(edges, len(self.operations)) for kind in form.kinds})

    def weights(self, noise: Weights | None = None) -> dict[str, Tensor]:
        """softmax(alpha) over the operations of each edge, of alpha + noise if there is any."""
        return {kind: (a if noise is None else a + noise[kind]).softmax(-1) for kind, a in self.alpha.items()}

    def forward(self, image: Float[Tensor, "batch channels height width"], weights: Weights | None = None
                ) -> Float[Tensor, "batch classes"]:
        return self.body(image, self.weights() if weights is None else weights)

    @property
    def genotype(self) -> Genotype:
        """What the supernet is cut to now."""
        found = self.weights()
        return Genotype(*(discretise(found[kind], self.operations, self.space) for kind in SPACES[self.space].kinds))

    def masked(self, genotype: Genotype) -> dict[str, Tensor]:
        """Weights that are 1 on the operations of a genotype and 0 elsewhere."""
        masks = {kind: torch.zeros_like(a) for kind, a in self.alpha.items()}
        inputs = SPACES[self.space].inputs
        for kind, mask in masks.items():
            first = 0
            for n, node in enumerate(getattr(genotype, kind)):
                for edge in node:
                    mask[first + edge.source, self.operations.index(edge.operation)] = 1.0
                first += inputs + n
        return masks

    def inherited(self, genotype: Genotype) -> CellNet:
        """The network that is left when all other operations are cut away, with the supernet's weights and
        statistics."""
        own = self.state_dict()
        cut = CellNet(str(genotype), self.space, affine=False, **self.shape).to(self.body.linear.weight)
        cut.load_state_dict({name: own[name] for name in cut.state_dict()})
        return cut.train(self.training)


def discretise(weights: Float[Tensor, "edges operations"], operations: Sequence[str], space: str) -> Cell:
    """The cell that is left of one: on every edge its strongest operation, for every node its strongest edges (Liu et
    al. 2019, section 2.4).

    In `darts` "none" takes part in the softmax but is never chosen, and a node keeps two edges; in `nas-bench-201`
    every edge is kept, and "none" is an operation like all others.
    """
    form = space_named(space)
    allowed = [i for i, name in enumerate(operations) if form.none or name != "none"]
    best, place = weights[:, allowed].max(1)
    strength, choice = best.tolist(), place.tolist()
    cell: list[Node] = []
    first, sources = 0, form.inputs
    while first < len(strength):
        here = strength[first : first + sources]
        order = sorted(range(sources), key=here.__getitem__, reverse=True)[: form.kept]
        cell.append(tuple(Edge(operations[allowed[choice[first + j]]], j) for j in sorted(order)))
        first, sources = first + sources, sources + 1
    return tuple(cell)


class CellNet(nn.Module):
    """The discrete network of a genotype, written as in `Genotype`.

    `drop_path(share)` sets how often an edge is missing during training. With `affine=False` it is built of what a
    supernet is built of.
    """

    def __init__(self, genotype: str = DARTS_V2, space: str = "darts", channels_in: int = 3, classes: int = 10,
                 channels: int = 36, cells: int = 20, affine: bool = True):
        super().__init__()
        found = parsed(genotype, space)
        self.genotype, self.space, self.classes = str(found), space, classes
        plan = {kind: [[(edge.source, (edge.operation,)) for edge in node] for node in getattr(found, kind)]
                for kind in SPACES[space].kinds}
        self.body = _Body(space, plan, channels_in, classes, channels, cells, affine)

    def drop_path(self, share: float) -> None:
        for layer in self.body.layers:
            if isinstance(layer, _Cell):
                layer.drop = share

    def forward(self, image: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch classes"]:
        return self.body(image)
