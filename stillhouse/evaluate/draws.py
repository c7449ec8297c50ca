"""Measurements that are repeated over draws of the data."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from stillhouse.errors import require
from stillhouse.run import Run


def mean_over_draws(measure: Callable[[int], Mapping[str, float]], draws: int, run: Run) -> dict[str, float]:
    """The mean of `measure(seed)` over `draws` seeds that follow from the run's, each metric by itself. Each draw is a
    scope of the run, so its stages have names and random numbers of their own."""
    require(draws >= 1, f"draws must be 1 or more, not {draws}")
    found = []
    for draw in range(draws):
        with run.scope(f"draw {draw}"):
            found.append(measure(1000 * run.seed + draw))
    return {name: math.fsum(one[name] for one in found) / draws for name in found[0]}
