"""Divergences of language models straight from their last hidden states, without ever holding all logits.

With hidden states h and the output projection W, the logits are z = W h. The functions here go through the positions
in chunks, form the logits of student and teacher for one chunk, add its divergence and, in the same pass, its gradient
on the student's h and W by hand; nothing of the size [positions, vocabulary] outlives a chunk. Values and gradients are
those of `stillhouse.measures.divergences` on the whole logits. With a = q * dD/dq entrywise, where p and q are the
probabilities of teacher and student at temperature T,

    d(T^2 D)/dz = T (a - q sum(a)).

A chunk is never normalised: of each row only its e = exp(z - max z) and their sum are kept, so p and q are e / sum, and
whatever is constant in a row is multiplied into the small matrices [chunk, d] before the products.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from stillhouse.errors import DataError, StillError, require
from stillhouse.measures import divergences

Kind = Literal["kl", "reverse_kl", "js", "jeffreys", "total_variation", "skew_kl", "skew_reverse_kl",
               "generalized_jsd", "jsd"]
Tail = Literal["renormalise", "bucket"]
Reduction = Literal["mean", "sum"]
CHUNK_ENTRIES = {"cpu": 1 << 22}
"""Logits of a chunk; on other devices than these, which want more work at once, eight times those of a cpu."""


class _Softmax(NamedTuple):
    """Of a chunk: the logits z less the largest of their row, e = exp(z), and the rows' sums of e [chunk, 1]."""

    z: Tensor
    e: Tensor
    total: Tensor


class _Found(NamedTuple):
    """Of a chunk: D [chunk, 1], and a - q sum(a) as scale [chunk, 1] times slope [chunk, vocabulary]."""

    value: Tensor
    slope: Tensor
    scale: Tensor


Rows = Callable[[_Softmax, slice, list[Tensor]], _Found]
"""What a chunk gives, from the student's probabilities, the places of its positions and spare room of their size."""


def projected_divergence(
    teacher_hidden: Float[Tensor, "*batch d_teacher"],
    teacher_weight: Float[Tensor, "vocabulary d_teacher"],
    student_hidden: Float[Tensor, "*batch d_student"],
    student_weight: Float[Tensor, "vocabulary d_student"],
    kind: Kind = "kl",
    alpha: float = 0.5,
    temperature: float = 1.0,
    weight: Float[Tensor, "*batch"] | None = None,
    reduction: Reduction = "mean",
    chunk: int | None = None,
) -> Float[Tensor, ""]:
    """D(p, q) of all positions for p = softmax(W_t h_t / T) and q = softmax(W_s h_s / T), times T squared.

    `kind`: kl KL(p || q); reverse_kl KL(q || p); jeffreys the sum of these two; total_variation 1/2 sum |p - q|;
    skew_kl KL(p || alpha p + (1 - alpha) q); skew_reverse_kl KL(q || (1 - alpha) p + alpha q); generalized_jsd (or
    jsd) alpha KL(p || m) + (1 - alpha) KL(q || m), m = alpha p + (1 - alpha) q; js the same at alpha = 1/2. `weight`
    multiplies each position (0 leaves it out and saves its work); "mean" divides by the number of positions with a
    weight that is not 0. Only the student's hidden states and weight get gradients. Half precision is computed in
    float32. `chunk` is the number of positions at a time, by default so many that a chunk has 4 million logits.

    Raises DataError where shapes or vocabularies do not fit, ConfigError for a setting out of range.
    """
    _check_kind(kind, alpha)
    _matching(teacher_hidden, teacher_weight, "teacher")
    same_vocabulary(len(teacher_weight), len(student_weight), DataError)
    require(teacher_hidden.shape[:-1] == student_hidden.shape[:-1], f"hidden states of the teacher "
            f"{tuple(teacher_hidden.shape)} and student {tuple(student_hidden.shape)} differ in their positions",
            DataError)
    kept, weights = _positions(student_hidden, weight, reduction)
    precision = _wide(student_hidden)
    with torch.no_grad():
        reference = teacher_hidden.reshape(-1, teacher_hidden.shape[-1])[kept].to(precision)
        projection = teacher_weight.to(precision)
    form = _form(kind, alpha)

    def rows(q: _Softmax, at: slice, room: list[Tensor]) -> _Found:
        return form(_softmax(reference[at], projection, temperature, *room[:2]), q, room[2])

    return _apply(rows, 3, student_hidden, student_weight, kept, weights, temperature, chunk)


