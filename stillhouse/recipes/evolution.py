"""Regularised (aging) evolution: a search over discrete choices by a score that is cheap to compute."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

from stillhouse.errors import ConfigError, require

T = TypeVar("T")
Scores = tuple[float, ...]


def sum_best(scores: Sequence[Scores]) -> int:
    """The place of the largest sum."""
    return max(range(len(scores)), key=lambda i: sum(scores[i]))


def rank_best(scores: Sequence[Scores]) -> int:
    """The place of the best mean rank over the parts of the scores: parts of different size count alike."""
    ranks = [0] * len(scores)
    for part in zip(*scores, strict=True):
        for place, i in enumerate(sorted(range(len(part)), key=lambda i: part[i])):
            ranks[i] += place
    return max(range(len(scores)), key=lambda i: ranks[i])


def evolve(
    sample: Callable[[random.Random], T],
    mutate: Callable[[T, random.Random], T],
    score: Callable[[T], Scores],
    *,
    cycles: int,
    population: int = 36,
    tournament: int = 8,
    seed: int = 0,
    best: Callable[[Sequence[Scores]], int] = sum_best,
    allowed: Callable[[T], bool] = lambda candidate: True,
    track: Callable[[Iterable[int]], Iterable[int]] = lambda x: x,
) -> list[tuple[T, Scores]]:
    """Every candidate that was scored, in order (Real et al. 2019, algorithm 1): `population` random ones, then, up to
    `cycles` in all, a mutation of the best of a random tournament each time, the oldest member leaving.

    Candidates that are not `allowed` are drawn or mutated again; a candidate is scored once. Higher scores are better;
    `best` gives the place of the best of several. Raises ConfigError where 1,000 draws gave nothing that is allowed.
    """
    require(1 <= tournament <= population <= cycles, "a search needs 1 <= tournament <= population <= cycles; got "
            f"{tournament}, {population} and {cycles}")
    draw = random.Random(seed)
    known: dict[T, Scores] = {}

    def valid(make: Callable[[], T]) -> T:
        for _ in range(1000):
            candidate = make()
            if allowed(candidate):
                return candidate
        raise ConfigError("1,000 draws gave no candidate within the budget; widen the space or raise the budget")

    history: list[tuple[T, Scores]] = []
    alive: deque[T] = deque()
    for cycle in track(range(cycles)):
        if cycle < population:
            candidate = valid(lambda: sample(draw))
        else:
            group = draw.sample(list(alive), tournament)
            parent = group[best([known[c] for c in group])]
            candidate = valid(lambda: mutate(parent, draw))  # noqa: B023
            alive.popleft()
        if candidate not in known:
            known[candidate] = score(candidate)
        alive.append(candidate)
        history.append((candidate, known[candidate]))
    return history
