"""Distances between paired samples, one number per pair: the metric d(x, y) of a regression onto samples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from stillhouse.errors import ConfigError, require

Metric = Literal["l1", "l2", "pseudo_huber", "lpips"]


def sample_distance(
    metric: Metric,
    x: Float[Tensor, "batch ..."],
    y: Float[Tensor, "batch ..."],
    perceptual: Callable[[Tensor], Tensor | Sequence[Tensor]] | None = None,
    c: float | None = None,
) -> Float[Tensor, " batch"]:
    """d(x, y) of each pair.

    l1, l2: the mean absolute and the mean squared difference. pseudo_huber: sqrt(||x - y||^2 + c^2) - c, by default
    with c = 0.00054 sqrt(numbers in a sample) (Song & Dhariwal 2023, arXiv 2310.14189, section 3.3). lpips:
    `perceptual_distance` of what `perceptual` makes of x and y. Raises ConfigError on another metric, for shapes that
    differ, and for lpips without a network.
    """
    require(x.shape == y.shape, f"pairs need equal shapes, got {tuple(x.shape)} and {tuple(y.shape)}", ConfigError)
    difference = (x - y).flatten(1)
    match metric:
        case "l1":
            return difference.abs().mean(1)
        case "l2":
            return difference.square().mean(1)
        case "pseudo_huber":
            c = 0.00054 * difference.shape[1] ** 0.5 if c is None else c
            return (difference.square().sum(1) + c**2).sqrt() - c
        case "lpips":
            require(perceptual is not None, "the metric lpips needs a network whose features are compared", ConfigError)
            assert perceptual is not None
            return perceptual_distance(perceptual(x), perceptual(y))
    raise ConfigError(f"unknown metric {metric!r}; known are {', '.join(get_args(Metric))}")


def perceptual_distance(
    x: Float[Tensor, "batch features ..."] | Sequence[Tensor],
    y: Float[Tensor, "batch features ..."] | Sequence[Tensor],
) -> Float[Tensor, " batch"]:
    """Squared distance of feature vectors of unit length, averaged over places and added up over layers.

    Zhang et al. 2018 (LPIPS, arXiv 1801.03924), equation 1 with all channel weights equal to 1.
    """
    ours, theirs = ([x], [y]) if isinstance(x, Tensor) and isinstance(y, Tensor) else (x, y)
    layers = [(F.normalize(a, dim=1) - F.normalize(b, dim=1)).square().sum(1).flatten(1).mean(1) if a.ndim > 2
              else (F.normalize(a, dim=1) - F.normalize(b, dim=1)).square().sum(1)
              for a, b in zip(ours, theirs, strict=True)]
    return torch.stack(layers).sum(0)