def projected_cross_entropy(
    target: Int[Tensor, "*batch"],
    student_hidden: Float[Tensor, "*batch d_student"],
    student_weight: Float[Tensor, "vocabulary d_student"],
    weight: Float[Tensor, "*batch"] | None = None,
    reduction: Reduction = "mean",
    chunk: int | None = None,
) -> Float[Tensor, ""]:
    """-log q(target) of all positions in nats: KL(p || q) where p is sure of one entry. See `projected_divergence`.

    Targets are read only where `weight` is not 0. Raises DataError for a target outside of the vocabulary.
    """
    require(target.shape == student_hidden.shape[:-1], f"targets {tuple(target.shape)} and positions "
            f"{tuple(student_hidden.shape[:-1])} differ", DataError)
    kept, weights = _positions(student_hidden, weight, reduction)
    places = target.reshape(-1)[kept][:, None]
    _inside("target", places, len(student_weight))

    def rows(q: _Softmax, at: slice, room: list[Tensor]) -> _Found:
        where = places[at]
        value = q.total.log() - q.z.gather(1, where)
        return _Found(value, q.e.scatter_(1, where, q.e.gather(1, where) - q.total), 1 / q.total)

    return _apply(rows, 0, student_hidden, student_weight, kept, weights, 1.0, chunk)


def projected_topk_divergence(
    log_p: Float[Tensor, "*batch k"],
    index: Int[Tensor, "*batch k"],
    student_hidden: Float[Tensor, "*batch d_student"],
    student_weight: Float[Tensor, "vocabulary d_student"],
    kind: Kind = "kl",
    alpha: float = 0.5,
    temperature: float = 1.0,
    weight: Float[Tensor, "*batch"] | None = None,
    reduction: Reduction = "mean",
    chunk: int | None = None,
) -> Float[Tensor, ""]:
    """D on k + 1 outcomes, times T squared, where of the teacher only the k largest log-probabilities at temperature T
    are known, `log_p` at the vocabulary entries `index` (all different within a position).

    The outcomes are the known entries and one for all others together, so D is at most that of the whole distributions
    (data-processing inequality), and equal to it where all entries are known. An entry with log_p = -inf is not known,
    whatever its index; a position that knows none must have the weight 0. See `projected_divergence` for the other
    arguments and the errors.
    """
    _check_kind(kind, alpha)
    measure = plain_divergence(kind, alpha)
    return _topk(lambda p, q: measure(p, q, reduction="none"), log_p, index, student_hidden, student_weight,
                 temperature, weight, reduction, chunk)


def projected_topk_kl(
    log_p: Float[Tensor, "*batch k"],
    index: Int[Tensor, "*batch k"],
    student_hidden: Float[Tensor, "*batch d_student"],
    student_weight: Float[Tensor, "vocabulary d_student"],
    tail: Tail = "renormalise",
    temperature: float = 1.0,
    weight: Float[Tensor, "*batch"] | None = None,
    reduction: Reduction = "mean",
    chunk: int | None = None,
) -> Float[Tensor, ""]:
    """KL(p || q), times T squared, where of the teacher only the k largest log-probabilities at temperature T are
    known. `tail`: "renormalise" makes them sum to 1; "bucket" is `projected_topk_divergence`, which see.
    """
    require(tail in get_args(Tail), f"tail is one of {', '.join(get_args(Tail))}, not {tail!r}")

    def measure(p: Tensor, q: Tensor) -> Tensor:
        if tail == "renormalise":
            p = torch.cat([p[:, :-1].log_softmax(1), torch.full_like(p[:, -1:], -torch.inf)], 1)
        return divergences.kl(p, q, reduction="none")

    return _topk(measure, log_p, index, student_hidden, student_weight, temperature, weight, reduction, chunk)


def topk_divergence(
    log_p: Float[Tensor, "samples k"],
    index: Int[Tensor, "samples k"],
    logits: Float[Tensor, "samples vocabulary"],
    kind: Kind = "kl",
    alpha: float = 0.5,
    reduction: Literal["mean", "sum", "none"] = "mean",
) -> Tensor:
    """`projected_topk_divergence` from the student's whole logits, by ordinary backpropagation."""
    _check_kind(kind, alpha)
    logits = logits.to(_wide(logits))
    known = _outcomes(log_p.to(logits.dtype), index, logits.shape[1])
    log_q = logits.log_softmax(1)
    others = log_q.scatter(1, known.places, -torch.inf).logsumexp(1, keepdim=True).clamp_min(_lowest(log_q))
    q = torch.cat([log_q.gather(1, known.places).masked_fill(~known.real, -torch.inf),
                   others.masked_fill(known.whole, -torch.inf)], 1)
    return plain_divergence(kind, alpha)(known.log_p, q, reduction=reduction)


