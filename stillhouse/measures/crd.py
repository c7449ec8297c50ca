"""Losses on the scores c(v, u) of a contrastive critic: of pairs of the same picture and of pairs of two pictures."""

from __future__ import annotations

import math

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from stillhouse.errors import ConfigError, DataError, require
from stillhouse.measures.divergences import Reduction, reduce_samples


def crd_nce(
    positive: Float[Tensor, " n"],
    negatives: Float[Tensor, "n m"],
    size: int,
    log_z: float | Float[Tensor, ""],
    temperature: float = 0.07,
    weight: Float[Tensor, " n"] | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """-log h(positive) - sum over the M negatives of log(1 - h) with h = e / (e + M / N), e = exp(c / tau) / Z.

    Tian et al. 2020, equations 14 and 19: `size` is N, the number of samples that negatives are drawn from, `log_z` the
    logarithm of the normaliser Z, in the release N times the mean of exp(c / tau) over the first batch. Raises
    DataError for shapes that do not fit.
    """
    _check(positive, negatives)
    require(temperature > 0, f"temperature must be above 0, not {temperature}", ConfigError)
    shift = log_z + math.log(negatives.shape[1] / size)
    losses = -F.logsigmoid(positive / temperature - shift) - F.logsigmoid(shift - negatives / temperature).sum(1)
    return reduce_samples(losses, weight, reduction=reduction)


def dual_contrast(
    positive: Float[Tensor, " n"],
    negatives: Float[Tensor, "n m"],
    weight: Float[Tensor, " n"] | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """-(E_joint c - E_product c), the mean over the M negatives in place of the second expectation.

    With a critic that is 1-Lipschitz this is minus a lower bound of the Wasserstein dependency of v and u (Ozair et al.
    2019, equation 3; Chen et al. 2021). Raises DataError for shapes that do not fit.
    """
    _check(positive, negatives)
    return reduce_samples(negatives.mean(1) - positive, weight, reduction=reduction)


def _check(positive: Tensor, negatives: Tensor) -> None:
    require(positive.dim() == 1 and negatives.dim() == 2 and len(positive) == len(negatives) and negatives.numel() > 0,
            "one score per sample and one row of negatives per sample are compared; got "
            f"{tuple(positive.shape)} and {tuple(negatives.shape)}", DataError)
