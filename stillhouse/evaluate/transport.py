"""How far two sets of vectors are from each other under the best pairing."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from stillhouse.errors import DataError, require
from stillhouse.measures.transport import cosine_cost


@torch.no_grad()
def assignment_cost(x: Float[Tensor, "n features"], y: Float[Tensor, "n features"]) -> float:
    """The mean of 1 - cos over the one-to-one pairing that makes it smallest: the exact transport cost between two sets
    of equal size (`scipy`). Raises DataError for sets of different size."""
    from scipy.optimize import linear_sum_assignment

    require(len(x) == len(y) >= 1, f"two sets of one size are paired, got {len(x)} and {len(y)} vectors", DataError)
    cost = cosine_cost(x.double(), y.double()).cpu().numpy()
    rows, columns = linear_sum_assignment(cost)
    return float(cost[rows, columns].mean())