def plain_divergence(kind: Kind, alpha: float = 0.5) -> Callable[..., Tensor]:
    """The measure of `stillhouse.measures.divergences` that `kind` and `alpha` name: a function of logits, teacher
    first."""
    measures: dict[str, Callable[..., Tensor]] = {
        "kl": divergences.kl,
        "reverse_kl": lambda p, q, **options: divergences.kl(q, p, **options),
        "js": divergences.js,
        "jeffreys": divergences.jeffreys,
        "total_variation": divergences.total_variation,
        "skew_kl": partial(divergences.skew_kl, alpha=alpha),
        "skew_reverse_kl": partial(divergences.skew_reverse_kl, alpha=alpha),
        "generalized_jsd": partial(divergences.generalized_jsd, beta=alpha),
        "jsd": partial(divergences.generalized_jsd, beta=alpha),
    }
    return measures[kind]


def same_vocabulary(teacher: int, student: int, error: type[StillError] = DataError) -> None:
    """Raise `error`, with both sizes and what can be done, unless the two vocabularies have one size."""
    require(teacher == student, f"the teacher has {teacher} vocabulary entries and the student {student}: a divergence "
            "per token needs one vocabulary. Give models that share a tokenizer (the smaller ones of the teacher's "
            "family), or distil through answers written by the teacher: recipes.language.answered_by, then the "
            "student is fine-tuned on their text", error)


# ------------------------------------------------------------------ the divergences of a chunk


def _kl(p: _Softmax, q: _Softmax, room: Tensor) -> _Found:
    ratio = q.total / p.total
    value = _mean(p, p.z.sub_(q.z), room) + ratio.log()
    return _Found(value, q.e.addcmul_(p.e, -ratio), 1 / q.total)


def _reverse_kl(p: _Softmax, q: _Softmax, room: Tensor) -> _Found:
    gap = q.z.sub_(p.z)
    mean = _mean(q, gap, room)
    return _Found(mean - (q.total / p.total).log(), gap.sub_(mean).mul_(q.e), 1 / q.total)


def _jeffreys(p: _Softmax, q: _Softmax, room: Tensor) -> _Found:
    gap = q.z.sub_(p.z)
    mean = _mean(q, gap, room)
    value = mean - _mean(p, gap, room)
    return _Found(value, gap.sub_(mean - 1).mul_(q.e).addcmul_(p.e, -q.total / p.total), 1 / q.total)


def _total_variation(p: _Softmax, q: _Softmax, room: Tensor) -> _Found:
    gap = torch.addcmul(q.e, p.e, -q.total / p.total, out=room)
    value = torch.abs(gap, out=p.z).sum(1, keepdim=True) / (2 * q.total)
    sign = gap.sign_()
    return _Found(value, sign.sub_(_mean(q, sign, p.z)).mul_(q.e), 1 / (2 * q.total))


def _skew_kl(p: _Softmax, q: _Softmax, room: Tensor, alpha: float) -> _Found:
    ratio = q.total / p.total
    u = _mixture(p, q, ratio * (alpha / (1 - alpha)), room)
    share = torch.div(p.e, u, out=q.z)
    over = p.z.sub_(u.log_())
    value = _mean(p, over, room) + ratio.log() - math.log1p(-alpha)
    return _Found(value, share.sub_(_mean(q, share, room)).mul_(q.e), -1 / p.total)


def _skew_reverse_kl(p: _Softmax, q: _Softmax, room: Tensor, alpha: float) -> _Found:
    u = _mixture(p, q, q.total / p.total * ((1 - alpha) / alpha), room)
    share = torch.div(q.e, u, out=p.e)
    over = q.z.sub_(u.log_())
    value = _mean(q, over, room) - math.log(alpha)
    over.sub_(share)
    return _Found(value, over.sub_(_mean(q, over, room)).mul_(q.e), 1 / q.total)


