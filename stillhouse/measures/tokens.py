"""How far a student's tokens are from several teachers', and which teacher is heard on which picture."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from stillhouse.errors import DataError, require


def cosine_and_smooth_l1(
    student: Float[Tensor, "*batch width"], target: Float[Tensor, "*batch width"], cosine: float = 0.5,
    smooth_l1: float = 0.5
) -> Float[Tensor, "*batch"]:
    """cosine (1 - cos(s, f)) + smooth_l1 smoothL1(s, f), the latter with beta 1 and averaged over the dimensions, per
    token (UNIC, Sariyildiz et al. 2024, section 3.1). A weight of 0 leaves its term out."""
    require(student.shape == target.shape, f"tokens of shape {tuple(student.shape)} and {tuple(target.shape)}",
            DataError)
    value = student.new_zeros(student.shape[:-1])
    if cosine:
        value = value + cosine * (1 - F.cosine_similarity(student, target, dim=-1))
    if smooth_l1:
        value = value + smooth_l1 * F.smooth_l1_loss(student, target, reduction="none").mean(-1)
    return value


def kept_teachers(
    losses: Float[Tensor, "teachers batch"], u: Float[Tensor, "teachers batch"], drop: float
) -> Bool[Tensor, "teachers batch"]:
    """c_ti: on every picture the teacher with the largest loss is kept, each other one unless its uniform draw `u` lies
    below the probability `drop` (UNIC, Sariyildiz et al. 2024, section 3.3).

    1 + (T - 1)(1 - drop) of T teachers are kept on average; 0 keeps all, 1 only the one that is farthest.
    """
    require(0 <= drop <= 1, f"drop is a probability, not {drop}")
    worst = torch.zeros_like(losses, dtype=torch.bool).scatter_(0, losses.argmax(0, keepdim=True), True)
    return worst | (u >= drop)
