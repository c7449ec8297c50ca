"""Weights of few bits: quantisers with a scale per bucket, learned codebooks, and the code that is stored.

A tensor is flattened and cut into buckets of k consecutive values, the last one filled up with the tensor's last value;
a tensor shorter than k is one bucket. With beta the minimum of a bucket and alpha its range (1 where that is below
1e-10),

    v_hat = (v - beta) / alpha,    Q(v) = alpha Q_hat(v_hat) + beta,

where Q_hat takes a value of [0, 1] to one of s points: evenly spaced ones, or points p_1 <= ... <= p_s that are learned
(Polino et al. 2018, "Model compression via distillation and quantization", sections 2 and 4). Both ends of a bucket are
kept exactly by the evenly spaced points.
"""

from __future__ import annotations

import contextlib
import fnmatch
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.utils import parametrize

from stillhouse.errors import DataError, RoleError, require

CONSTANT = 1e-10
MOST_LEVELS = 2**16

Gradient = Literal["plain", "truncated", "complicated"]


class Scaled(NamedTuple):
    """A tensor cut into buckets and scaled: `values` in [0, 1], and the two ends of each bucket."""

    values: Float[Tensor, "buckets k"]
    low: Float[Tensor, "buckets 1"]
    high: Float[Tensor, "buckets 1"]


def to_buckets(v: Float[Tensor, "*shape"], bucket: int | None = 256) -> Float[Tensor, "buckets k"]:
    """The values of `v` in buckets of `bucket` (None: all of them in one). Raises ConfigError for a bucket below 1,
    DataError for a tensor without values."""
    require(bucket is None or bucket >= 1, f"a bucket holds 1 value or more, not {bucket}; None is the whole tensor")
    require(v.numel() > 0, "a tensor without values cannot be quantised", DataError)
    flat = v.reshape(-1)
    if bucket is None or len(flat) <= bucket:
        return flat[None]
    return torch.cat([flat, flat[-1:].expand(-len(flat) % bucket)]).view(-1, bucket)


def from_buckets(values: Tensor, shape: Sequence[int]) -> Tensor:
    """The inverse of `to_buckets`: what was filled in is dropped."""
    return values.reshape(-1)[: math.prod(shape)].view(tuple(shape))


def scaled(v: Float[Tensor, "*shape"], bucket: int | None = 256) -> Scaled:
    """v_hat, bucket by bucket."""
    values = to_buckets(v, bucket)
    low, high = values.aminmax(dim=1, keepdim=True)
    high = torch.where(high - low < CONSTANT, low + 1, high)
    return Scaled((values - low) / (high - low), low, high)


def even_points(levels: int, like: Tensor | None = None) -> Float[Tensor, " levels"]:
    """The points j / (s - 1) of the uniform quantiser; of one level 0. Raises ConfigError for another number."""
    require(1 <= levels <= MOST_LEVELS, f"levels must lie between 1 and {MOST_LEVELS}, not {levels}")
    kind: dict[str, Any] = {} if like is None else {"dtype": like.dtype, "device": like.device}
    return torch.arange(levels, **kind) / max(levels - 1, 1)


def percentile_points(x: Float[Tensor, "*shape"], levels: int) -> Float[Tensor, " levels"]:
    """`levels` percentiles of x from 0 to 100, evenly spaced and interpolated linearly: as many values between each
    two of them."""
    ordered = x.reshape(-1).sort().values
    place = even_points(levels, ordered) * (len(ordered) - 1)
    below = place.floor().long()
    return torch.lerp(ordered[below], ordered[(below + 1).clamp_max(len(ordered) - 1)], place - below)


def even_index(x: Float[Tensor, "*shape"], levels: int, u: Tensor | None = None) -> Int[Tensor, "*shape"]:
    """The uniform quantiser: the number of the nearest of `levels` evenly spaced points, halves to the even one.

    With uniform draws `u` of [0, 1) in the shape of x, stochastic rounding: up with the probability of the fractional
    part, so that the expectation is x.
    """
    place = x * (levels - 1)
    return (place.round() if u is None else (place + u).floor()).clamp(0, levels - 1).int()


def nearest_index(x: Float[Tensor, "*shape"], points: Float[Tensor, " levels"]) -> Int[Tensor, "*shape"]:
    """The number of the nearest of the sorted `points`; half-way values go to the lower one."""
    return torch.bucketize(x, (points[1:] + points[:-1]) / 2, out_int32=True)


def quantize(
    v: Float[Tensor, "*shape"], levels: int, bucket: int | None = 256, points: Tensor | None = None,
    u: Tensor | None = None,
) -> Float[Tensor, "*shape"]:
    """Q(v) with `levels` evenly spaced points, or with the sorted `points`; `u` makes the rounding stochastic.

    Without gradient; `straight_through` has one. Computed in float32 at least, returned in the type of v.
    """
    return _quantized(v.detach(), levels, bucket, points, u)[0]


