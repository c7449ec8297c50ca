"""Which points of a pool to have labelled: scores of uncertainty, and the game against a labeller that errs."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from stillhouse.errors import DataError, require
from stillhouse.measures.balanced import entropy

Score = Literal["margin", "entropy", "confidence"]
FLOOR = 1e-6


def margin_score(logits: Float[Tensor, "n classes"]) -> Float[Tensor, " n"]:
    """1 - (p_(1) - p_(2)): one minus the gap between the two most probable classes, in [0, 1]."""
    best = logits.softmax(-1).topk(2, -1).values
    return 1 - (best[:, 0] - best[:, 1])


def entropy_score(logits: Float[Tensor, "n classes"]) -> Float[Tensor, " n"]:
    """H(p) / log(classes), in [0, 1]."""
    return entropy(logits) / math.log(logits.shape[-1])


def least_confidence(logits: Float[Tensor, "n classes"]) -> Float[Tensor, " n"]:
    """1 - p_(1), in [0, 1 - 1 / classes]."""
    return 1 - logits.softmax(-1).amax(-1)


SCORES: dict[str, Callable[[Tensor], Tensor]] = {"margin": margin_score, "entropy": entropy_score,
                                                 "confidence": least_confidence}


def gains(logits: Float[Tensor, "n classes"], score: Score = "margin") -> Float[Tensor, " n"]:
    """How much the student may learn from each point: an uncertainty, at least 1e-6, in float64."""
    require(score in SCORES, f"score is one of {', '.join(SCORES)}, not {score!r}")
    return SCORES[score](logits.double()).clamp_min(FLOOR)


class Minimax(NamedTuple):
    """The best sampling distribution, how many points it keeps, and the gain that it guarantees."""

    q: Float[Tensor, " n"]
    kept: int
    value: float


def minimax(gain: Float[Tensor, " n"], mistakes: int) -> Minimax:
    """max over distributions q of min over sets M of `mistakes` points of sum_{i not in M} q_i g_i (RAD, Baykal et al.
    2023, in closed form).

    With g_1 >= g_2 >= ... and H_k = 1 / sum_{i<=k} 1/g_i, the k > m with the largest (k - m) H_k is kept and
    q_i = H_k / g_i on it: all kept points have the same expected gain q_i g_i, so it does not matter to the adversary
    which of them are wrong. Where a wrong label costs as much as a right one gains, `mistakes` is twice their number.
    Equal values keep the fewest points. Computed in float64.

    Raises DataError unless all gains are finite and above 0, ConfigError unless 0 <= mistakes < n.
    """
    g = gain.double()
    require(len(g) > 0 and bool((g > 0).all() and g.isfinite().all()), "gains must be finite and above 0, of at least "
            "one point", DataError)
    require(0 <= mistakes < len(g), f"mistakes must lie in [0, {len(g)}) for {len(g)} points, not {mistakes}")
    order = g.argsort(descending=True, stable=True)
    k = torch.arange(1, len(g) + 1, dtype=g.dtype, device=g.device)
    harmonic = 1 / (1 / g[order]).cumsum(0)
    values = (k - mistakes) * harmonic
    best = int(values.argmax())
    q = torch.zeros_like(g)
    kept = order[: best + 1]
    q[kept] = harmonic[best] / g[kept]
    return Minimax(q, best + 1, float(values[best]))


def worst_case(q: Float[Tensor, " n"], gain: Float[Tensor, " n"], mistakes: int, cost: float = 0.0) -> float:
    """The expected gain of q where the `mistakes` points with the largest q_i g_i are wrong, each at -cost g_i."""
    each = (q * gain).double()
    lost = each.topk(mistakes).values.sum() if mistakes else each.new_zeros(())
    return float(each.sum() - (1 + cost) * lost)


def draw(q: Float[Tensor, " n"], gain: Float[Tensor, " n"], count: int, generator: torch.Generator | None = None
         ) -> Int[Tensor, " chosen"]:
    """`count` different positions drawn one after another with probabilities in proportion to q; where q has fewer
    points, all of them and the next ones by gain. Raises DataError where there are fewer than `count` in all."""
    require(count <= len(q), f"{count} points cannot be drawn of {len(q)}", DataError)
    inside = int((q > 0).sum())
    if inside > count:
        return torch.multinomial(q, count, generator=generator)
    rest = gain.masked_fill(q > 0, -torch.inf).argsort(descending=True, stable=True)[: count - inside]
    return torch.cat([(q > 0).nonzero().flatten(), rest])


def top(gain: Float[Tensor, " n"], count: int) -> Int[Tensor, " chosen"]:
    """The positions of the `count` largest gains, falling; of equals the first."""
    return gain.argsort(descending=True, stable=True)[:count]


def in_turns(gain: Float[Tensor, " n"], clusters: Int[Tensor, " n"], count: int) -> Int[Tensor, " chosen"]:
    """`count` positions, one from every cluster in turn, the smallest cluster first, the largest gain of each first
    (the diverse step of clustering-margin, Citovsky et al. 2021, algorithm 1)."""
    order = top(gain, len(gain))
    groups: dict[int, list[int]] = {}
    for i, c in zip(order.tolist(), clusters[order].tolist(), strict=True):
        groups.setdefault(c, []).append(i)
    queues = sorted(groups.values(), key=len)
    rounds = max(map(len, queues))
    turns = [queue[turn] for turn in range(rounds) for queue in queues if turn < len(queue)]
    return torch.tensor(turns[:count], device=gain.device)


def farthest_first(features: Float[Tensor, "n features"], covered: Float[Tensor, "m features"], count: int
                   ) -> Int[Tensor, " chosen"]:
    """k-centre greedy (Sener and Savarese 2018, algorithm 1): always the point that is farthest from all those covered
    or chosen before."""
    require(count <= len(features), f"{count} points cannot be chosen of {len(features)}", DataError)
    require(len(covered) > 0, "farthest_first needs at least one covered point", DataError)
    nearest = torch.cdist(features.double(), covered.double()).amin(1)
    chosen: list[int] = []
    for _ in range(count):
        chosen.append(int(nearest.argmax()))
        distance = (features.double() - features[chosen[-1]].double()).square().sum(1).sqrt()
        nearest = torch.minimum(nearest, distance)
        nearest[chosen] = -1.0
    return torch.tensor(chosen, device=features.device)