def _jsd(p: _Softmax, q: _Softmax, room: Tensor, alpha: float) -> _Found:
    ratio = q.total / p.total
    log_u = _mixture(p, q, ratio * (alpha / (1 - alpha)), room).log_()
    over_p, over_q = p.z.sub_(log_u), q.z.sub_(log_u)
    mean = _mean(q, over_q, room)
    value = alpha * (_mean(p, over_p, room) + ratio.log()) + (1 - alpha) * mean - math.log1p(-alpha)
    return _Found(value, over_q.sub_(mean).mul_(q.e), (1 - alpha) / q.total)


def _nothing(p: _Softmax, q: _Softmax, room: Tensor) -> _Found:
    return _Found(torch.zeros_like(q.total), q.e.zero_(), torch.zeros_like(q.total))


def _form(kind: Kind, alpha: float) -> Callable[[_Softmax, _Softmax, Tensor], _Found]:
    """The divergence of a chunk, at the ends of alpha what it then is. All tensors given to it are overwritten."""
    if kind == "skew_kl" and alpha > 0:
        return _nothing if alpha == 1 else partial(_skew_kl, alpha=alpha)
    if kind == "skew_reverse_kl" and alpha > 0:
        return _nothing if alpha == 1 else partial(_skew_reverse_kl, alpha=alpha)
    if kind in ("generalized_jsd", "jsd"):
        return _nothing if alpha in (0, 1) else partial(_jsd, alpha=alpha)
    others: dict[str, Callable[[_Softmax, _Softmax, Tensor], _Found]] = {
        "kl": _kl, "skew_kl": _kl, "reverse_kl": _reverse_kl, "skew_reverse_kl": _reverse_kl, "jeffreys": _jeffreys,
        "total_variation": _total_variation, "js": partial(_jsd, alpha=0.5)}
    return others[kind]


def _mean(of: _Softmax, values: Tensor, room: Tensor) -> Tensor:
    """The mean of `values` under the probabilities of each row [chunk, 1]."""
    return torch.mul(of.e, values, out=room).sum(1, keepdim=True) / of.total


def _mixture(p: _Softmax, q: _Softmax, share: Tensor, room: Tensor) -> Tensor:
    """e_q + share * e_p, proportional to a mixture of the two in each row, and never 0."""
    return torch.addcmul(q.e, p.e, share, out=room).clamp_min_(torch.finfo(room.dtype).tiny)


def _softmax(hidden: Tensor, projection: Tensor, temperature: float, z: Tensor, e: Tensor) -> _Softmax:
    torch.mm(hidden if temperature == 1 else hidden / temperature, projection.T, out=z)
    z.sub_(z.amax(1, keepdim=True))
    torch.exp(z, out=e)
    return _Softmax(z, e, e.sum(1, keepdim=True))


# ------------------------------------------------------------------ the k known outcomes of a chunk


class _Known(NamedTuple):
    """What is known of the teacher [positions, …]: log p of k entries and of all others together, where they are (what
    is not `real` stands where the `first` real one is), and whether they are the `whole` vocabulary."""

    log_p: Tensor
    places: Tensor
    real: Tensor
    first: Tensor
    whole: Tensor


def _outcomes(log_p: Tensor, index: Tensor, vocabulary: int) -> _Known:
    real = log_p > -torch.inf
    require(bool(real.any(1).all()), "a position with a weight has no known outcome (log_p is -inf everywhere)",
            DataError)
    first = real.int().argmax(1, keepdim=True)
    places = torch.where(real, index, index.gather(1, first))
    _inside("index", places, vocabulary)
    whole = real.sum(1, keepdim=True) == vocabulary
    others = (1 - log_p.exp().sum(1, keepdim=True)).clamp_min(1e-12).log().masked_fill(whole, -torch.inf)
    return _Known(torch.cat([log_p, others], 1), places, real, first, whole)


def _lowest(like: Tensor) -> float:
    return math.log(torch.finfo(like.dtype).tiny)


