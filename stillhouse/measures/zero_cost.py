"""How alike two untrained networks see a batch: the two similarities of DisWOT."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from stillhouse.errors import DataError, require
from stillhouse.measures.relations import gram


def semantic_distance(teacher: Float[Tensor, "classes d"], student: Float[Tensor, "classes e"]) -> Float[Tensor, ""]:
    """M_sem (Dong et al. 2023, equations 1 to 3) of the gradients of two last linear layers, a row a class.

    (1 / (C d)) sum over classes of || N(g_T g_T^T) - N(g_S g_S^T) ||_F^2, N bringing rows to length 1. As g g^T has
    rank one, that is the mean over classes of 2 - (2 / d) <sign g_T, sign g_S> <g_T, g_S> / (|g_T| |g_S|): between 0
    and 4, unchanged when either side is multiplied by a positive number.
    """
    require(teacher.shape == student.shape and teacher.dim() == 2, "the semantic distance compares channels and needs "
            f"last layers of one width; got {tuple(teacher.shape)} and {tuple(student.shape)}", DataError)
    d = teacher.shape[1]
    signs = (teacher.sign() * student.sign()).sum(1)
    return (2 - 2 / d * signs * F.cosine_similarity(teacher, student, dim=1, eps=1e-30)).mean()


def class_distance(teacher: Float[Tensor, "classes d"], student: Float[Tensor, "classes e"]) -> Float[Tensor, ""]:
    """The same for last layers of different widths: Gram matrices of the classes' rows in place of the channels', with
    rows of length 1; squared Frobenius norm of the difference over C^2. An extension of this library."""
    require(len(teacher) == len(student), f"both last layers need the same classes; got {len(teacher)} and "
            f"{len(student)}", DataError)
    gap = _rows(gram(teacher)) - _rows(gram(student))
    return gap.square().sum() / len(teacher) ** 2


def relation_distance(teacher: Float[Tensor, "n ..."], student: Float[Tensor, "n ..."]) -> Float[Tensor, ""]:
    """M_rel (Dong et al. 2023, equations 4 and 5) of two networks' features before pooling: `similarity_preserving`,
    with the features brought to unit size first, so that tiny ones are not lost in the normalisation."""
    require(len(teacher) == len(student), f"both sides need the same samples; got {len(teacher)} and {len(student)}",
            DataError)
    gap = _rows(gram(_unit(teacher))) - _rows(gram(_unit(student)))
    return gap.square().sum() / len(teacher) ** 2


def channel_correlation(teacher: Float[Tensor, "n c height width"], student: Float[Tensor, "n d h w"]
                        ) -> Float[Tensor, ""]:
    """ICKD (Liu et al. 2021, equations 3 and 4): mean squared difference of the correlations of channels, F F^T / (h w)
    with F of [c, places], of each sample."""
    require(teacher.shape[:2] == student.shape[:2], "correlations of channels need as many channels on both sides; got "
            f"{tuple(teacher.shape)} and {tuple(student.shape)}: give the student's to a regressor first", DataError)
    of = [torch.einsum("ncp,ndp->ncd", f, f) / f.shape[2] for f in (teacher.flatten(2), student.flatten(2))]
    return (of[0] - of[1]).square().mean()


def _rows(a: Tensor) -> Tensor:
    return F.normalize(a, dim=1, eps=1e-30)


def _unit(a: Tensor) -> Tensor:
    return a / a.norm().clamp_min(torch.finfo(a.dtype).tiny)