def _quantized(v: Tensor, levels: int, bucket: int | None, points: Tensor | None,
               u: Tensor | None) -> tuple[Tensor, Scaled, Tensor]:
    """Q(v), v_hat and Q_hat(v_hat), the latter two in buckets."""
    s = scaled(_precise(v), bucket)
    if points is None:
        index = even_index(s.values, levels, None if u is None else to_buckets(u, bucket))
        points = even_points(levels, s.values)
    else:
        index = nearest_index(s.values, points)
    q = points[index]
    return from_buckets(torch.lerp(s.low, s.high, q), v.shape).to(v.dtype), s, q


def _precise(v: Tensor) -> Tensor:
    return v if v.dtype in (torch.float32, torch.float64) else v.float()


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, w: Tensor, levels: int, bucket: int | None, gradient: str, u: Tensor | None) -> Tensor:
        v = w.clamp(-1, 1) if gradient == "truncated" else w
        out, s, q = _quantized(v, levels, bucket, None, u)
        ctx.gradient = gradient
        if gradient == "truncated":
            ctx.save_for_backward(w.abs() <= 1)
        elif gradient == "complicated":
            values = to_buckets(_precise(v), bucket)
            starts = torch.arange(len(values), device=w.device) * values.shape[1]
            ends = [(starts + place).clamp_max(w.numel() - 1) for place in (values.argmax(1), values.argmin(1))]
            ctx.save_for_backward(q - s.values, *ends)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (g,) = grads
        if ctx.gradient == "truncated":
            (inside,) = ctx.saved_tensors
            g = g * inside
        elif ctx.gradient == "complicated":
            error, top, bottom = ctx.saved_tensors
            flat = torch.zeros(error.numel(), dtype=error.dtype, device=error.device)
            flat[: g.numel()] = g.reshape(-1)
            d = (flat.view_as(error) * error).sum(1)
            moved = flat[: g.numel()].index_add(0, top, d).index_add(0, bottom, -d)
            g = moved.view_as(g).to(g.dtype)
        return g, None, None, None, None


def straight_through(
    w: Float[Tensor, "*shape"], levels: int, bucket: int | None = 256, gradient: Gradient = "plain",
    u: Tensor | None = None,
) -> Float[Tensor, "*shape"]:
    """Q(w), evenly spaced, with a gradient for the full-precision ("shadow") weights w. With g the gradient at Q(w):

    - "plain": g itself.
    - "truncated": w is cut to [-1, 1] before it is quantised, and g is 0 where |w| > 1 (Hubara et al. 2016).
    - "complicated": straight through the rounding alone, with the ends of a bucket differentiated: to g is added
      D = sum_i g_i (Q_hat_i - v_hat_i) over the bucket at its largest value, and taken off at its smallest.

    `u` in the shape of w makes the rounding stochastic. Raises ConfigError for another word.
    """
    require(gradient in ("plain", "truncated", "complicated"),
            f"gradient is 'plain', 'truncated' or 'complicated', not {gradient!r}")
    out = _StraightThrough.apply(w, levels, bucket, gradient, u)
    assert isinstance(out, Tensor)
    return out


class Codebook(nn.Module):
    """One fixed tensor and its learned points: differentiable quantization (section 4).

    Calling it gives Q(v) with dQ(v_i)/dp_j = alpha of v_i's bucket where v_i is assigned to p_j, else 0. The points
    begin at the percentiles of v_hat, or evenly spaced; `sort_` must follow every step.
    """

    values: Tensor
    low: Tensor
    high: Tensor

    def __init__(self, weight: Float[Tensor, "*shape"], levels: int, bucket: int | None = 256,
                 start: Literal["percentiles", "even"] = "percentiles"):
        super().__init__()
        require(start in ("percentiles", "even"), f"start is 'percentiles' or 'even', not {start!r}")
        self.shape, self.dtype, self.bucket = tuple(weight.shape), weight.dtype, bucket
        s = scaled(_precise(weight.detach()), bucket)
        for name, value in zip(("values", "low", "high"), s, strict=True):
            self.register_buffer(name, value, persistent=False)
        real = from_buckets(s.values, self.shape)
        self.points = nn.Parameter(percentile_points(real, levels) if start == "percentiles"
                                   else even_points(levels, real))

    def forward(self) -> Float[Tensor, "*shape"]:
        index = nearest_index(self.values, self.points.detach())
        return from_buckets(torch.lerp(self.low, self.high, self.points[index]), self.shape).to(self.dtype)

    @torch.no_grad()
    def sort_(self) -> None:
        """Bring the points back into ascending order."""
        self.points.copy_(self.points.sort().values)

    def code(self) -> Code:
        """What is stored of it."""
        index = from_buckets(nearest_index(self.values, self.points.detach()), (math.prod(self.shape),))
        index, low, high, points = (value.detach().cpu() for value in (
            index, self.low.flatten().float(), self.high.flatten().float(), self.points.float().clone()))
        return Code(index, low, high, points, len(points), self.bucket, self.shape)


