"""What one classifier knows that another does not: prediction flips, and what of them a transfer has moved.

A positive flip is a sample on which the teacher is right and the student wrong, a negative one the reverse (Roth et al.
2024, section 3). Shares of positive flips by class are called gains.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from stillhouse.errors import DataError, require


@dataclass(frozen=True)
class Flips:
    """Which samples flip, [n] each, and how many of every class flip to the better (`gains`, [classes])."""

    positive: Bool[Tensor, " n"]
    negative: Bool[Tensor, " n"]
    gains: Float[Tensor, " classes"]

    @property
    def rho_pos(self) -> float:
        """Share of samples on which the teacher is right and the student wrong."""
        return self.positive.double().mean().item()

    @property
    def rho_neg(self) -> float:
        """Share of samples on which the student is right and the teacher wrong; rho_pos - rho_neg is the difference of
        their accuracies."""
        return self.negative.double().mean().item()


def flips(
    student: Float[Tensor, "n classes"], teacher: Float[Tensor, "n classes"], labels: Int[Tensor, " n"]
) -> Flips:
    """Compare the logits of two classifiers on the same labelled samples. Raises DataError where sizes differ."""
    require(student.shape == teacher.shape and len(student) == len(labels) > 0, f"logits {tuple(student.shape)} and "
            f"{tuple(teacher.shape)} for {len(labels)} labels", DataError)
    right_s, right_t = (z.argmax(-1) == labels for z in (student, teacher))
    positive = right_t & ~right_s
    gains = torch.bincount(labels[positive], minlength=student.shape[-1]).double()
    return Flips(positive, right_s & ~right_t, gains)


def gain_entropy(gains: Float[Tensor, " classes"]) -> float:
    """Entropy of the gains over the classes as a part of its largest value: 1 where all classes gain alike, 0 where one
    gains everything (or none does)."""
    p = gains / gains.sum().clamp_min(1e-12)
    return -torch.xlogy(p, p).sum().item() / math.log(max(2, len(gains)))


def top_classes(gains: Float[Tensor, " classes"], top: float = 0.2) -> Int[Tensor, " k"]:
    """The classes with the largest gains, a part `top` of all of them and at least one, largest first."""
    require(0 < top <= 1, f"top is a part of the classes in (0, 1], not {top}")
    return gains.sort(descending=True, stable=True).indices[: max(1, round(top * len(gains)))]


def gain_concentration(gains: Float[Tensor, " classes"], top: float = 0.2) -> float:
    """Share of the gains that lies in the `top_classes`."""
    return (gains[top_classes(gains, top)].sum() / gains.sum().clamp_min(1e-12)).item()


def gain_similarity(
    gains: Float[Tensor, " classes"], vectors: Float[Tensor, "classes features"], top: float = 0.2
) -> float:
    """Mean cosine similarity among the vectors of the `top_classes` minus that among all classes: above 0 where the
    gains lie in classes that are alike. Raises DataError with fewer than two top classes."""
    chosen = top_classes(gains, top)
    require(len(vectors) == len(gains) and len(chosen) >= 2, f"{len(vectors)} vectors for {len(gains)} classes, "
            f"{len(chosen)} of them on top; two are needed", DataError)

    def among(v: Tensor) -> float:
        unit = F.normalize(v.double(), dim=1)
        n = len(v)
        return ((unit @ unit.T).sum() - n).item() / (n * (n - 1))

    return among(vectors[chosen]) - among(vectors)


def transfer_scores(
    before: Float[Tensor, "n classes"],
    after: Float[Tensor, "n classes"],
    teacher: Float[Tensor, "n classes"],
    labels: Int[Tensor, " n"],
    top: float = 0.2,
) -> dict[str, float]:
    """What a transfer did to a student, from logits on held-out samples.

    delta: accuracy after minus before. transferred: share of the positive flips that became right. transferred, top
    classes: the same within the `top_classes`. forgotten: share of what was right before and is wrong now. Shares of
    nothing are 0.
    """
    found = flips(before, teacher, labels)
    was, now = (z.argmax(-1) == labels for z in (before, after))
    in_top = torch.isin(labels, top_classes(found.gains, top))

    def share(part: Tensor, whole: Tensor) -> float:
        return ((part & whole).sum().double() / whole.sum().clamp_min(1)).item()

    return {"delta": (now.double().mean() - was.double().mean()).item(),
            "transferred": share(now, found.positive),
            "transferred, top classes": share(now, found.positive & in_top),
            "forgotten": share(~now, was)}


def success_rate(deltas: Sequence[float]) -> float:
    """Share of transfers whose delta is above 0. Raises DataError where there is none."""
    require(len(deltas) > 0, "there is no transfer to rate", DataError)
    return sum(d > 0 for d in deltas) / len(deltas)
