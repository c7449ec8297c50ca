"""Nested slices of a transformer: attention heads and hidden units of perceptrons, gated, ranked once, and cut out.

A model's units are found by the names of its modules: `qkv` and `proj` (timm, `models.vit`), `q_proj`, `k_proj`,
`v_proj` and `o_proj` or `out_proj` (transformers), `fc1` and `fc2`. The width of the residual stream never changes. A
smaller slice of one ranking is part of every larger one.
"""

from __future__ import annotations

import contextlib
import copy
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from stillhouse.errors import ConfigError, DamagedFileError, RoleError, require
from stillhouse.store import load_tree, save_tree, write_text

FILE = "slice.json"
"""The file beside the weights of a saved slice that says which units it kept."""
HEADS = ("num_attention_heads", "num_heads", "heads")
"""What an attention calls its number of heads."""
WIDE = ("all_head_size", "attn_dim")
"""What an attention calls the width of all its heads together."""

Kept = Mapping[str, Sequence[int]]
"""The positions of the units that are kept, in ascending order, by group."""


@dataclass(frozen=True)
class Group:
    """The units of one module: `kind` "head" or "unit", their number, and the parameters that each one has.

    `cuts` are its parameters: owner, name, dimension, and how often in a row the units come in it. Each unit takes
    `wide` places. `out` is the module whose input the units are.
    """

    kind: str
    path: str
    n: int
    wide: int
    cost: int
    cuts: tuple[tuple[nn.Module, str, int, int], ...]
    out: nn.Linear


def groups(model: nn.Module, none: bool = False) -> dict[str, Group]:
    """The groups of units that can be taken out of a model, by the path of their module.

    A perceptron or attention with something between its linear maps that sees all units together (a norm, a gate) is
    left out. Raises RoleError where there is none, unless `none` allows it.
    """
    found = {}
    for path, module in model.named_modules():
        group = _attention(path, module) or _perceptron(path, module)
        if group is not None:
            found[path] = group
    require(bool(found) or none, f"{type(model).__name__} has no attention (qkv and proj; or q_proj, k_proj, v_proj "
            "and o_proj or out_proj) and no perceptron (fc1 and fc2) of which units could be taken out", RoleError)
    return found


def _attention(path: str, module: nn.Module) -> Group | None:
    """qkv and proj, or q, k and v apart, with the bias on relative positions that each head may have."""
    children = dict(module.named_children())
    names = ("qkv",) if "qkv" in children else ("q_proj", "k_proj", "v_proj")
    out = next((children[n] for n in ("proj", "o_proj", "out_proj") if n in children), None)
    maps = [children.get(name) for name in names]
    heads = next((getattr(module, name) for name in HEADS if hasattr(module, name)), 0)
    if not (isinstance(out, nn.Linear) and out.in_features and all(isinstance(m, nn.Linear) for m in maps) and heads):
        return None
    wide = out.in_features // heads
    rows = 3 if names == ("qkv",) else 1
    if _sees_all(module, ("norm", "gate")) or any(m.out_features != rows * heads * wide for m in maps  # type: ignore
                                                  ) or getattr(module, "q_bias", None) is not None:
        return None
    cuts: list[Any] = [(m, name, 0, rows) for m in maps for name in ("weight", "bias") if m is not None
                       and getattr(m, name) is not None]
    for owner in (module, children.get("relative_position_bias")):
        if isinstance(getattr(owner, "relative_position_bias_table", None), nn.Parameter):
            cuts.append((owner, "relative_position_bias_table", 1, 1))
    return _group("head", path, heads, wide, [*cuts, (out, "weight", 1, 1)], out)


def _perceptron(path: str, module: nn.Module) -> Group | None:
    first, out = getattr(module, "fc1", None), getattr(module, "fc2", None)
    if not (isinstance(first, nn.Linear) and isinstance(out, nn.Linear) and first.out_features == out.in_features > 0):
        return None
    if _sees_all(module, ("norm", "gate")):
        return None
    cuts: list[Any] = [(first, name, 0, 1) for name in ("weight", "bias") if getattr(first, name) is not None]
    return _group("unit", path, out.in_features, 1, [*cuts, (out, "weight", 1, 1)], out)


def _sees_all(module: nn.Module, names: Sequence[str]) -> bool:
    return any(isinstance(getattr(module, name, None), nn.Module)
               and bool(list(getattr(module, name).parameters())) for name in names)


