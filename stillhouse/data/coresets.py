"""Choosing a few real samples per class: at random, by herding, by k-centre. All return positions, class by class."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from stillhouse.errors import DataError, require


def random_per_class(
    labels: Int[Tensor, " n"], ipc: int, generator: torch.Generator | None = None
) -> Int[Tensor, " chosen"]:
    """`ipc` samples of every class, drawn without replacement."""
    return _per_class(labels, ipc, lambda where: where[torch.randperm(len(where), generator=generator)[:ipc]])


def herding(
    features: Float[Tensor, "n features"], labels: Int[Tensor, " n"], ipc: int
) -> Int[Tensor, " chosen"]:
    """Greedily the samples whose running mean stays closest to the class mean (Welling 2009; Rebuffi et al. 2017)."""

    def choose(where: Tensor) -> Tensor:
        own = features[where].flatten(1).double()
        mean, total, chosen = own.mean(0), torch.zeros_like(own[0]), []
        free = torch.ones(len(own), dtype=torch.bool)
        for count in range(1, ipc + 1):
            distance = ((total + own) / count - mean).square().sum(1).masked_fill(~free, torch.inf)
            best = int(distance.argmin())
            free[best] = False
            total = total + own[best]
            chosen.append(best)
        return where[torch.tensor(chosen)]

    return _per_class(labels, ipc, choose)


def k_center(
    features: Float[Tensor, "n features"], labels: Int[Tensor, " n"], ipc: int
) -> Int[Tensor, " chosen"]:
    """Greedy k-centre: first the sample nearest to the class mean, then always the one farthest from those chosen
    (Sener and Savarese 2018, algorithm 1)."""

    def choose(where: Tensor) -> Tensor:
        own = features[where].flatten(1).double()
        chosen = [int((own - own.mean(0)).square().sum(1).argmin())]
        nearest = (own - own[chosen[0]]).square().sum(1)
        while len(chosen) < ipc:
            nearest[chosen] = -1.0
            chosen.append(int(nearest.argmax()))
            nearest = torch.minimum(nearest, (own - own[chosen[-1]]).square().sum(1))
        return where[torch.tensor(chosen)]

    return _per_class(labels, ipc, choose)


def _per_class(labels: Tensor, ipc: int, choose: Callable[[Tensor], Tensor]) -> Tensor:
    require(ipc >= 1, f"ipc (samples per class) must be at least 1, not {ipc}")
    require(len(labels) > 0, "there are no samples to choose from", DataError)
    chosen = []
    for label in labels.unique().tolist():
        where = (labels == label).nonzero().flatten()
        require(len(where) >= ipc, f"class {label} has only {len(where)} samples, fewer than ipc = {ipc}", DataError)
        chosen.append(choose(where))
    return torch.cat(chosen)
