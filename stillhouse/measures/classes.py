"""Measures of class logits beyond the plain divergence: decoupled distillation and correlations."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from stillhouse.errors import DataError, require
from stillhouse.measures.divergences import kl_of_logs, log_probs


def decoupled_parts(
    teacher: Float[Tensor, "n classes"], student: Float[Tensor, "n classes"], label: Int[Tensor, " n"],
    temperature: float = 1.0,
) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"], Float[Tensor, " n"]]:
    """TCKD, NCKD and the teacher's probability p_y of the label, per sample (Zhao et al. 2022, equations 4 to 6).

    TCKD compares the label with all other classes together, NCKD the other classes among themselves, without the
    temperature squared. KL(p || q) = TCKD + (1 - p_y) NCKD.
    """
    require(teacher.shape == student.shape, f"teacher {tuple(teacher.shape)} and student {tuple(student.shape)} differ "
            "in shape", DataError)
    require(teacher.shape[1] >= 2, "decoupling needs at least two classes", DataError)
    log_p, log_q = (log_probs(z, temperature) for z in (teacher, student))
    own = F.one_hot(label, teacher.shape[1]).bool()
    binary, among = [], []
    for log in (log_p, log_q):
        target = log[own][:, None]
        rest = log.masked_fill(own, -torch.inf).logsumexp(1, keepdim=True)
        binary.append(torch.cat([target, rest], 1))
        among.append((log - rest)[~own].view(len(log), -1))
    return kl_of_logs(*binary), kl_of_logs(*among), log_p[own].exp()


def decoupled_kd(
    teacher: Float[Tensor, "n classes"], student: Float[Tensor, "n classes"], label: Int[Tensor, " n"],
    alpha: float = 1.0, beta: float = 8.0, temperature: float = 4.0,
) -> Float[Tensor, ""]:
    """DKD (Zhao et al. 2022, equation 7): (alpha TCKD + beta NCKD) T^2, mean over samples."""
    target, others, _ = decoupled_parts(teacher, student, label, temperature)
    return temperature**2 * (alpha * target + beta * others).mean()


def correlation(a: Float[Tensor, "n m"], b: Float[Tensor, "n m"]) -> Float[Tensor, " n"]:
    """Pearson's correlation of each row of `a` with that row of `b`; 0 where one of them is constant."""
    require(a.shape == b.shape, f"shapes {tuple(a.shape)} and {tuple(b.shape)} differ", DataError)
    return F.cosine_similarity(a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True), dim=1)


def dist(
    teacher: Float[Tensor, "n classes"], student: Float[Tensor, "n classes"],
    beta: float = 1.0, gamma: float = 1.0, temperature: float = 1.0,
) -> Float[Tensor, ""]:
    """DIST (Huang et al. 2022, equations 6 to 10): T^2 (beta inter + gamma intra), where inter is 1 - the correlation
    of the class probabilities of a sample, mean over samples, and intra that of the samples of a class, mean over
    classes."""
    require(temperature > 0, f"temperature must be positive, not {temperature}")
    p, q = (F.softmax(z / temperature, 1) for z in (teacher, student))
    inter, intra = 1 - correlation(p, q).mean(), 1 - correlation(p.T, q.T).mean()
    return temperature**2 * (beta * inter + gamma * intra)