def _topk(measure: Callable[[Tensor, Tensor], Tensor], log_p: Tensor, index: Tensor, hidden: Tensor,
          projection: Tensor, temperature: float, weight: Tensor | None, reduction: str, chunk: int | None) -> Tensor:
    require(log_p.shape == index.shape and log_p.shape[:-1] == hidden.shape[:-1], f"log_p "
            f"{tuple(log_p.shape)}, index {tuple(index.shape)} and the student's positions "
            f"{tuple(hidden.shape[:-1])} do not fit", DataError)
    kept, weights = _positions(hidden, weight, reduction)
    known = _outcomes(log_p.reshape(-1, log_p.shape[-1])[kept].to(_wide(hidden)),
                      index.reshape(-1, index.shape[-1])[kept], len(projection))

    def rows(q: _Softmax, at: slice, room: list[Tensor]) -> _Found:
        places, real = known.places[at], known.real[at]
        log_q = (q.z.gather(1, places) - q.total.log()).masked_fill(~real, -torch.inf)
        others = q.e.scatter_(1, places, 0.0).sum(1, keepdim=True) / q.total
        log_others = others.log().clamp_min(_lowest(others)).masked_fill(known.whole[at], -torch.inf)
        with torch.enable_grad():
            free = torch.cat([log_q, log_others], 1).requires_grad_()
            value = measure(known.log_p[at], free)
            slope, = torch.autograd.grad(value.sum(), free)
        on_known = torch.where(real, slope[:, :-1], slope.gather(1, known.first[at]))
        on_others = slope[:, -1:] * (-log_others).exp().masked_fill(known.whole[at], 0.0) / q.total
        return _Found(value.detach()[:, None], q.e.mul_(on_others).scatter_(1, places, on_known),
                      torch.ones_like(q.total))

    return _apply(rows, 0, hidden, projection, kept, weights, temperature, chunk)


# ------------------------------------------------------------------ going through the chunks


class _Projected(torch.autograd.Function):
    """Sum over positions of weight * T^2 * D, with the gradient found on the way and kept until it is asked for."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, projection: Tensor, rows: Rows, rooms: int, weights: Tensor,
                temperature: float, chunk: int) -> Tensor:
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        total = hidden.new_zeros(())
        d_hidden = torch.zeros_like(hidden) if wants_hidden else None
        d_weight = torch.zeros_like(projection) if wants_weight else None
        spare = [hidden.new_empty(min(chunk, len(hidden)), len(projection)) for _ in range(rooms + 2)]
        for start in range(0, len(hidden), chunk):
            at = slice(start, start + chunk)
            h = hidden[at]
            z, e, *room = (s[:len(h)] for s in spare)
            value, slope, scale = rows(_softmax(h, projection, temperature, z, e), at, room)
            total += temperature**2 * value.flatten().dot(weights[at])
            scale = scale * weights[at, None] * temperature
            if d_hidden is not None:
                torch.mm(slope, projection, out=d_hidden[at]).mul_(scale)
            if d_weight is not None:
                d_weight.addmm_(slope.T, h * scale)
        ctx.save_for_backward(d_hidden, d_weight)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        d_hidden, d_weight = (None if d is None else d * grad for d in ctx.saved_tensors)
        return d_hidden, d_weight, None, None, None, None, None


def _apply(rows: Rows, rooms: int, hidden: Tensor, projection: Tensor, kept: Tensor, weights: Tensor,
           temperature: float, chunk: int | None) -> Tensor:
    require(temperature > 0, f"temperature must be positive, not {temperature}")
    require(chunk is None or chunk >= 1, f"chunk must be 1 or more, not {chunk}")
    _matching(hidden, projection, "student")
    entries = CHUNK_ENTRIES.get(hidden.device.type, 8 * CHUNK_ENTRIES["cpu"])
    size = chunk or max(1, math.ceil(entries / len(projection)))
    flat = hidden.reshape(-1, hidden.shape[-1])[kept].to(_wide(hidden))
    with torch.autocast(hidden.device.type, enabled=False):
        return _Projected.apply(flat, projection.to(flat), rows, rooms, weights.to(flat), temperature, size)


def _wide(hidden: Tensor) -> torch.dtype:
    return torch.float64 if hidden.dtype == torch.float64 else torch.float32


def _check_kind(kind: str, alpha: float) -> None:
    require(kind in get_args(Kind), f"kind is one of {', '.join(get_args(Kind))}, not {kind!r}")
    require(0 <= alpha <= 1, f"alpha lies between 0 and 1, not {alpha}")


def _inside(name: str, places: Tensor, vocabulary: int) -> None:
    require(places.numel() == 0 or 0 <= int(places.min()) <= int(places.max()) < vocabulary, f"{name} names entries "
            f"outside of the student's vocabulary of {vocabulary}", DataError)


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
