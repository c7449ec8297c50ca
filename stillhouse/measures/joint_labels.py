"""Joint labels of class and transformation (Lee et al. 2020): label y M + j for copy j of a picture of class y.

Copies of one picture lie side by side, the transformation fastest: row i M + j is copy j of picture i.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from stillhouse.errors import DataError, require


def joint_labels(label: Int[Tensor, " n"], count: int) -> Int[Tensor, " copies"]:
    """y M + j for each of the M = `count` copies of every picture."""
    return (label[:, None] * count + torch.arange(count, device=label.device)).flatten()


def copy_labels(label: Int[Tensor, " n"], count: int) -> tuple[Int[Tensor, " copies"], Int[Tensor, " copies"]]:
    """The class y and the transformation j of each of the M = `count` copies of every picture."""
    which = torch.arange(count, device=label.device).repeat(len(label))
    return label.repeat_interleave(count), which


def conditional_logits(joint: Float[Tensor, "n joint"], count: int, which: int = 0) -> Float[Tensor, "n classes"]:
    """Logits of the classes given transformation j = `which`: columns y M + j (Lee et al. 2020, equation 4). Their
    softmax is P(y | x, j). Raises DataError where the columns are no multiple of M = `count`."""
    _check(joint, count)
    return joint[:, which::count]


def aggregated_logits(joint: Float[Tensor, "copies joint"], count: int) -> Float[Tensor, "n classes"]:
    """s_y = (1/M) sum_j z^(j)[y M + j]: of copy j the columns of transformation j alone; their softmax is P_agg (Lee et
    al. 2020, equation 5). Raises DataError where rows or columns are no multiple of M = `count`."""
    _check(joint, count)
    require(len(joint) % count == 0, f"{len(joint)} rows are no {count} copies of each picture", DataError)
    by_copy = joint.view(-1, count, joint.shape[1] // count, count)
    return by_copy.diagonal(dim1=1, dim2=3).mean(-1)


def _check(joint: Tensor, count: int) -> None:
    require(count >= 1 and joint.shape[1] % count == 0, f"{joint.shape[1]} columns are no joint labels of {count} "
            "transformations", DataError)
