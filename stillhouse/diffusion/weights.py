"""Weights of a squared error in x, as functions of the signal-to-noise ratio.

With alpha^2 + sigma^2 = 1 the SNR weight makes it the error in eps, SNR + 1 the error in v (Salimans & Ho 2022,
section 4), and the maximum of x and eps errors per sample is truncated SNR.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from stillhouse.diffusion.process import Process
from stillhouse.errors import ConfigError

Weighting = Literal["x0", "snr", "truncated_snr", "snr_plus_one", "min_snr", "edm"]


def x0_weight(
    weighting: Weighting,
    process: Process,
    t: Float[Tensor, " batch"],
    sigma_data: float = 1.0,
    gamma: float = 5.0,
) -> Float[Tensor, " batch"]:
    """The weight of |x - x0|^2 at time t.

    x0: 1. snr: the SNR. truncated_snr: max(SNR, 1). snr_plus_one: SNR + 1. min_snr: min(SNR, gamma) (Hang et al.
    2023, arXiv 2303.09556). edm: SNR + 1 / sigma_data^2 (Karras et al. 2022, table 1, lambda).
    Raises ConfigError on an unknown weighting.
    """
    snr = process.snr(t)
    match weighting:
        case "x0":
            return torch.ones_like(snr)
        case "snr":
            return snr
        case "truncated_snr":
            return snr.clamp(min=1)
        case "snr_plus_one":
            return snr + 1
        case "min_snr":
            return snr.clamp(max=gamma)
        case "edm":
            return snr + 1 / sigma_data**2
    raise ConfigError(f"unknown weighting {weighting!r}; known are {', '.join(get_args(Weighting))}")


def weighted_error(
    x0: Float[Tensor, "batch ..."], target: Float[Tensor, "batch ..."], weight: Float[Tensor, " batch"]
) -> Float[Tensor, ""]:
    """Batch mean of weight times the mean squared error of each sample."""
    return (weight * (x0 - target).square().flatten(1).mean(1)).mean()
