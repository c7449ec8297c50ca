"""Losses whose gradient is a difference of scores: distribution matching through a frozen pair of denoisers."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from stillhouse.measures.divergences import Reduction, reduce_samples


def matching_direction(
    x: Float[Tensor, "batch ..."],
    x0_real: Float[Tensor, "batch ..."],
    x0_fake: Float[Tensor, "batch ..."],
    normalise: bool = True,
) -> Float[Tensor, "batch ..."]:
    """The descent gradient on x of KL(fake || real) at one noise level, x0_fake - x0_real, without gradient of its own.

    With p = x - x0 it is (p_real - p_fake), and `normalise` divides each sample by its own mean |p_real| (Yin et al.
    2024, arXiv 2311.18828, equation 8), so it is homogeneous of degree 0 in (p_real, p_fake). Where p_real
    is exactly 0 the direction is undefined and 0 is given.
    """
    with torch.no_grad():
        direction = (x - x0_real) - (x - x0_fake)
        if normalise:
            direction = direction / (x - x0_real).abs().flatten(1).mean(1).view(-1, *[1] * (x.ndim - 1))
        return torch.nan_to_num(direction, nan=0.0, posinf=0.0, neginf=0.0)


def distribution_matching(
    x: Float[Tensor, "batch ..."],
    x0_real: Float[Tensor, "batch ..."],
    x0_fake: Float[Tensor, "batch ..."],
    normalise: bool = True,
    weight: Float[Tensor, " batch"] | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """DMD's loss, 0.5 mean (x - stopgrad(x - g))^2 with g = `matching_direction`; its gradient on x is g / numel.

    Yin et al. 2024, arXiv 2311.18828, equation 7 and algorithm 2. `x` is the generated sample; `x0_real` and
    `x0_fake` are the teacher's and the fake score's estimates from one noised copy of it.
    """
    return stop_gradient_loss(x, matching_direction(x, x0_real, x0_fake, normalise), weight, reduction)


def stop_gradient_loss(
    x: Float[Tensor, "batch ..."],
    gradient: Float[Tensor, "batch ..."],
    weight: Float[Tensor, " batch"] | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """A loss whose gradient on x is `gradient` over the entries of one sample (and over samples, for "mean")."""
    target = (x - gradient).detach()
    return reduce_samples(0.5 * (x - target).square().flatten(1).mean(1), weight, reduction=reduction)
