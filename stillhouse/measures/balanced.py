"""Both directions of the KL divergence at once, weighed for each sample by which of two models is the surer of it."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from stillhouse.errors import DataError, require
from stillhouse.measures.divergences import Logits, Reduction, kl_of_logs, log_probs, reduce_samples

Gate = Literal["entropy", "opposite"]


def entropy(logits: Logits, temperature: float = 1.0) -> Float[Tensor, "*batch"]:
    """H(p) = -sum_c p_c log p_c of p = softmax(logits / temperature), in nats, per sample; 0 log 0 = 0."""
    log_p = log_probs(logits, temperature)
    return -(log_p.exp() * log_p.masked_fill(torch.isneginf(log_p), 0.0)).sum(-1)


def surer_than(student: Logits, teacher: Logits, temperature: float = 1.0) -> Bool[Tensor, "*batch"]:
    """Whether H(teacher) > H(student), both tempered: the student is the surer. Equal entropies count as no."""
    return entropy(teacher, temperature) > entropy(student, temperature)


def balance(student: Logits, teacher: Logits, beta: float = 2.0, temperature: float = 1.0, gate: Gate = "entropy",
            normalise: bool = False) -> tuple[Float[Tensor, "*batch"], Float[Tensor, "*batch"]]:
    """The weights (w, v) of the forward and of the reverse KL, per sample, without gradient.

    (beta, 1) where the student is the surer of the two, (1, beta) elsewhere; gate "opposite" swaps them. `normalise`
    divides both by 1 + beta. Raises ConfigError for beta below 1.
    """
    require(beta >= 1, f"beta must be 1 or more, not {beta}")
    require(gate in ("entropy", "opposite"), f"gate is 'entropy' or 'opposite', not {gate!r}")
    with torch.no_grad():
        forward = surer_than(student, teacher, temperature) == (gate == "entropy")
        w = torch.where(forward, beta, 1.0) / ((1 + beta) if normalise else 1)
        v = torch.where(forward, 1.0, beta) / ((1 + beta) if normalise else 1)
    return w, v


def balanced_kl(
    p: Logits, q: Logits, beta: float = 2.0, temperature: float = 1.0, *, forward: float = 1.0, reverse: float = 1.0,
    gate: Gate = "entropy", normalise: bool = False, reduction: Reduction = "mean",
) -> Tensor:
    """T^2 (forward w KL(p || q) + reverse v KL(q || p)) with the weights of `balance` (BD-KD, Amara et al. 2022).

    p are the teacher's logits and q the student's. beta = 1 gives `jeffreys`; with reverse = 0 as well it is `kl`.
    """
    require(p.shape == q.shape, f"p has shape {tuple(p.shape)} and q {tuple(q.shape)}: a divergence compares logits "
            "over the same samples and classes", DataError)
    w, v = balance(q, p, beta, temperature, gate, normalise)
    log_p, log_q = log_probs(p, temperature), log_probs(q, temperature)
    values = torch.zeros_like(w, dtype=log_q.dtype)
    if forward:
        values = values + forward * w * kl_of_logs(log_p, log_q)
    if reverse:
        values = values + reverse * v * kl_of_logs(log_q, log_p)
    return reduce_samples(temperature**2 * values, reduction=reduction)
