"""Claims and their verdicts, without torch: a sentence, a slack per seed, a paired t-interval."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

Arms = Mapping[str, Mapping[str, float]]
"""What one seed gave: {arm: {metric: value}}."""

VERDICTS = ("holds", "leans", "fails")


@dataclass(frozen=True)
class Claim:
    """A sentence and the slack of one seed's metrics, positive where it holds. `report`: printed without a verdict."""

    sentence: str
    slack: Callable[[Arms], float]
    report: bool = False


@dataclass(frozen=True)
class Outcome:
    """A claim over all seeds: its slacks, their mean, the 95% interval of the mean, and what follows."""

    sentence: str
    slack: tuple[float, ...]
    mean: float
    interval: tuple[float, float]
    verdict: str


def interval(values: Sequence[float], level: float = 0.95) -> tuple[float, float, float]:
    """Mean and the ends of its Student-t interval; with one value, or one that is not finite, the ends are infinite."""
    n = len(values)
    if n == 0 or not all(math.isfinite(v) for v in values):
        return math.nan, -math.inf, math.inf
    mean = math.fsum(values) / n
    if n == 1:
        return mean, -math.inf, math.inf
    from scipy.stats import t

    deviation = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (n - 1))
    half = float(t.ppf(0.5 + level / 2, n - 1)) * deviation / math.sqrt(n)
    return mean, mean - half, mean + half


def judge(claim: Claim, seeds: Sequence[Arms]) -> Outcome:
    """The verdict of one claim: "holds" where the 95% interval of the slack lies above 0, "leans" where only the mean
    does, "fails" otherwise, also where an arm is missing, crashed or not a number."""
    slacks = []
    for arms in seeds:
        try:
            slacks.append(float(claim.slack(arms)))
        except (KeyError, TypeError, ZeroDivisionError):
            slacks.append(math.nan)
    mean, low, high = interval(slacks)
    if claim.report:
        verdict = "report"
    elif low > 0:
        verdict = "holds"
    elif mean > 0 and all(math.isfinite(s) for s in slacks):
        verdict = "leans"
    else:
        verdict = "fails"
    return Outcome(claim.sentence, tuple(slacks), mean, (low, high), verdict)


def worst(verdicts: Sequence[str]) -> str:
    """The worst of several verdicts, those without one left out; "" if none is left."""
    judged = [v for v in verdicts if v in VERDICTS]
    return max(judged, key=VERDICTS.index) if judged else ""
