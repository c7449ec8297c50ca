"""Divergences of language models straight from their last hidden states, without ever holding all logits.

With hidden states h and the output projection W, the logits are z = W h. The functions here go through the positions
in chunks, form the logits of student and teacher for one chunk, add its divergence and, in the same pass, its gradient
on the student's h and W by hand; nothing of the size [positions, vocabulary] outlives a chunk. Values and gradients are
those of `stillhouse.measures.divergences` on the whole logits. With a = q * dD/dq entrywise, where p and q are the
probabilities of teacher and student at temperature T,

    d(T^2 D)/dz = T (a - q sum(a)).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from stillhouse.errors import DataError, require

Kind = Literal["kl", "reverse_kl", "skew_kl", "skew_reverse_kl", "jsd"]
Tail = Literal["renormalise", "bucket"]
Rows = Callable[[Tensor, slice], tuple[Tensor, Tensor]]
CHUNK_ENTRIES = 1 << 22
LOWEST = -1e30


def projected_divergence(
    teacher_hidden: Float[Tensor, "*batch d_teacher"],
    teacher_weight: Float[Tensor, "vocabulary d_teacher"],
    student_hidden: Float[Tensor, "*batch d_student"],
    student_weight: Float[Tensor, "vocabulary d_student"],
    kind: Kind = "kl",
    alpha: float = 0.5,
    temperature: float = 1.0,
    weight: Float[Tensor, "*batch"] | None = None,
    reduction: Literal["mean", "sum"] = "mean",
    chunk: int | None = None,
) -> Float[Tensor, ""]:
    """D(p, q) of all positions for p = softmax(W_t h_t / T) and q = softmax(W_s h_s / T), times T squared.

    `kind`: kl KL(p || q); reverse_kl KL(q || p); skew_kl KL(p || alpha p + (1 - alpha) q); skew_reverse_kl KL(q ||
    (1 - alpha) p + alpha q); jsd alpha KL(p || m) + (1 - alpha) KL(q || m), m = alpha p + (1 - alpha) q. `weight`
    multiplies each position (0 leaves it out and saves its work); "mean" divides by the number of positions with a
    weight that is not 0. Only the student's hidden states and weight get gradients. `chunk` is the number of positions
    at a time, by default so many that a chunk has 4 million logits.

    Raises DataError where shapes or vocabularies do not fit, ConfigError for a setting out of range.
    """
    require(kind in get_args(Kind), f"kind is one of {', '.join(get_args(Kind))}, not {kind!r}")
    low = 0 <= alpha < 1 if kind.startswith("skew") else 0 < alpha < 1
    require(kind in ("kl", "reverse_kl") or low, f"alpha lies between 0 and 1, not {alpha}")
    _matching(teacher_hidden, teacher_weight, "teacher")
    require(len(teacher_weight) == len(student_weight), f"the teacher has {len(teacher_weight)} vocabulary entries and "
            f"the student {len(student_weight)}: a divergence per token needs one vocabulary. Give models that share a "
            "tokenizer, or distil through answers written by the teacher", DataError)
    require(teacher_hidden.shape[:-1] == student_hidden.shape[:-1], f"hidden states of the teacher "
            f"{tuple(teacher_hidden.shape)} and student {tuple(student_hidden.shape)} differ in their positions",
            DataError)
    kept, weights = _positions(student_hidden, weight, reduction)
    with torch.no_grad():
        reference = teacher_hidden.reshape(-1, teacher_hidden.shape[-1])[kept].float()
        projection = teacher_weight.float()

    def rows(log_q: Tensor, at: slice) -> tuple[Tensor, Tensor]:
        log_p = _log_softmax(reference[at] @ projection.T, temperature).clamp_min_(LOWEST)
        return _FORMS[kind](log_p, log_q, alpha)

    return _apply(rows, student_hidden, student_weight, kept, weights, temperature, chunk)


def projected_topk_kl(
    log_p: Float[Tensor, "*batch k"],
    index: Int[Tensor, "*batch k"],
    student_hidden: Float[Tensor, "*batch d_student"],
    student_weight: Float[Tensor, "vocabulary d_student"],
    tail: Tail = "renormalise",
    temperature: float = 1.0,
    weight: Float[Tensor, "*batch"] | None = None,
    reduction: Literal["mean", "sum"] = "mean",
    chunk: int | None = None,
) -> Float[Tensor, ""]:
    """KL(p || q), times T squared, where of the teacher only the k largest log-probabilities at temperature T are
    known, `log_p` at the vocabulary entries `index` (all different within a position).

    `tail`: "renormalise" makes the k probabilities sum to 1; "bucket" keeps the rest of p as one more outcome, which
    is compared with the rest of q. See `projected_divergence` for the other arguments and the errors.
    """
    require(tail in get_args(Tail), f"tail is one of {', '.join(get_args(Tail))}, not {tail!r}")
    require(log_p.shape == index.shape and log_p.shape[:-1] == student_hidden.shape[:-1], f"log_p "
            f"{tuple(log_p.shape)}, index {tuple(index.shape)} and the student's positions "
            f"{tuple(student_hidden.shape[:-1])} do not fit", DataError)
    require(index.numel() == 0 or 0 <= int(index.min()) <= int(index.max()) < len(student_weight), "index names "
            f"entries outside of the student's vocabulary of {len(student_weight)}", DataError)
    kept, weights = _positions(student_hidden, weight, reduction)
    known = log_p.reshape(-1, log_p.shape[-1])[kept].float()
    places = index.reshape(-1, index.shape[-1])[kept]

    def rows(log_q: Tensor, at: slice) -> tuple[Tensor, Tensor]:
        lp, where = known[at], places[at]
        lq = log_q.gather(1, where)
        if tail == "renormalise":
            lp = lp - lp.logsumexp(1, keepdim=True)
            a = torch.zeros_like(log_q)
            value = (lp.exp() * (lp - lq)).sum(1)
        else:
            rest_p, rest_q = ((1 - x.exp().sum(1, keepdim=True)).clamp_min(1e-12) for x in (lp, lq))
            value = (lp.exp() * (lp - lq)).sum(1) + (rest_p * (rest_p / rest_q).log()).squeeze(1)
            a = log_q.exp().mul_(-rest_p / rest_q)
        return value, a.scatter_(1, where, -lp.exp())

    return _apply(rows, student_hidden, student_weight, kept, weights, temperature, chunk)


def _kl(log_p: Tensor, log_q: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    p = log_p.exp()
    return (p * (log_p - log_q)).sum(1), p.neg_()


def _reverse_kl(log_p: Tensor, log_q: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    a = log_q.exp().mul_(log_q - log_p)
    return a.sum(1), a


def _skew_kl(log_p: Tensor, log_q: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    p, q = log_p.exp(), log_q.exp()
    m = _mixture(p, q, alpha)
    value = (p * (log_p - m.log())).sum(1)
    return value, q.mul_(p).div_(m).mul_(alpha - 1)


def _skew_reverse_kl(log_p: Tensor, log_q: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    p, q = log_p.exp(), log_q.exp()
    m = _mixture(q, p, alpha)
    terms = q * (log_q - m.log())
    return terms.sum(1), terms.add_(q).sub_(q.square().mul_(alpha).div_(m))


def _jsd(log_p: Tensor, log_q: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    p, q = log_p.exp(), log_q.exp()
    log_m = _mixture(p, q, alpha).log_()
    a = q.mul_(log_q - log_m).mul_(1 - alpha)
    return p.mul_(log_p - log_m).sum(1).mul_(alpha) + a.sum(1), a


def _mixture(first: Tensor, second: Tensor, alpha: float) -> Tensor:
    return (first * alpha).add_(second, alpha=1 - alpha).clamp_min_(torch.finfo(first.dtype).tiny)


_FORMS: dict[str, Callable[[Tensor, Tensor, float], tuple[Tensor, Tensor]]] = {
    "kl": _kl, "reverse_kl": _reverse_kl, "skew_kl": _skew_kl, "skew_reverse_kl": _skew_reverse_kl, "jsd": _jsd}
"""From log p and log q [positions, vocabulary]: the divergence of each position, and a = q * dD/dq."""


def _log_softmax(logits: Tensor, temperature: float) -> Tensor:
    if temperature != 1:
        logits.div_(temperature)
    return logits.sub_(logits.logsumexp(1, keepdim=True))


class _Projected(torch.autograd.Function):
    """Sum over positions of weight * T^2 * D, with the gradient found on the way and kept until it is asked for."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, projection: Tensor, rows: Rows, weights: Tensor, temperature: float,
                chunk: int) -> Tensor:
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        total = hidden.new_zeros(())
        d_hidden = torch.zeros_like(hidden) if wants_hidden else None
        d_weight = torch.zeros_like(projection) if wants_weight else None
        for start in range(0, len(hidden), chunk):
            at = slice(start, start + chunk)
            h = hidden[at]
            log_q = _log_softmax(h @ projection.T, temperature)
            value, a = rows(log_q, at)
            total += temperature**2 * (value * weights[at]).sum()
            if wants_hidden or wants_weight:
                a.addcmul_(log_q.exp_(), a.sum(1, keepdim=True), value=-1)
                a.mul_((temperature * weights[at])[:, None])
                if d_hidden is not None:
                    torch.mm(a, projection, out=d_hidden[at])
                if d_weight is not None:
                    d_weight.addmm_(a.T, h)
        ctx.save_for_backward(d_hidden, d_weight)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        d_hidden, d_weight = (None if d is None else d * grad for d in ctx.saved_tensors)
        return d_hidden, d_weight, None, None, None, None


