"""Two-dimensional densities with known modes, and sets that only count draws."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from stillhouse.data.sets import TensorSet
from stillhouse.errors import DataError, require


def ring(modes: int = 8, radius: float = 2.0) -> Float[Tensor, "modes 2"]:
    """Centres of `modes` Gaussians on a circle: `gauss2d`."""
    require(modes >= 1 and radius > 0, f"a ring needs modes >= 1 and radius > 0, got {modes} and {radius}", DataError)
    angle = torch.arange(modes, dtype=torch.float64) * (2 * math.pi / modes)
    return (radius * torch.stack([angle.cos(), angle.sin()], 1)).float()


def gauss2d(
    n: int,
    centres: Float[Tensor, "modes dim"] | None = None,
    std: float = 0.15,
    weights: Float[Tensor, " modes"] | None = None,
    seed: int = 0,
) -> TensorSet:
    """n draws `x` of Gaussians of one std around `centres` (the ring of 8 by default); `label` is the mode."""
    centres = ring() if centres is None else centres
    require(n >= 1 and std > 0, f"gauss2d needs n >= 1 and std > 0, got {n} and {std}", DataError)
    generator = torch.Generator().manual_seed(seed)
    weights = torch.ones(len(centres)) if weights is None else weights
    label = torch.multinomial(weights, n, replacement=True, generator=generator)
    return TensorSet(x=centres[label] + std * torch.randn(n, centres.shape[1], generator=generator), label=label)


def moons(n: int, std: float = 0.1, seed: int = 0) -> TensorSet:
    """n draws `x` of two interleaved half-circles of radius 1 with Gaussian noise; `label` is the moon."""
    require(n >= 1 and std >= 0, f"moons need n >= 1 and std >= 0, got {n} and {std}", DataError)
    generator = torch.Generator().manual_seed(seed)
    label = torch.randint(0, 2, (n,), generator=generator)
    angle = math.pi * torch.rand(n, generator=generator)
    side = 1.0 - 2.0 * label
    x = torch.stack([side * angle.cos() + label - 0.5, side * angle.sin() + 0.5 * label - 0.25], 1)
    return TensorSet(x=x + std * torch.randn(n, 2, generator=generator), label=label)


def checkerboard(n: int, cells: int = 4, seed: int = 0) -> TensorSet:
    """n draws `x`, uniform on every other of cells x cells squares that cover [-2, 2]^2; `label` is the square.

    The density is 2 / 16 on the support and 0 elsewhere. Raises DataError unless `cells` is even.
    """
    require(n >= 1 and cells >= 2 and cells % 2 == 0, f"a checkerboard needs n >= 1 and an even number of cells, got "
            f"{n} and {cells}", DataError)
    generator = torch.Generator().manual_seed(seed)
    label = torch.randint(0, cells * cells // 2, (n,), generator=generator)
    row, place = label // (cells // 2), label % (cells // 2)
    corner = torch.stack([2 * place + row % 2, row], 1)
    return TensorSet(x=(corner + torch.rand(n, 2, generator=generator)) * (4 / cells) - 2, label=label)


def blank(n: int) -> TensorSet:
    """n samples that hold nothing but their index: a stream that says how many draws a step makes."""
    return TensorSet(row=torch.arange(n))
