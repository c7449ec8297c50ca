"""What dataset distillation matches: parts of training trajectories, and gradients."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from stillhouse.errors import ConfigError, require


def trajectory_distance(
    reached: Float[Tensor, " parameters"],
    start: Float[Tensor, " parameters"],
    target: Float[Tensor, " parameters"],
    normalised: bool = True,
) -> Float[Tensor, ""]:
    """||theta_N - theta*_{t+M}||^2 / ||theta*_t - theta*_{t+M}||^2 (Cazenavette et al. 2022, equation 2).

    `reached` is theta_N, `start` theta*_t, `target` theta*_{t+M}. Without `normalised` only the numerator.
    The result is not finite where start and target are equal.
    """
    distance = (reached - target).square().sum()
    return distance / (start - target).square().sum() if normalised else distance


def gradient_distance(
    synthetic: Sequence[Tensor], real: Sequence[Tensor], form: str = "cosine"
) -> Float[Tensor, ""]:
    """Distance of two lists of gradients, one tensor per parameter, summed over the layers.

    "cosine": sum over the output units of a layer of 1 - cos(their incoming weights' gradients); one-dimensional
    parameters (biases, scales) are left out (Zhao, Mopuri and Bilen 2021, equation 10 and its released form).
    "squared": the sum of squared differences over all parameters.
    """
    require(form in ("cosine", "squared"), f"form is 'cosine' or 'squared', not '{form}'", ConfigError)
    pairs = list(zip(synthetic, real, strict=True))
    if form == "squared":
        return torch.stack([(s - r).square().sum() for s, r in pairs]).sum()
    units = [(s.flatten(1), r.flatten(1)) for s, r in pairs if s.dim() > 1]
    require(bool(units), "cosine matching needs a parameter with at least two dimensions; use form='squared'",
            ConfigError)
    return torch.stack([(1 - F.cosine_similarity(s, r, dim=1, eps=1e-6)).sum() for s, r in units]).sum()


def hidden_distance(
    student: Float[Tensor, "batch frames width"],
    teacher: Float[Tensor, "batch frames width"],
    l1: float = 1.0,
    cosine: float = 1.0,
    squared: float = 0.0,
) -> Float[Tensor, ""]:
    """Distance of hidden states: l1 |s - t| + squared (s - t)^2 - cosine cos(s, t), the first two averaged over
    everything, the cosine over features and averaged over batch and frames (DPHuBERT, Peng et al. 2023, equation 2).

    Equal states give -`cosine`. Raises ConfigError for shapes that differ.
    """
    require(student.shape == teacher.shape, f"the student's hidden states are {tuple(student.shape)}, the teacher's "
            f"{tuple(teacher.shape)}; bring them to one width by a projection", ConfigError)
    distance = l1 * (student - teacher).abs().mean()
    if squared:
        distance = distance + squared * (student - teacher).square().mean()
    return distance - cosine * F.cosine_similarity(student, teacher, dim=-1).mean()
