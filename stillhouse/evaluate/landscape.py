"""The loss around trained weights (random slices, sharpness, curvature), and what residual blocks do with their input.

The meters of the loss take a closure `loss()` of no arguments and the parameters that it depends on; these are moved in
place and put back, on exceptions too. The closure decides the mode of the model and the data.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from stillhouse.data.sets import fetch
from stillhouse.errors import DataError, RoleError, require
from stillhouse.evaluate.similarity import layer_similarity
from stillhouse.parts.shortcuts import Block, residual_blocks, with_shortcuts
from stillhouse.run import frozen

Loss = Callable[[], Tensor]


@torch.no_grad()
def filter_normalised(parameters: Sequence[Tensor], seed: int = 0) -> list[Tensor]:
    """A random direction in which every filter (the weights of one output) has the norm of that filter; parameters of
    one dimension or none (biases, scales) are not moved (Li et al. 2018, section 4)."""
    generator = torch.Generator().manual_seed(seed)
    direction = []
    for p in parameters:
        d = torch.randn(p.shape, generator=generator).to(p)
        if p.dim() < 2:
            direction.append(torch.zeros_like(d))
            continue
        size, own = (x.flatten(1).norm(dim=1) for x in (d, p))
        direction.append(d * (own / size.clamp_min(torch.finfo(d.dtype).tiny)).view(-1, *[1] * (d.dim() - 1)))
    return direction


@contextlib.contextmanager
def _restored(parameters: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """The values of the parameters, to which they return."""
    values = [p.detach().clone() for p in parameters]
    try:
        yield values
    finally:
        with torch.no_grad():
            for p, value in zip(parameters, values, strict=True):
                p.copy_(value)


def _move(parameters: Sequence[Tensor], values: Sequence[Tensor], steps: Sequence[tuple[float, Sequence[Tensor]]]
          ) -> None:
    with torch.no_grad():
        for i, (p, value) in enumerate(zip(parameters, values, strict=True)):
            p.copy_(value)
            for step, direction in steps:
                p.add_(direction[i], alpha=step)


@torch.no_grad()
def loss_plane(
    loss: Loss, parameters: Sequence[Tensor], radius: float = 0.5, points: int = 7, seed: int = 0
) -> Float[Tensor, "points points"]:
    """The loss at theta + a d_1 + b d_2 for a and b evenly spaced in [-radius, radius], along two filter-normalised
    random directions (Li et al. 2018); the middle is the loss at theta, so `points` is odd."""
    require(points >= 3 and points % 2 == 1 and radius > 0, "points is an odd number from 3 and radius is above 0; got "
            f"{points} and {radius}")
    first, second = (filter_normalised(parameters, seed=2 * seed + i) for i in (0, 1))
    axis = torch.linspace(-radius, radius, points).tolist()
    with _restored(parameters) as values:
        rows = []
        for a in axis:
            for b in axis:
                _move(parameters, values, [(a, first), (b, second)])
                rows.append(loss().double().cpu())
    return torch.stack(rows).view(points, points)


def roughness(plane: Float[Tensor, "points points"]) -> float:
    """Mean of |L(theta + d) - L(theta)| over the other points of a plane whose middle is theta."""
    middle = len(plane) // 2
    return float((plane - plane[middle, middle]).abs().sum() / (plane.numel() - 1))


def sharpness(loss: Loss, parameters: Sequence[Tensor], radius: float = 0.05) -> float:
    """max over |d| <= radius of L(theta + d), to first order, less L(theta): the loss after a step of length `radius`
    along the gradient (Foret et al. 2021, equation 2)."""
    require(radius > 0, f"radius must be above 0, not {radius}")
    before = loss()
    gradient = torch.autograd.grad(before, list(parameters))
    size = torch.stack([g.square().sum() for g in gradient]).sum().sqrt()
    if float(size) == 0:
        return 0.0
    with _restored(parameters) as values, torch.no_grad():
        _move(parameters, values, [(radius / float(size), gradient)])
        return float(loss() - before)


def hessian_product(loss: Loss, parameters: Sequence[Tensor], vector: Sequence[Tensor]) -> list[Tensor]:
    """H v, the Hessian of the loss times a vector (Pearlmutter 1994), without forming H."""
    parameters = list(parameters)
    gradient = torch.autograd.grad(loss(), parameters, create_graph=True)
    return _product(gradient, parameters, vector)


def _product(gradient: Sequence[Tensor], parameters: Sequence[Tensor], vector: Sequence[Tensor]) -> list[Tensor]:
    inner = torch.stack([(g * v).sum() for g, v in zip(gradient, vector, strict=True)]).sum()
    if not inner.requires_grad:
        return [torch.zeros_like(p) for p in parameters]
    found = torch.autograd.grad(inner, list(parameters), retain_graph=True, allow_unused=True)
    return [torch.zeros_like(p) if h is None else h for p, h in zip(parameters, found, strict=True)]


def largest_curvature(
    loss: Loss, parameters: Sequence[Tensor], iterations: int = 20, seed: int = 0, tolerance: float = 1e-3,
    shift: float = 0.0
) -> tuple[float, list[Tensor]]:
    """The eigenvalue of the Hessian of largest size, and its unit eigenvector, by power iteration; it stops where the
    eigenvalue changes by less than `tolerance` of itself. The gradient's graph is built once. Its sign is that of the
    Rayleigh quotient. With a `shift` it is the eigenvalue farthest from that number (iteration on H - shift I)."""
    require(iterations >= 1, f"iterations must be 1 or more, not {iterations}")
    parameters = list(parameters)
    generator = torch.Generator().manual_seed(seed)
    vector = _unit([torch.randn(p.shape, generator=generator).to(p) for p in parameters])
    gradient = torch.autograd.grad(loss(), parameters, create_graph=True)
    value = 0.0
    for _ in range(iterations):
        product = [h.detach() for h in _product(gradient, parameters, vector)]
        if shift:
            product = [h - shift * v for h, v in zip(product, vector, strict=True)]
        before, value = value, float(sum((h * v).sum() for h, v in zip(product, vector, strict=True)))
        vector = _unit(product)
        if abs(value - before) <= tolerance * abs(value):
            break
    return value + shift, vector


def extreme_curvatures(
    loss: Loss, parameters: Sequence[Tensor], iterations: int = 20, seed: int = 0, tolerance: float = 1e-3
) -> tuple[float, float]:
    """The dominant eigenvalue of the Hessian (of largest size, with its sign) and the algebraically largest one: the
    same where it is positive, otherwise the one farthest from it."""
    dominant = largest_curvature(loss, parameters, iterations, seed, tolerance)[0]
    if dominant >= 0:
        return dominant, dominant
    return dominant, largest_curvature(loss, parameters, iterations, seed, tolerance, shift=dominant)[0]


@torch.no_grad()
def mean_sharpness(
    loss: Loss, parameters: Sequence[Tensor], radius: float = 0.05, directions: int = 16, seed: int = 0
) -> float:
    """E_d [L(theta + radius d) - L(theta)] over random unit directions d, each taken with its opposite, so that the
    slope at theta cancels; about radius^2 / 2 times the mean eigenvalue of the Hessian.

    The same seed gives the same directions. Raises ConfigError for a radius or number of directions of 0 or less.
    """
    require(radius > 0 and directions >= 1, f"radius must be above 0 and directions 1 or more; got {radius} and "
            f"{directions}")
    generator = torch.Generator().manual_seed(seed)
    before, total = loss(), 0.0
    with _restored(parameters) as values:
        for _ in range(directions):
            d = _unit([torch.randn(p.shape, generator=generator).to(p) for p in parameters])
            for sign in (radius, -radius):
                _move(parameters, values, [(sign, d)])
                total += float(loss() - before)
    return total / (2 * directions)


def _unit(vector: Sequence[Tensor]) -> list[Tensor]:
    size = torch.stack([v.square().sum() for v in vector]).sum().sqrt()
    return [v / size.clamp_min(torch.finfo(v.dtype).tiny) for v in vector]


def gradient_flow(loss: Loss, model: nn.Module) -> dict[str, float]:
    """|dL/dW| / |W| of every weight with more than one dimension, by its name, in the order of the model: how much of
    the gradient reaches the first layers."""
    weights = {name: p for name, p in model.named_parameters() if p.dim() > 1 and p.requires_grad}
    require(bool(weights), f"{type(model).__name__} has no weights that take a gradient", RoleError)
    gradients = torch.autograd.grad(loss(), list(weights.values()))
    return {name: float(g.norm() / p.detach().norm().clamp_min(1e-12))
            for (name, p), g in zip(weights.items(), gradients, strict=True)}


@torch.no_grad()
def feature_reuse(model: nn.Module, data: Any, batch: int = 256, device: torch.device | str = "cpu"
                  ) -> dict[str, float]:
    """|F(x)| / |shortcut(x)| of every residual block of a network, mean over the pictures of `data`: small where a
    block hands its input on, large where it makes something new. In eval mode, on a copy.

    Raises RoleError for a network without residual blocks or without their shortcuts, DataError for no data.
    """
    require(len(data) >= 1, "there is nothing to measure on: the set is empty", DataError)
    opened = with_shortcuts(model).eval()
    blocks: dict[str, Block] = {n: b for n, b in residual_blocks(opened).items() if isinstance(b, Block) and b.shortcut}
    require(bool(blocks), f"{type(model).__name__} has no residual block with a shortcut", RoleError)
    totals = dict.fromkeys(blocks, 0.0)

    def note(name: str) -> Any:
        def measure(block: Any, inputs: tuple[Tensor, ...]) -> None:
            sizes = [part(inputs[0]).flatten(1).norm(dim=1) for part in (block.residual, block.shortcut)]
            totals[name] += float((sizes[0] / sizes[1].clamp_min(1e-12)).double().sum())

        return measure

    for name, block in blocks.items():
        block.register_forward_pre_hook(note(name))
    for start in range(0, len(data), batch):
        opened(fetch(data, range(start, min(start + batch, len(data))))["image"].to(device))
    return {name: total / len(data) for name, total in totals.items()}


def block_alignment(model: nn.Module, data: Any, batch: int = 256, device: torch.device | str = "cpu"
                    ) -> dict[str, float]:
    """Linear CKA between the outputs of each residual (or plain) block and the one before it, by the name of the later
    one: near 1 where a block changes little. Raises RoleError for fewer than two blocks."""
    names = list(residual_blocks(model))
    require(len(names) >= 2, f"{type(model).__name__} has {len(names)} residual blocks; two or more are compared",
            RoleError)
    with frozen(model):
        values = layer_similarity(model, model, data, names, names, batch=batch, device=device)
    return {name: float(values[i, i + 1]) for i, name in enumerate(names[1:])}


def plane_figure(planes: dict[str, Float[Tensor, "points points"]]) -> Any:
    """A figure with the loss planes of several networks side by side on one scale, for `run.picture`."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3 * len(planes), 3))
    top = max(float(plane.max()) for plane in planes.values())
    for i, (name, plane) in enumerate(planes.items()):
        axes = figure.add_subplot(1, len(planes), i + 1)
        axes.contourf(plane.tolist(), levels=12, vmin=0, vmax=top)
        axes.set_title(name)
        axes.set_xticks([])
        axes.set_yticks([])
    return figure
