"""Measures of class logits beyond the plain divergence: decoupled distillation and correlations."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
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


def enhanced_target(
    teacher: Float[Tensor, "n classes"], label: Int[Tensor, " n"], eps: float = 1.0, temperature: float = 1.0,
) -> Float[Tensor, "n classes"]:
    """w_c = (p_c + 1[c = y])^eps - 1[c = y] with p = softmax(z_t / T): adaptive target enhancement (OFA, Hao et al.
    2023, equation 5).

    eps = 1 is p itself; above 1 the label gains and the other classes lose. With the 1 of a cross-entropy the label's
    whole weight is (1 + p_y)^eps.
    """
    require(eps > 0, f"eps is an exponent above 0, not {eps}")
    own = F.one_hot(label, teacher.shape[1])
    return (log_probs(teacher, temperature).exp() + own).pow(eps) - own


def enhanced_cross_entropy(
    teacher: Float[Tensor, "n classes"], student: Float[Tensor, "n classes"], label: Int[Tensor, " n"],
    eps: float = 1.0, temperature: float = 1.0,
) -> Float[Tensor, ""]:
    """OFA's loss: -sum_c w_c log q_c with `enhanced_target` w and q = softmax(z_s / T), mean over samples (Hao et al.
    2023, equation 5). Not multiplied by the temperature squared; at eps = 1 it is the soft cross-entropy."""
    require(teacher.shape == student.shape, f"teacher {tuple(teacher.shape)} and student {tuple(student.shape)} differ "
            "in shape", DataError)
    w = enhanced_target(teacher, label, eps, temperature)
    return -(w * log_probs(student, temperature)).sum(1).mean()


def logit_adjusted(
    logits: Float[Tensor, "*batch classes"], counts: Tensor, exponent: float = 1.0
) -> Float[Tensor, "*batch classes"]:
    """z_c + exponent log n_c: logits adjusted by how often each class occurs, `counts` [classes], all above 0.

    The cross-entropy of them at exponent 1 is balanced softmax (Ren et al. 2020), -log n_y e^{z_y} / sum_c n_c e^{z_c};
    z then favours rare classes, and the more so the larger the exponent; a negative one makes it favour frequent ones.
    Counts that are all multiplied by a constant give the same probabilities.
    """
    return logits + exponent * counts.to(logits).log() if exponent else logits


def self_consistency(
    weak: Float[Tensor, "*models batch classes"], strong: Float[Tensor, "*models batch classes"],
    label: Int[Tensor, " batch"],
) -> tuple[Float[Tensor, "*models batch"], Bool[Tensor, "*models batch"]]:
    """KL(softmax(weak) || softmax(strong)) of each model with itself on two views, `weak` being a constant; and where
    the weak view is right, for a mean over those samples alone (Zhao et al. 2023, confident instance sampling)."""
    weak = weak.detach()
    return kl_of_logs(log_probs(weak), log_probs(strong)), weak.argmax(-1) == label


def confidence_weighted(
    teacher: Float[Tensor, "n classes"], student: Float[Tensor, "n classes"], label: Int[Tensor, " n"]
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """CWTM (Furlanello et al. 2018, section 3.2) as (sum, weight): the cross-entropy of the labels, each sample
    multiplied by the teacher's largest probability, and the sum of these. Their quotient is sum_s w_s CE_s with weights
    that add up to 1 over the batch (`confidence_weights`)."""
    largest = log_probs(teacher).amax(1).exp()
    each = F.cross_entropy(student, label, reduction="none")
    return (largest * each).sum(), largest.sum()


def confidence_weights(teacher: Float[Tensor, "n classes"]) -> Float[Tensor, " n"]:
    """w_s = max_c p_s,c / sum_u max_c p_u,c: a teacher's confidence as importance weights, which add up to 1."""
    return log_probs(teacher).amax(1).softmax(0)


def permuted_target(teacher: Float[Tensor, "n classes"], u: Float[Tensor, "n others"]) -> Float[Tensor, "n classes"]:
    """DKPP (Furlanello et al. 2018, section 3.2): the teacher's probabilities with those of all classes but its
    likeliest exchanged at random: its confidence stays, what it says of similar classes is destroyed.

    `u` are uniform draws, one for each class but one; their order is the permutation.
    """
    n, classes = teacher.shape
    require(tuple(u.shape) == (n, classes - 1), f"u must be [{n}, {classes - 1}], a number for every class but one; it "
            f"is {tuple(u.shape)}", DataError)
    p = log_probs(teacher).exp()
    others = torch.arange(classes - 1, device=p.device).expand(n, -1)
    others = others + (others >= p.argmax(1, keepdim=True))
    return p.scatter(1, others, p.gather(1, others).gather(1, u.argsort(1)))
