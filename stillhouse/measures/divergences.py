"""Divergences between two categorical (or Bernoulli) distributions given as logits, reference first.

Every measure takes logits `p` and `q` of one shape [..., classes], sums over classes, and reduces over the leading
dimensions ("samples": pictures, pixels, token positions):

- `weight` multiplies each sample, `mask` says which samples count; both have the shape of the leading dimensions, or
  of the first few of them. "mean" divides by the number of samples that count, never by the sum of the weights, so a
  weight of 2 doubles a sample's gradient. With an empty mask the mean is 0.
- "sum" is for means over a data-dependent count (`run.mean(sum, count)`), "none" returns the value per sample, zero
  where masked.
- `temperature` T divides both logits; the result is multiplied by T squared (Hinton et al. 2015, section 2), which
  keeps the size of the gradient.

Mixtures are formed in the log domain; a logit of -inf is a probability of exactly 0. Half precision is computed in
float32.
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from stillhouse.errors import DataError, require

Reduction = Literal["mean", "sum", "none"]
Logits = Float[Tensor, "*batch classes"]


def reduce_samples(
    values: Float[Tensor, "*batch"],
    weight: Tensor | None = None,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """Reduce one value per sample as the module's docstring says. Raises ConfigError for an unknown reduction and
    DataError for a weight or mask whose shape is not that of the leading dimensions of `values`."""
    require(reduction in ("mean", "sum", "none"), f"reduction is 'mean', 'sum' or 'none', not {reduction!r}")
    if weight is not None:
        values = values * _over_samples("weight", weight, values).to(values.dtype)
    if mask is None:
        return values if reduction == "none" else values.sum() if reduction == "sum" else values.mean()
    counted = _over_samples("mask", mask, values).bool()
    values = torch.where(counted, values, torch.zeros_like(values))
    if reduction == "none":
        return values
    return values.sum() if reduction == "sum" else values.sum() / counted.sum().clamp(min=1)


def _over_samples(name: str, given: Tensor, values: Tensor) -> Tensor:
    leading = values.shape[:given.ndim]
    require(given.ndim <= values.ndim and given.shape == leading, f"{name} has shape {tuple(given.shape)}, expected "
            f"{tuple(values.shape)} (the samples) or its first dimensions", DataError)
    return given.reshape(given.shape + (1,) * (values.ndim - given.ndim)).expand(values.shape)


def log_probs(logits: Logits, temperature: float = 1.0) -> Logits:
    """log softmax(logits / temperature), in float32 at least. Raises ConfigError unless temperature > 0."""
    require(temperature > 0, f"temperature must be positive, not {temperature}")
    if logits.dtype in (torch.float16, torch.bfloat16):
        logits = logits.float()
    return F.log_softmax(logits if temperature == 1 else logits / temperature, -1)


def log_mixture(log_p: Logits, log_q: Logits, alpha: float) -> Logits:
    """log(alpha p + (1 - alpha) q) from log p and log q; exact at alpha = 0 and 1. Raises ConfigError unless
    0 <= alpha <= 1."""
    require(0 <= alpha <= 1, f"alpha is the share of the first distribution, between 0 and 1, not {alpha}")
    if alpha == 1:
        return log_p
    if alpha == 0:
        return log_q
    nowhere = torch.isneginf(log_p) & torch.isneginf(log_q)
    weights = torch.tensor([alpha, 1 - alpha], dtype=torch.float64).log().tolist()
    mixed = torch.logaddexp(log_p.masked_fill(nowhere, 0.0) + weights[0], log_q.masked_fill(nowhere, 0.0) + weights[1])
    return mixed.masked_fill(nowhere, -torch.inf)


def kl_of_logs(log_p: Logits, log_q: Logits) -> Float[Tensor, "*batch"]:
    """sum_c p_c (log p_c - log q_c), with 0 log 0 = 0, per sample; nothing is normalised."""
    gap = (log_p - log_q).masked_fill(torch.isneginf(log_p), 0.0)
    return (log_p.exp() * gap).sum(-1)


def _pair(p: Tensor, q: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    require(p.shape == q.shape, f"p has shape {tuple(p.shape)} and q {tuple(q.shape)}: a divergence compares logits "
            "over the same samples and classes", DataError)
    return log_probs(p, temperature), log_probs(q, temperature)


def kl(
    p: Logits, q: Logits, temperature: float = 1.0, *,
    weight: Tensor | None = None, mask: Tensor | None = None, reduction: Reduction = "mean",
) -> Tensor:
    """KL(p || q) = sum_c p_c log(p_c / q_c), times temperature squared. The reverse KL is `kl(q, p)`."""
    log_p, log_q = _pair(p, q, temperature)
    return reduce_samples(temperature**2 * kl_of_logs(log_p, log_q), weight, mask, reduction)


def js(
    p: Logits, q: Logits, temperature: float = 1.0, *,
    weight: Tensor | None = None, mask: Tensor | None = None, reduction: Reduction = "mean",
) -> Tensor:
    """Jensen-Shannon: 1/2 KL(p || m) + 1/2 KL(q || m), m = (p + q) / 2 (Lin 1991); between 0 and ln 2 at T = 1."""
    return generalized_jsd(p, q, 0.5, temperature, weight=weight, mask=mask, reduction=reduction)


def jeffreys(
    p: Logits, q: Logits, temperature: float = 1.0, *,
    weight: Tensor | None = None, mask: Tensor | None = None, reduction: Reduction = "mean",
) -> Tensor:
    """KL(p || q) + KL(q || p), the sum (not its half), times temperature squared."""
    log_p, log_q = _pair(p, q, temperature)
    values = temperature**2 * (kl_of_logs(log_p, log_q) + kl_of_logs(log_q, log_p))
    return reduce_samples(values, weight, mask, reduction)


def skew_kl(
    p: Logits, q: Logits, alpha: float = 0.1, temperature: float = 1.0, *,
    weight: Tensor | None = None, mask: Tensor | None = None, reduction: Reduction = "mean",
) -> Tensor:
    """KL(p || alpha p + (1 - alpha) q) (DistiLLM, Ko et al. 2024, section 3.1), with the entropy of p.

    alpha = 0 is KL(p || q), alpha = 1 is 0; never above -log alpha. Its gradient in q_c is at most (1 - alpha) / alpha.
    """
    log_p, log_q = _pair(p, q, temperature)
    values = temperature**2 * kl_of_logs(log_p, log_mixture(log_p, log_q, alpha))
    return reduce_samples(values, weight, mask, reduction)


def skew_reverse_kl(
    p: Logits, q: Logits, alpha: float = 0.1, temperature: float = 1.0, *,
    weight: Tensor | None = None, mask: Tensor | None = None, reduction: Reduction = "mean",
) -> Tensor:
    """KL(q || (1 - alpha) p + alpha q) (DistiLLM, Ko et al. 2024, section 3.1): `skew_kl` with p and q swapped."""
    return skew_kl(q, p, alpha, temperature, weight=weight, mask=mask, reduction=reduction)


def generalized_jsd(
    p: Logits, q: Logits, beta: float = 0.5, temperature: float = 1.0, *,
    weight: Tensor | None = None, mask: Tensor | None = None, reduction: Reduction = "mean",
) -> Tensor:
    """beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q (GKD, Agarwal et al. 2024, equation 1).

    Divided by beta it tends to KL(p || q) as beta -> 0; beta = 1/2 is the Jensen-Shannon divergence.
    """
    log_p, log_q = _pair(p, q, temperature)
    log_m = log_mixture(log_p, log_q, beta)
    values = temperature**2 * (beta * kl_of_logs(log_p, log_m) + (1 - beta) * kl_of_logs(log_q, log_m))
    return reduce_samples(values, weight, mask, reduction)


def total_variation(
    p: Logits, q: Logits, *,
    weight: Tensor | None = None, mask: Tensor | None = None, reduction: Reduction = "mean",
) -> Tensor:
    """1/2 sum_c |p_c - q_c|, between 0 and 1."""
    log_p, log_q = _pair(p, q)
    return reduce_samples((log_p.exp() - log_q.exp()).abs().sum(-1) / 2, weight, mask, reduction)


def soft_cross_entropy(
    p: Logits, q: Logits, temperature: float = 1.0, *,
    weight: Tensor | None = None, mask: Tensor | None = None, reduction: Reduction = "mean",
) -> Tensor:
    """-sum_c p_c log q_c = KL(p || q) + H(p), times temperature squared. At p = q it is the entropy, not 0."""
    log_p, log_q = _pair(p, q, temperature)
    terms = log_p.exp() * log_q.masked_fill(torch.isneginf(log_p), 0.0)
    return reduce_samples(-(temperature**2) * terms.sum(-1), weight, mask, reduction)


def signed_cross_entropy(
    target: Float[Tensor, "*batch classes"], q: Logits, *,
    weight: Tensor | None = None, mask: Tensor | None = None, reduction: Reduction = "mean",
) -> Tensor:
    """-sum_c target_c log q_c for any real weights `target` (probabilities, or signed); q are logits."""
    require(target.shape == q.shape, f"target has shape {tuple(target.shape)} and q {tuple(q.shape)}", DataError)
    log_q = log_probs(q).masked_fill(target == 0, 0.0)
    return reduce_samples(-(target * log_q).sum(-1), weight, mask, reduction)


def binary_kl(
    p: Logits, q: Logits, temperature: float = 1.0, *,
    weight: Tensor | None = None, mask: Tensor | None = None, reduction: Reduction = "mean",
) -> Tensor:
    """KL between the Bernoulli distributions sigmoid(p_c / T) and sigmoid(q_c / T), summed over classes, times T^2."""
    require(p.shape == q.shape, f"p has shape {tuple(p.shape)} and q {tuple(q.shape)}", DataError)
    require(temperature > 0, f"temperature must be positive, not {temperature}")
    p, q = (x.float() if x.dtype in (torch.float16, torch.bfloat16) else x for x in (p, q))
    p, q = p / temperature, q / temperature
    yes, no = ((F.logsigmoid(sign * p), F.logsigmoid(sign * q)) for sign in (1, -1))
    values = kl_of_logs(torch.stack([yes[0], no[0]], -1), torch.stack([yes[1], no[1]], -1)).sum(-1)
    return reduce_samples(temperature**2 * values, weight, mask, reduction)
