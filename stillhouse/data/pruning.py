"""Keeping a part of a labelled set: by a score, by coverage of a score's range, by coverage of the features.

All return positions in ascending order; `Kept` is the set of what is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from stillhouse.data.coresets import herding, k_center
from stillhouse.data.sets import fetch
from stillhouse.errors import DataError, require

Positions = Int[Tensor, " kept"]


class Kept:
    """The items of a map-style set at `positions`; their `index` is that in the whole set."""

    def __init__(self, data: Any, positions: Int[Tensor, " kept"]):
        require(len(positions) > 0, "nothing is kept of the data; raise the fraction", DataError)
        self.data_set, self.positions = data, positions.cpu()

    @property
    def fields(self) -> tuple[str, ...]:
        return tuple(getattr(self.data_set, "fields", ()))

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        place = int(self.positions[index])
        return {**self.data_set[place], "index": place}

    def batch(self, indices: Sequence[int] | Tensor) -> dict[str, Any]:
        return fetch(self.data_set, self.positions[torch.as_tensor(indices)].tolist())


def share_of(label: Int[Tensor, " n"], fraction: float, balanced: bool, choose: Callable[[Tensor, int], Tensor]
             ) -> Positions:
    """`choose(members, count)` for all samples at once, count = round(f n); or, `balanced`, for each class, count =
    round(f n_c). Raises DataError for a fraction outside (0, 1] or one that keeps nothing."""
    require(0 < fraction <= 1, f"fraction is the part that is kept, in (0, 1], not {fraction}", DataError)
    groups = [(label == y).nonzero().flatten() for y in label.unique().tolist()] if balanced else [
        torch.arange(len(label))]
    kept = [choose(members, round(fraction * len(members))) for members in groups]
    where = torch.cat(kept).sort().values
    require(len(where) > 0, f"a fraction of {fraction} keeps none of {len(label)} samples; raise it", DataError)
    return where


def at_random(label: Int[Tensor, " n"], fraction: float, balanced: bool = False,
              generator: torch.Generator | None = None) -> Positions:
    """A random part, of every class alike if `balanced`."""
    return share_of(label, fraction, balanced,
                    lambda members, count: members[torch.randperm(len(members), generator=generator)[:count]])


def by_score(score: Float[Tensor, " n"], label: Int[Tensor, " n"], fraction: float, balanced: bool = False,
             highest: bool = True) -> Positions:
    """The samples of the highest scores (or the lowest); of equal ones the first."""
    return share_of(label, fraction, balanced, lambda members, count: members[
        score[members].argsort(descending=highest, stable=True)[:count]])


def by_coverage(score: Float[Tensor, " n"], label: Int[Tensor, " n"], fraction: float, balanced: bool = False,
                hardest: float = 0.1, bins: int = 50, generator: torch.Generator | None = None) -> Positions:
    """Coverage-centric selection (Zheng et al. 2023, algorithm 1): the part `hardest` with the highest scores is left
    out; the range of the other scores is cut into `bins` of equal width, which share the number to be kept evenly, the
    smallest bin first, so that what it cannot give goes to the others; within a bin the choice is random.

    Where fewer than asked for remain, the easiest of those left out are kept too.
    """
    require(0 <= hardest < 1 and bins >= 1, f"hardest lies in [0, 1) and bins is 1 or more; got {hardest} and {bins}",
            DataError)

    def choose(members: Tensor, count: int) -> Tensor:
        order = members[score[members].argsort(stable=True)]
        remaining = order[: max(len(order) - round(hardest * len(order)), count)]
        low, high = score[remaining].min(), score[remaining].max()
        place = ((score[remaining] - low) / (high - low).clamp_min(1e-12) * bins).long().clamp(max=bins - 1)
        strata = sorted((remaining[place == b] for b in place.unique().tolist()), key=len)
        chosen, left = [], count
        for i, stratum in enumerate(strata):
            take = min(len(stratum), left // (len(strata) - i) if i + 1 < len(strata) else left)
            chosen.append(stratum[torch.randperm(len(stratum), generator=generator)[:take]])
            left -= take
        whole = torch.cat(chosen)
        if left:
            others = remaining[~torch.isin(remaining, whole)]
            whole = torch.cat([whole, others[torch.randperm(len(others), generator=generator)[:left]]])
        return whole

    return share_of(label, fraction, balanced, choose)


def by_features(features: Float[Tensor, "n features"], label: Int[Tensor, " n"], fraction: float,
                balanced: bool = False, way: str = "kcenter") -> Positions:
    """Greedy k-centre ("kcenter") or herding ("herding") among the features of all samples, or of each class."""
    require(way in ("kcenter", "herding"), f"features are covered by 'kcenter' or 'herding', not {way!r}")
    greedy = k_center if way == "kcenter" else herding

    def choose(members: Tensor, count: int) -> Tensor:
        return members[greedy(features[members], torch.zeros_like(members), count)] if count else members[:0]

    return share_of(label, fraction, balanced, choose)
