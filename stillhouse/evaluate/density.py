"""How good a density model is, in bits per dimension and in nats."""

from __future__ import annotations

import math

from jaxtyping import Float
from torch import Tensor

from stillhouse.errors import DataError, require


def bits_per_dimension(log_prob: Float[Tensor, " samples"], dimensions: int, levels: int = 256) -> float:
    """-log p / (D ln 2) + log2 L, averaged; log p is the density of dequantised values scaled to [0, 1).

    Dinh et al. 2017 (arXiv 1605.08803), section 4.1, where L = 256. Raises DataError without dimensions.
    """
    require(dimensions >= 1 and levels >= 1, f"dimensions and levels must be 1 or more, got {dimensions} and {levels}",
            DataError)
    return float(-log_prob.double().mean()) / (dimensions * math.log(2)) + math.log2(levels)


def divergence_to_truth(true: Float[Tensor, " samples"], model: Float[Tensor, " samples"]) -> float:
    """KL(true || model) in nats by Monte-Carlo: both log-densities at samples of the truth."""
    return float((true.double() - model.double()).mean())
