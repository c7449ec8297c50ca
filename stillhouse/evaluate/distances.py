"""How far generated samples are from true ones, and how far a sampler is from the flow it should follow."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from stillhouse.errors import DataError, require

CHUNK = 4096


@torch.no_grad()
def energy_distance(x: Float[Tensor, "n ..."], y: Float[Tensor, "m ..."]) -> float:
    """2 E|x - y| - E|x - x'| - E|y - y'|, without bias (pairs of a sample with itself are left out).

    Székely & Rizzo 2013, equation 2.1. Being unbiased it may fall slightly below 0 for equal distributions.
    Raises DataError on fewer than two samples or different shapes.
    """
    x, y = _pair(x, y)
    n, m = len(x), len(y)
    return 2 * _distances(x, y) / (n * m) - _distances(x, x) / (n * (n - 1)) - _distances(y, y) / (m * (m - 1))


@torch.no_grad()
def sliced_wasserstein(
    x: Float[Tensor, "n ..."], y: Float[Tensor, "m ..."], projections: int = 128, seed: int = 0
) -> float:
    """Sliced 2-Wasserstein distance over random directions of the unit sphere (Bonneel et al. 2015).

    Samples of different sizes are compared at the quantiles of the smaller. Raises DataError like `energy_distance`.
    """
    x, y = _pair(x, y)
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(x.shape[1], projections, generator=generator, dtype=x.dtype).to(x.device)
    directions = directions / directions.norm(dim=0)
    levels = (torch.arange(min(len(x), len(y)), dtype=x.dtype, device=x.device) + 0.5) / min(len(x), len(y))
    a, b = (_quantiles(s @ directions, levels) for s in (x, y))
    return (a - b).square().mean().sqrt().item()


def nearest_mode(
    x: Float[Tensor, "n dim"], centres: Float[Tensor, "modes dim"], radius: float
) -> Int[Tensor, " n"]:
    """The nearest centre of each sample, -1 where it lies farther away than `radius`."""
    distance, mode = torch.cdist(x.double(), centres.double()).min(1)
    return torch.where(distance <= radius, mode, -1)


def modes_hit(
    x: Float[Tensor, "n dim"], centres: Float[Tensor, "modes dim"], radius: float, share: float = 0.2
) -> int:
    """How many modes hold at least `share` of what an even split would give them."""
    counts = torch.bincount(nearest_mode(x, centres, radius) + 1, minlength=len(centres) + 1)[1:]
    return int((counts >= share * len(x) / len(centres)).sum())


def mode_shares(
    x: Float[Tensor, "n dim"], centres: Float[Tensor, "modes dim"], radius: float
) -> Float[Tensor, " modes"]:
    """The share of all samples within `radius` of each centre."""
    return torch.bincount(nearest_mode(x, centres, radius) + 1, minlength=len(centres) + 1)[1:] / len(x)


def in_mode_std(x: Float[Tensor, "n dim"], centres: Float[Tensor, "modes dim"], radius: float) -> float:
    """Root mean square deviation per coordinate of the samples within `radius` of a centre from their mode's mean.

    NaN where no sample lies near any centre.
    """
    mode = nearest_mode(x, centres, radius)
    spread = [(own - own.mean(0)).square().sum() for k in range(len(centres)) if len(own := x[mode == k])]
    near = int((mode >= 0).sum()) * x.shape[1]
    return float((torch.stack(spread).sum() / near).sqrt()) if near else float("nan")


def rmse(x: Float[Tensor, "n ..."], y: Float[Tensor, "n ..."]) -> float:
    """Root mean square distance between paired samples: the trajectory error against exact ODE endpoints."""
    require(x.shape == y.shape, f"pairs need equal shapes, got {tuple(x.shape)} and {tuple(y.shape)}", DataError)
    return (x - y).double().square().flatten(1).sum(1).mean().sqrt().item()


@torch.no_grad()
def mean_distance(x: Float[Tensor, "n ..."]) -> float:
    """The mean distance between two of the samples: diversity, 0 where all are one. Raises DataError below two."""
    x, _ = _pair(x, x)
    return _distances(x, x) / (len(x) * (len(x) - 1))


@torch.no_grad()
def nearest_real(x: Float[Tensor, "n ..."], real: Float[Tensor, "m ..."]) -> float:
    """The mean distance from a sample to the nearest real one: fidelity. Raises DataError like `energy_distance`."""
    x, real = _pair(x, real)
    return torch.cdist(x, real, compute_mode="donot_use_mm_for_euclid_dist").amin(1).mean().item()


def _pair(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    require(min(len(x), len(y)) >= 2 and x.shape[1:] == y.shape[1:], "two sets of two or more samples of one shape "
            f"are compared, got {tuple(x.shape)} and {tuple(y.shape)}", DataError)
    return x.flatten(1).double(), y.flatten(1).double()


def _distances(x: Tensor, y: Tensor) -> float:
    """The sum of all pairwise distances; of a set with itself a sample's distance to itself is exactly 0."""
    total = 0.0
    for start in range(0, len(x), CHUNK):
        block = torch.cdist(x[start : start + CHUNK], y, compute_mode="donot_use_mm_for_euclid_dist")
        total += block.sum().item()
    return total


def _quantiles(projected: Tensor, levels: Tensor) -> Tensor:
    """Quantiles of each column: of the empirical distribution itself where there are as many levels as samples."""
    ordered = projected.sort(0).values
    return ordered[(levels * len(ordered)).long().clamp(max=len(ordered) - 1)]