@dataclass
class Code:
    """A quantised tensor as it is stored, on the CPU.

    index: int32 [n], the number of each value's point. low, high: float32 [buckets], the ends of the buckets.
    points: float32 [levels] where they are learned, None where they are evenly spaced.
    """

    index: Int[Tensor, " n"]
    low: Float[Tensor, " buckets"]
    high: Float[Tensor, " buckets"]
    points: Tensor | None
    levels: int
    bucket: int | None
    shape: tuple[int, ...]

    @property
    def bits(self) -> int:
        """Bits of one index."""
        return max(1, (self.levels - 1).bit_length())

    def decode(self) -> Float[Tensor, "*shape"]:
        """Q(v) in float32: always the same numbers from the same code."""
        points = even_points(self.levels, self.low) if self.points is None else self.points
        q = points[to_buckets(self.index, self.bucket)]
        return from_buckets(torch.lerp(self.low[:, None], self.high[:, None], q), self.shape)


def encode(v: Float[Tensor, "*shape"], levels: int, bucket: int | None = 256) -> Code:
    """The code of Q(v) with evenly spaced points, in float32; `decode` gives Q(v)."""
    s = scaled(v.detach().float().cpu(), bucket)
    index = from_buckets(even_index(s.values, levels), (v.numel(),))
    return Code(index, s.low.flatten(), s.high.flatten(), None, levels, bucket, tuple(v.shape))


def allocate_points(norms: Sequence[float], default: int) -> list[int]:
    """Numbers of points by importance (section 4): half of `default` for each tensor (2 at least), the rest of
    default x tensors in proportion to the gradients' 2-norms; what rounding leaves goes to the largest remainders.

    Raises ConfigError for a default below 2, DataError for norms that are negative or not finite.
    """
    require(default >= 2, f"a tensor needs at least 2 points, not {default}")
    require(len(norms) > 0 and all(math.isfinite(n) and n >= 0 for n in norms),
            f"norms must be finite and not negative, one or more; got {list(norms)}", DataError)
    least, total = max(2, default // 2), sum(norms)
    rest = (default - least) * len(norms)
    shares = [rest * n / total if total else rest / len(norms) for n in norms]
    points = [math.floor(share) for share in shares]
    order = sorted(range(len(norms)), key=lambda i: points[i] - shares[i])
    for i in order[: rest - sum(points)]:
        points[i] += 1
    return [min(least + p, MOST_LEVELS) for p in points]


def quantizable(model: nn.Module, which: Literal["all", "weights", "none"] = "all", keep: Sequence[str] = (),
                spare_ends: bool = False) -> list[str]:
    """Names of the parameters of `model` that are quantised, in its order; a tied one appears once.

    `which`: all of them, the matrices and kernels alone (no bias, no scale or shift of a normalisation), or none.
    `keep` are names, or patterns such as `*.norm.*`, that stay as they are; `spare_ends` keeps the modules that own the
    first and the last weight. Raises ConfigError for another word, RoleError for a name that `keep` does not find or
    where nothing is left to quantise.
    """
    require(which in ("all", "weights", "none"), f"tensors is 'all', 'weights' or 'none', not {which!r}")
    named = {name: p for name, p in model.named_parameters() if p.is_floating_point()}
    for pattern in keep:
        require(bool(fnmatch.filter(named, pattern)), f"no parameter is named '{pattern}'; there is "
                f"{', '.join(list(named)[:6])}, …", RoleError)
    weights = [name for name, p in named.items() if p.dim() >= 2]
    ends = {name.rpartition(".")[0] for name in (weights[:1] + weights[-1:] if spare_ends else [])}
    chosen = [name for name, p in named.items()
              if which != "none" and (which == "all" or p.dim() >= 2) and name.rpartition(".")[0] not in ends
              and p.numel() > 0 and not any(fnmatch.fnmatchcase(name, pattern) for pattern in keep)]
    require(bool(chosen) or which == "none", f"nothing of {type(model).__name__} is left to quantise: it has "
            f"{len(named)} parameters, keep is {tuple(keep)} and spare_ends {spare_ends}", RoleError)
    return chosen


class _Rounded(nn.Module):
    """A parametrisation: the weight as `straight_through` gives it."""

    def __init__(self, levels: int, bucket: int | None):
        super().__init__()
        self.levels, self.bucket = levels, bucket

    def forward(self, w: Tensor) -> Tensor:
        return straight_through(w, self.levels, self.bucket)


@contextlib.contextmanager
def few_bits(model: nn.Module, bits: int, bucket: int | None = 256,
             which: Literal["all", "weights", "none"] = "weights") -> Iterator[list[str]]:
    """Inside, the model computes with weights of 2^bits evenly spaced values, and gradients reach the precise ones; any
    procedure that trains it then trains a model of few bits. Gives the names of those weights.

    Outside it has its precise weights: `encode` them. Raises what `quantizable` raises.
    """
    names = quantizable(model, which)
    order = {module: list(module._parameters) for module in model.modules()}
    for name in names:
        owner, _, leaf = name.rpartition(".")
        parametrize.register_parametrization(model.get_submodule(owner), leaf, _Rounded(2**bits, bucket))
    try:
        yield names
    finally:
        for name in names:
            owner, _, leaf = name.rpartition(".")
            parametrize.remove_parametrizations(model.get_submodule(owner), leaf, leave_parametrized=False)
        for module, leaves in order.items():
            for leaf in leaves:
                module._parameters[leaf] = module._parameters.pop(leaf)