def _group(kind: str, path: str, n: int, wide: int, cuts: list[Any], out: nn.Linear) -> Group:
    return Group(kind, path, n, wide, sum(getattr(owner, name).numel() for owner, name, _, _ in cuts) // n,
                 tuple(cuts), out)


# ---------------------------------------------------------------------------------- gates and importance


@contextlib.contextmanager
def gated(model: nn.Module, gates: Mapping[str, Tensor]) -> Iterator[None]:
    """Multiply the units of `model` by `gates[path]` in every forward pass: [n], or [batch, n], one row per picture.

    Heads are multiplied before the output projection, hidden units after the activation. The hooks are removed at the
    end, on exceptions too.
    """
    known, handles = groups(model), []

    def scaled(gate: Tensor, wide: int) -> Callable[..., Any]:
        def hook(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
            x = inputs[0]
            g = gate.repeat_interleave(wide, -1)
            if g.dim() == 2:
                g = g.repeat_interleave(len(x) // len(g), 0)
                g = g.view(len(x), *[1] * (x.dim() - 2), -1)
            return (x * g, *inputs[1:])

        return hook

    try:
        for path, gate in gates.items():
            handles.append(known[path].out.register_forward_pre_hook(scaled(gate, known[path].wide)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def taylor(
    model: nn.Module, batches: Iterator[Any], loss: Callable[[Any, Any], Float[Tensor, " batch"]]
) -> dict[str, Float[Tensor, " n"]]:
    """I(u) = E_x |dL_x / dg_u| at g_u = 1, for the gate g_u of every unit (Molchanov et al. 2017; Michel et al. 2019).

    `loss(model, batch)` gives one loss per picture, of which each has gates of its own: the absolute value is taken per
    picture, before the mean. The model is used as it is (eval mode and no `requires_grad` are up to the caller).
    """
    known = groups(model)
    total = {path: torch.zeros(g.n, dtype=torch.double) for path, g in known.items()}
    count = 0
    for batch in batches:
        size = len(next(v for v in batch.values() if isinstance(v, Tensor)))
        like = next(model.parameters())
        gates = {p: torch.ones(size, g.n, dtype=like.dtype, device=like.device, requires_grad=True)
                 for p, g in known.items()}
        with torch.enable_grad(), gated(model, gates):
            grads = torch.autograd.grad(loss(model, batch).sum(), list(gates.values()), materialize_grads=True)
        for path, grad in zip(gates, grads, strict=True):
            total[path] += grad.abs().sum(0).double().cpu()
        count += size
    return {path: value / count for path, value in total.items()}


# ---------------------------------------------------------------------------------- the ranking


class Nested:
    """One ranking of a model's units, and the nested slices that its beginnings are.

    `importance` has one row for each of `groups(model)`. Each row is divided by its L2 norm; heads and hidden units are
    sorted each among themselves, and the two orders merged by the place in them, so that both kinds lose the same part
    of their units, as in MiniDisc (Zhang et al. 2022). `order` is a list of (path, position), the most important first,
    `parameters` the size of the slice of its first 0, 1, 2, … units.
    """

    def __init__(self, model: nn.Module, importance: Sequence[Float[Tensor, " n"]]):
        known = groups(model)
        scores = dict(zip(known, importance, strict=True))
        self.total = sum(p.numel() for p in model.parameters())
        self.costs = {path: g.cost for path, g in known.items()}
        self.sizes = {path: g.n for path, g in known.items()}
        places: list[tuple[float, int, str, int]] = []
        for kind in ("head", "unit"):
            scored = [(-float(v), path, i) for path, g in known.items() if g.kind == kind
                      for i, v in enumerate(scores[path] / (scores[path].norm() + 1e-17))]
            scored.sort(key=lambda s: s[0])
            places += [((rank + 1) / len(scored), kind == "unit", path, i) for rank, (_, path, i) in enumerate(scored)]
        places.sort(key=lambda p: p[:2])
        self.order = [(path, i) for _, _, path, i in places]
        sizes = [self.total - sum(self.costs[path] for path, _ in self.order)]
        for path, _ in self.order:
            sizes.append(sizes[-1] + self.costs[path])
        self.parameters = sizes

    @property
    def least(self) -> float:
        """The share of parameters that stays when no unit does: embeddings, norms, output biases, the head."""
        return self.parameters[0] / self.total

    def units(self, scale: float) -> int:
        """How many units of the order bring the share of parameters nearest to `scale`.

        Raises ConfigError for a scale that is not above `least`, or above 1.
        """
        require(self.least < scale <= 1, f"a scale of {scale} is out of reach: what is left without any head and "
                f"hidden unit is {self.least:.3f} of the parameters, as the width of the residual stream stays; give a "
                "scale above that and up to 1", ConfigError)
        wanted, low, high = scale * self.total, 0, len(self.order)
        while low < high:
            middle = (low + high) // 2
            low, high = (middle + 1, high) if self.parameters[middle] < wanted else (low, middle)
        return low - 1 if low and wanted - self.parameters[low - 1] <= self.parameters[low] - wanted else low

    def kept(self, units: int) -> dict[str, list[int]]:
        """The first `units` of the order, by group and in ascending order."""
        kept: dict[str, list[int]] = {path: [] for path in self.sizes}
        for path, i in self.order[:units]:
            kept[path].append(i)
        return {path: sorted(rows) for path, rows in kept.items()}

    def share(self, units: int) -> float:
        """The share of parameters of the slice of the first `units`."""
        return self.parameters[units] / self.total


def masks(model: nn.Module, kept: Kept) -> dict[str, Float[Tensor, " n"]]:
    """Gates of 0 and 1 for `gated` that keep these units."""
    like = next(model.parameters())
    made = {}
    for path, group in groups(model).items():
        made[path] = torch.zeros(group.n, dtype=like.dtype, device=like.device)
        made[path][list(kept[path])] = 1
    return made


# ---------------------------------------------------------------------------------- slices


class Headless(nn.Module):
    """What is left of an attention without heads: the bias of its output."""

    def __init__(self, attention: nn.Module, out: nn.Linear):
        super().__init__()
        self.name = next(name for name, child in attention.named_children() if child is out)
        self.add_module(self.name, out)
        self.pair = type(attention).__module__.partition(".")[0] == "transformers"

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        y = getattr(self, self.name)(x[..., :0])
        return (y, None) if self.pair else y


@contextlib.contextmanager
def sliced(model: nn.Module, kept: Kept) -> Iterator[None]:
    """The model computes with some of its units only, on slices of its own weights, to which gradients flow. Groups
    that `kept` does not name stay whole.

    A forward pass costs what that of the slice costs. Everything is put back at the end, on exceptions too; backward
    passes may come later.
    """
    undo: list[Callable[[], None]] = []
    try:
        for path, group in (groups(model, none=True) if kept else {}).items():
            if path in kept and len(kept[path]) < group.n:
                _narrow(model, path, group, list(kept[path]), undo)
        yield
    finally:
        for back in reversed(undo):
            back()


def _narrow(model: nn.Module, path: str, group: Group, keep: list[int], undo: list[Callable[[], None]]) -> None:
    for owner, name, dim, rows in group.cuts:
        whole = getattr(owner, name)
        owner._parameters[name] = whole.index_select(dim, _places(whole, keep, group, dim, rows, whole.device))
        undo.append(lambda owner=owner, name=name, whole=whole: owner._parameters.__setitem__(name, whole))  # type: ignore
    if group.kind == "head":
        module = model.get_submodule(path)
        for attribute, value in _counts(module, group, len(keep)):
            before = getattr(module, attribute)
            setattr(module, attribute, value)
            undo.append(lambda a=attribute, b=before, m=module: setattr(m, a, b))  # type: ignore[misc]
        if not keep:
            parent, child = _parent(model, path)
            parent._modules[child] = Headless(module, group.out)
            undo.append(lambda: parent._modules.__setitem__(child, module))


def _places(value: Tensor, keep: list[int], group: Group, dim: int, rows: int, device: Any) -> Tensor:
    """Where the units are along a dimension of a parameter: `rows` times one behind the other, each `wide` places."""
    wide = value.shape[dim] // (rows * group.n)
    each = (torch.tensor(keep, dtype=torch.long)[:, None] * wide + torch.arange(wide)).flatten()
    return torch.cat([each + r * group.n * wide for r in range(rows)]).to(device)


def _counts(module: nn.Module, group: Group, n: int) -> list[tuple[str, int]]:
    """The attributes in which an attention keeps the number of its heads and their width together."""
    named = [(name, n) for name in HEADS if hasattr(module, name)]
    return named + [(name, n * group.wide) for name in WIDE if getattr(module, name, None) == group.n * group.wide]


def _parent(model: nn.Module, path: str) -> tuple[nn.Module, str]:
    before, _, child = path.rpartition(".")
    return model.get_submodule(before), child


@torch.no_grad()
def cut(model: nn.Module, kept: Kept) -> nn.Module:
    """Take all units but those `kept` out of the model, in place: a really smaller, dense model. It is returned.

    Raises RoleError where `kept` does not fit the model.
    """
    known = groups(model, none=True)
    wrong = [path for path in {**known, **kept} if path not in known or path not in kept
             or sorted(set(kept[path])) != list(kept[path]) or any(not 0 <= i < known[path].n for i in kept[path])]
    require(not wrong, f"what is to be kept does not fit the model, e.g. at '{(wrong or [''])[0]}'", RoleError)
    for path, group in known.items():
        keep = list(kept[path])
        for owner, name, dim, rows in group.cuts:
            whole = getattr(owner, name)
            part = whole.index_select(dim, _places(whole, keep, group, dim, rows, whole.device))
            owner._parameters[name] = nn.Parameter(part.clone(), whole.requires_grad)
            if isinstance(owner, nn.Linear):
                owner.out_features, owner.in_features = owner.weight.shape
        if group.kind == "head":
            module = model.get_submodule(path)
            for attribute, value in _counts(module, group, len(keep)):
                setattr(module, attribute, value)
            if not keep:
                parent, child = _parent(model, path)
                parent._modules[child] = Headless(module, group.out)
    return model


class Slice(nn.Module):
    """A model of which some heads and hidden units were cut out. Calling it calls the model.

    `kept` are the units that are left, by their positions in the whole network; `table` is whatever rows of numbers led
    to it. `save(folder)` and `load(folder, network)` keep both.
    """

    def __init__(self, model: nn.Module, kept: Kept, table: Sequence[Mapping[str, float]] = ()):
        super().__init__()
        self.model = model
        self.kept = {path: list(rows) for path, rows in kept.items()}
        self.table = [dict(row) for row in table]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)

    def smaller(self, kept: Kept) -> Slice:
        """A copy with fewer units still, named by their positions in the whole network. Raises RoleError for units that
        are no longer there."""
        gone = [path for path in kept if not set(kept[path]) <= set(self.kept[path])]
        require(not gone, f"this slice no longer has all units that are to be kept, e.g. of '{(gone or [''])[0]}'",
                RoleError)
        present = groups(self.model, none=True)
        within = {path: [self.kept[path].index(i) for i in kept[path]] for path in present}
        return Slice(cut(copy.deepcopy(self.model), within).requires_grad_(True), kept)

    def save(self, folder: Path | str) -> Path:
        """Write the weights, and beside them the units that were kept and the table. Returns the folder."""
        save_tree(Path(folder) / "model.safetensors", dict(self.model.state_dict()))
        write_text(Path(folder) / FILE, json.dumps({"kept": self.kept, "table": self.table}, indent=1))
        return Path(folder)

    @classmethod
    def load(cls, folder: Path | str, network: nn.Module) -> Slice:
        """What `save` wrote, cut out of `network`, which is as the whole one was.

        Raises DamagedFileError for files that are not as written, RoleError for a network of another architecture.
        """
        file = Path(folder) / FILE
        try:
            said = json.loads(file.read_text(encoding="utf-8"))
            kept = {str(path): [int(i) for i in rows] for path, rows in said["kept"].items()}
            table = [{str(k): float(v) for k, v in row.items()} for row in said["table"]]
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise DamagedFileError(f"{file} is not as it was written: {type(error).__name__}: {error}") from error
        state = load_tree(Path(folder) / "model.safetensors")
        try:
            made = cut(network, kept)
            made.load_state_dict(state)
        except RuntimeError as error:
            raise RoleError(f"the weights in {folder} are not those of this architecture: {error}") from error
        return cls(made, kept, table)


def slice_of(model: nn.Module, kept: Kept | None = None) -> Slice:
    """A copy of the model with these units only; by default with all of them. Its parameters can be trained."""
    if kept is None:
        kept = {path: list(range(g.n)) for path, g in groups(model).items()}
    return Slice(cut(copy.deepcopy(model), kept).requires_grad_(True), kept)


def least_share(model: nn.Module) -> float:
    """The share of parameters that a model has without any head and hidden unit: the smallest scale of a slice."""
    total = sum(p.numel() for p in model.parameters())
    return 1 - sum(g.n * g.cost for g in groups(model).values()) / total
