"""Discrete pictures as continuous numbers, with the change of density that this makes."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from stillhouse.errors import DataError, require


def grey_levels(image: Float[Tensor, "batch ..."], levels: int = 256) -> Float[Tensor, "batch ..."]:
    """Values in [-1, 1] as whole grey levels 0, ..., levels - 1. Raises DataError for values outside [-1, 1]."""
    require(levels >= 2, f"a picture has 2 grey levels or more, got {levels}", DataError)
    low, high = float(image.min()), float(image.max())
    require(low > -1.001 and high < 1.001, f"pictures lie in [-1, 1], these in [{low:.3g}, {high:.3g}]; scale them",
            DataError)
    return ((image + 1) / 2 * (levels - 1)).round()


def picture(grey: Float[Tensor, "batch ..."], levels: int = 256) -> Float[Tensor, "batch ..."]:
    """The inverse of `grey_levels`, where levels are first cut to whole ones within the range."""
    return grey.floor().clamp(0, levels - 1) / (levels - 1) * 2 - 1


def to_logit(
    share: Float[Tensor, "batch ..."], alpha: float = 0.05, symmetric: bool = True
) -> tuple[Float[Tensor, "batch ..."], Float[Tensor, " batch"]]:
    """logit(y) of share in [0, 1), y = alpha + (1 - 2 alpha) share, and the log-determinant with respect to share.

    Not `symmetric`: y = alpha + (1 - alpha) share, as in the text of Dinh et al. 2017 (arXiv 1605.08803, section 4.1);
    the released code is symmetric. The log-determinant is the sum of log c - log y - log(1 - y), c the factor of share.
    """
    factor = 1 - 2 * alpha if symmetric else 1 - alpha
    y = alpha + factor * share
    log_det = math.log(factor) - y.log() - (1 - y).log()
    return y.log() - (1 - y).log(), log_det.flatten(1).sum(1)


def from_logit(
    value: Float[Tensor, "batch ..."], alpha: float = 0.05, symmetric: bool = True
) -> Float[Tensor, "batch ..."]:
    """The share whose logit `to_logit` gives; outside [0, 1) for values that no picture has."""
    return (torch.sigmoid(value) - alpha) / (1 - 2 * alpha if symmetric else 1 - alpha)
