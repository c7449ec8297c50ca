"""Measures of inner feature maps: hints, attention, the flow between two layers."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from stillhouse.errors import DataError, require


def hint(teacher: Float[Tensor, "n ..."], student: Float[Tensor, "n ..."]) -> Float[Tensor, ""]:
    """Mean squared difference of the teacher's features and the student's after its regressor (FitNets, Romero et al.
    2015, equation 3, the sum over entries taken as their mean and its 1/2 left to the weight)."""
    require(teacher.shape == student.shape, f"the student's features {tuple(student.shape)} are not yet in the "
            f"teacher's shape {tuple(teacher.shape)}; give them to a regressor first", DataError)
    return F.mse_loss(student, teacher)


def attention_map(features: Float[Tensor, "n channels height width"], power: float = 2.0) -> Float[Tensor, "n places"]:
    """sum_c |A_c|^p over the channels, flattened and brought to length 1 (Zagoruyko and Komodakis 2017, section 3.1).

    Unchanged when the features are multiplied by a positive number.
    """
    require(features.dim() == 4, f"feature maps are [n, channels, height, width], not {tuple(features.shape)}",
            DataError)
    return F.normalize(features.abs().pow(power).mean(1).flatten(1), dim=1)


def attention_transfer(
    teacher: Float[Tensor, "n c height width"], student: Float[Tensor, "n d h w"], power: float = 2.0
) -> Float[Tensor, ""]:
    """AT: mean squared difference of the two attention maps, the larger one pooled to the smaller (the released form
    of Zagoruyko and Komodakis 2017; their equation 2 has the norm of the difference instead of its mean square)."""
    maps = [attention_map(x, power) for x in _alike(teacher, student, F.adaptive_avg_pool2d)]
    return (maps[0] - maps[1]).square().mean()


def flow_matrix(
    first: Float[Tensor, "n c height width"], second: Float[Tensor, "n d h w"]
) -> Float[Tensor, "n c d"]:
    """FSP matrix of two layers: G_ij = sum over places of F1_i F2_j / (h w) (Yim et al. 2017, equation 1); the larger
    map is max-pooled to the smaller."""
    a, b = _alike(first, second, F.adaptive_max_pool2d)
    return torch.einsum("nchw,ndhw->ncd", a, b) / a.shape[2:].numel()


def neuron_selectivity(
    teacher: Float[Tensor, "n c height width"], student: Float[Tensor, "n d h w"]
) -> Float[Tensor, ""]:
    """NST (Huang and Wang 2017, equations 4 and 7): squared maximum mean discrepancy, with the kernel (x . y)^2,
    between the channels' maps of length 1; the larger map is pooled to the smaller."""
    t, s = (F.normalize(x.flatten(2), dim=2) for x in _alike(teacher, student, F.adaptive_avg_pool2d))

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return torch.einsum("ncp,ndp->ncd", a, b).square().mean((1, 2))

    return (kernel(t, t) + kernel(s, s) - 2 * kernel(t, s)).mean()


def _alike(a: Tensor, b: Tensor, pool: Callable[..., Tensor]) -> tuple[Tensor, Tensor]:
    """Both maps at the smaller height and width."""
    size = (min(a.shape[2], b.shape[2]), min(a.shape[3], b.shape[3]))
    return (a if tuple(a.shape[2:]) == size else pool(a, size)), (b if tuple(b.shape[2:]) == size else pool(b, size))
