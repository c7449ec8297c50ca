"""Which of several models of different sizes to take: by what they can do and how large they are."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from stillhouse.errors import require


def npsd(performance: Float[Tensor, " m"], scale: Float[Tensor, " m"], teacher_performance: float,
         teacher_scale: float = 1.0) -> Float[Tensor, " m"]:
    """-(P_T - P_c) / (S_T - S_c): the negative performance-scale derivative of each candidate against its teacher (Han
    et al. 2024, "AMD"), at most 0: a candidate that beats the teacher counts as its equal.

    Raises ConfigError for a candidate that is not smaller than the teacher.
    """
    require(bool((scale < teacher_scale).all()), f"candidates must be smaller than their teacher ({teacher_scale}), "
            f"but their scales are {scale.tolist()}")
    return -(teacher_performance - performance).clamp_min(0) / (teacher_scale - scale)


def tradeoff(performance: Float[Tensor, " m"], scale: Float[Tensor, " m"], weight: float = 0.2) -> Float[Tensor, " m"]:
    """P_c + lambda (1 - S_c), S_c as a part of the teacher (Zhang et al. 2022, "MiniDisc")."""
    return performance + weight * (1 - scale)


def first_choice(value: Float[Tensor, " m"], scale: Float[Tensor, " m"]) -> int:
    """The place of the largest value; of equals the one of the smallest scale."""
    return int(torch.where(value == value.max(), scale, torch.inf).argmin())
