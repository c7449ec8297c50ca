"""Losses on the relations among samples (similarities, distances, angles) in place of the samples' own features."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from stillhouse.errors import DataError, require
from stillhouse.measures.divergences import Reduction, kl_of_logs, log_mixture, log_probs, reduce_samples


def gram(a: Float[Tensor, "n ..."]) -> Float[Tensor, "n n"]:
    """Inner products of the flattened rows."""
    rows = a.flatten(1)
    return rows @ rows.T


def cosine_matrix(a: Float[Tensor, "n features"], b: Float[Tensor, "m features"]) -> Float[Tensor, "n m"]:
    """Cosine similarity of every row of `a` with every row of `b`."""
    return F.normalize(a, dim=-1) @ F.normalize(b, dim=-1).T


def relational_js(
    a: Float[Tensor, "n features"],
    a_plus: Float[Tensor, "n features"],
    reference: Float[Tensor, "r features"],
    temperature: float = 0.1,
    target_temperature: float = 0.1,
    weight: Float[Tensor, " n"] | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """Relational distillation between two views (FedX, Han et al. 2022, equations 4 and 5).

    Each view's similarities to the reference bank, as a softmax; the target is the two views' mean at
    `target_temperature` and carries gradient: mean of KL(t || softmax u) and KL(t || softmax u+). Summed over the bank.
    Zero if the views agree and both temperatures are equal; unchanged when any row is rescaled.
    """
    _same(a, a_plus)
    require(reference.dim() == 2 and reference.shape[1] == a.shape[1],
            f"the reference bank must be [r, {a.shape[1]}], got {tuple(reference.shape)}", DataError)
    u, u_plus = cosine_matrix(a, reference), cosine_matrix(a_plus, reference)
    log_target = log_mixture(log_probs(u, target_temperature), log_probs(u_plus, target_temperature), 0.5)
    kls = [kl_of_logs(log_target, log_probs(s, temperature)) for s in (u, u_plus)]
    return reduce_samples((kls[0] + kls[1]) / 2, weight, reduction=reduction)


def distances(a: Float[Tensor, "n features"]) -> Float[Tensor, "n n"]:
    """Euclidean distances, with gradient 0 (not NaN) where two rows coincide."""
    squared = (a[:, None] - a[None, :]).square().sum(-1)
    safe = torch.where(squared > 0, squared, torch.ones_like(squared))
    return torch.where(squared > 0, safe.sqrt(), torch.zeros_like(squared))


def rkd_distance(teacher: Float[Tensor, "n d"], student: Float[Tensor, "n e"]) -> Float[Tensor, ""]:
    """RKD-D (Park et al. 2019, equations 5 and 6): Huber loss (delta 1) of all distances over their mean; the mean is
    taken over the pairs of different samples. Unchanged by rotation, shift and scale of either side."""
    _rows(teacher, student, at_least=2)
    return F.smooth_l1_loss(_over_mean(distances(student)), _over_mean(distances(teacher)))


def rkd_angle(teacher: Float[Tensor, "n d"], student: Float[Tensor, "n e"]) -> Float[Tensor, ""]:
    """RKD-A (Park et al. 2019, equations 7 and 8): Huber loss of the cosines of all angles (i, j, k) at j."""
    _rows(teacher, student, at_least=3)
    return F.smooth_l1_loss(_angles(student), _angles(teacher))


def similarity_preserving(teacher: Float[Tensor, "n ..."], student: Float[Tensor, "n ..."]) -> Float[Tensor, ""]:
    """SP (Tung and Mori 2019, equations 1 to 4): squared Frobenius norm, over n^2, between the Gram matrices with
    rows of unit length."""
    _rows(teacher, student, at_least=1)
    difference = F.normalize(gram(student), dim=1) - F.normalize(gram(teacher), dim=1)
    return difference.square().sum() / len(teacher) ** 2


def cka(a: Float[Tensor, "n d"], b: Float[Tensor, "n e"]) -> Float[Tensor, ""]:
    """Linear centred kernel alignment in [0, 1] (Kornblith et al. 2019, section 3): a similarity, so a loss is 1 - cka.

    The biased estimate: at small n independent features are far from 0; compare with shuffled pairs, not with 0.
    """
    _rows(a, b, at_least=2)
    a, b = a - a.mean(0), b - b.mean(0)
    cross = (a.T @ b).square().sum()
    norm = (a.T @ a).square().sum().sqrt() * (b.T @ b).square().sum().sqrt()
    return cross / norm.clamp_min(torch.finfo(norm.dtype).tiny)


def rbf_gram(a: Float[Tensor, "n ..."], bandwidth: float = 0.5) -> Float[Tensor, "n n"]:
    """exp(-d^2 / (2 sigma^2)) of the flattened rows, sigma being `bandwidth` times the median distance of two different
    rows (Kornblith et al. 2019, section 4)."""
    require(bandwidth > 0, f"bandwidth is a part of the median distance, above 0, not {bandwidth}")
    squared = torch.cdist(a.flatten(1)[None], a.flatten(1)[None])[0].square()
    off = squared[~torch.eye(len(a), dtype=torch.bool, device=a.device)]
    scale = (bandwidth**2 * off.median()).clamp_min(torch.finfo(a.dtype).tiny)
    return (-squared / (2 * scale)).exp()


def hsic(k: Float[Tensor, "n n"], m: Float[Tensor, "n n"], unbiased: bool = False) -> Float[Tensor, ""]:
    """Hilbert-Schmidt independence criterion of two Gram matrices of the same samples: tr(K H M H) / (n - 1)^2
    (Gretton et al. 2005), or the estimate without bias (Song et al. 2012, equation 5), which needs 4 samples."""
    n = len(k)
    require(k.shape == m.shape == (n, n), f"two Gram matrices of the same samples are needed; got {tuple(k.shape)} and "
            f"{tuple(m.shape)}", DataError)
    require(n >= (4 if unbiased else 2), f"HSIC needs at least {4 if unbiased else 2} samples, got {n}", DataError)
    if not unbiased:
        return (k - k.mean(0) - k.mean(1, keepdim=True) + k.mean()).mul(m).sum() / (n - 1) ** 2
    k, m = (g - torch.diag(g.diagonal()) for g in (k, m))
    inner = (k * m).sum() + k.sum() * m.sum() / ((n - 1) * (n - 2)) - 2 * (k.sum(0) @ m.sum(0)) / (n - 2)
    return inner / (n * (n - 3))


def instance_graph(features: Float[Tensor, "n d"]) -> Float[Tensor, "n n"]:
    """Edges of an instance relationship graph (Liu et al. 2019, equation 3): squared distances of all pairs of samples,
    over their mean."""
    squared = (features[:, None] - features[None, :]).square().sum(-1)
    return _over_mean(squared)


def graph_distance(teacher: Float[Tensor, "n d"], student: Float[Tensor, "n e"]) -> Float[Tensor, ""]:
    """IRG's edge loss (Liu et al. 2019, equation 7): mean squared difference of the two instance graphs. Unchanged by
    rotation, shift and scale of either side."""
    _rows(teacher, student, at_least=2)
    return (instance_graph(student) - instance_graph(teacher)).square().mean()


def _over_mean(d: Tensor) -> Tensor:
    n = len(d)
    return d / (d.sum() / (n * (n - 1))).clamp_min(torch.finfo(d.dtype).tiny)


def _angles(a: Tensor) -> Tensor:
    e = a[None, :] - a[:, None]
    unit = e / distances(a)[..., None].clamp_min(torch.finfo(a.dtype).eps)
    return torch.einsum("jid,jkd->jik", unit, unit)


def _same(a: Tensor, b: Tensor) -> None:
    require(a.dim() == 2 and a.shape == b.shape,
            f"the two views must be [n, features] of equal shape; got {tuple(a.shape)} and {tuple(b.shape)}", DataError)


def _rows(a: Tensor, b: Tensor, at_least: int) -> None:
    require(len(a) == len(b), f"both sides need the same samples; got {len(a)} and {len(b)} rows", DataError)
    require(len(a) >= at_least, f"relations need at least {at_least} samples, got {len(a)}", DataError)
