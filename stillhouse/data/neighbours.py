"""The nearest neighbours of stored features, and batches of them: pairs that are likely to mean the same."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from stillhouse.data.sets import fetch
from stillhouse.errors import DataError, require


@torch.no_grad()
def nearest_neighbours(
    features: Float[Tensor, "n features"], k: int, normalise: bool = True, chunk: int = 1024
) -> Int[Tensor, "n k+1"]:
    """The k + 1 most similar vectors of each, by inner product, the most similar first.

    With `normalise` it is the cosine: then the first is the vector itself (or an exact copy of it). Computed `chunk`
    rows at a time. Raises DataError for too few vectors or values that are not finite.
    """
    require(k >= 0 and chunk >= 1, f"k must be 0 or more and chunk at least 1; got {k} and {chunk}")
    require(len(features) > k, f"{len(features)} samples have no {k} neighbours each", DataError)
    require(bool(torch.isfinite(features).all()), "features must be finite: has the encoder diverged?", DataError)
    x = F.normalize(features.flatten(1).float(), dim=1) if normalise else features.flatten(1).float()
    return torch.cat([(part @ x.T).topk(k + 1, dim=1).indices for part in x.split(chunk)])


def purity(neighbours: Int[Tensor, "n columns"], labels: Int[Tensor, " n"]) -> float:
    """Which part of the neighbours, each sample itself left out, has the sample's label."""
    other = neighbours != torch.arange(len(neighbours), device=neighbours.device)[:, None]
    same = labels[neighbours] == labels[:, None]
    return float((same & other).sum() / other.sum().clamp_min(1))


def chosen(
    neighbours: Int[Tensor, "n columns"], index: Int[Tensor, " batch"], u: Float[Tensor, " batch"]
) -> Int[Tensor, " batch"]:
    """One of the stored neighbours of each sample in `index`, picked by uniform numbers u in [0, 1)."""
    column = (u * neighbours.shape[1]).long().clamp_max(neighbours.shape[1] - 1)
    return neighbours[index.to(neighbours.device), column.to(neighbours.device)]


def members(
    data: Any, neighbours: Int[Tensor, "n columns"], index: Int[Tensor, " batch"], u: Float[Tensor, " batch"]
) -> dict[str, Any]:
    """The batch of one neighbour for each sample in `index` (see `chosen`), read from `data`.

    Within a step: `members(data, neighbours, batch["index"], run.rand(len(batch["index"])))`.
    """
    return fetch(data, chosen(neighbours, index, u).tolist())