def _apply(rows: Rows, hidden: Tensor, projection: Tensor, kept: Tensor, weights: Tensor, temperature: float,
           chunk: int | None) -> Tensor:
    require(temperature > 0, f"temperature must be positive, not {temperature}")
    require(chunk is None or chunk >= 1, f"chunk must be 1 or more, not {chunk}")
    _matching(hidden, projection, "student")
    size = chunk or max(1, math.ceil(CHUNK_ENTRIES / len(projection)))
    flat = hidden.reshape(-1, hidden.shape[-1])[kept].float()
    with torch.autocast(hidden.device.type, enabled=False):
        return _Projected.apply(flat, projection.float(), rows, weights.to(flat), temperature, size)


def _matching(hidden: Tensor, projection: Tensor, who: str) -> None:
    require(projection.dim() == 2 and hidden.shape[-1] == projection.shape[1], f"the {who}'s hidden states have "
            f"{hidden.shape[-1]} features and its projection is {tuple(projection.shape)}, expected [vocabulary, "
            f"{hidden.shape[-1]}]", DataError)


def _positions(hidden: Tensor, weight: Tensor | None, reduction: str) -> tuple[Tensor, Tensor]:
    """Flat places of the positions that count, and their weights with the reduction in them."""
    require(reduction in ("mean", "sum"), f"reduction is 'mean' or 'sum', not {reduction!r}")
    count = hidden.shape[:-1].numel()
    if weight is None:
        kept = torch.arange(count, device=hidden.device)
        weights = torch.ones(count, device=hidden.device, dtype=torch.double)
    else:
        require(weight.shape == hidden.shape[:-1], f"weight has shape {tuple(weight.shape)}, expected "
                f"{tuple(hidden.shape[:-1])}", DataError)
        kept = weight.reshape(-1).nonzero().flatten()
        weights = weight.reshape(-1)[kept].double()
    return kept, weights / max(len(kept), 1) if reduction == "mean" else weights
