"""Optimal transport between two finite sets of points, regularised by entropy."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from stillhouse.errors import ConfigError, DataError, require

CHECK_EVERY = 10


def cosine_cost(x: Float[Tensor, "*batch n features"], y: Float[Tensor, "*batch m features"]) -> Tensor:
    """C_ij = 1 - cos(x_i, y_j), [*batch, n, m], in [0, 2]."""
    return 1 - F.normalize(x, dim=-1) @ F.normalize(y, dim=-1).transpose(-2, -1)


@torch.no_grad()
def sinkhorn(
    cost: Float[Tensor, "*batch n m"],
    eps: float = 0.05,
    rows: Float[Tensor, "*batch n"] | None = None,
    columns: Float[Tensor, "*batch m"] | None = None,
    tolerance: float = 1e-6,
    iterations: int = 2000,
) -> Float[Tensor, "*batch n m"]:
    """The plan P = diag(a) exp(-C / eps) diag(b) with the given marginals (uniform ones where none are given), which
    minimises <P, C> - eps H(P) (Cuturi 2013, algorithm 1; here in the log domain, without gradient).

    It ends when every row sum is within `tolerance` of its marginal (columns are met exactly by the last update), or
    after `iterations` rounds. Autocast is off; half precision is computed in float32. A marginal of 0 is allowed. In
    float32 a tolerance much below 1e-7 cannot be reached.

    Raises ConfigError for eps, tolerance or iterations out of range, DataError for a cost that is no matrix, marginals
    of another shape, negative ones, or ones whose sums differ.
    """
    require(eps > 0 and tolerance > 0 and iterations >= 1, "eps and tolerance must be above 0 and iterations 1 or "
            f"more; got {eps}, {tolerance} and {iterations}", ConfigError)
    require(cost.dim() >= 2 and min(cost.shape[-2:]) >= 1, f"a cost is a matrix [n, m], got {tuple(cost.shape)}",
            DataError)
    with torch.autocast(cost.device.type, enabled=False):
        scaled = -(cost if cost.dtype == torch.float64 else cost.float()) / eps
        r, c = _marginal(rows, scaled, -2), _marginal(columns, scaled, -1)
        require(torch.allclose(r.sum(-1), c.sum(-1), rtol=1e-4, atol=0), "the marginals of the rows and of the columns "
                "must have equal sums", DataError)
        log_r, log_c = r.log(), c.log()
        log_b = torch.zeros_like(log_c)
        for k in range(1, iterations + 1):
            log_a = _finite(log_r - torch.logsumexp(scaled + log_b.unsqueeze(-2), -1))
            log_b = _finite(log_c - torch.logsumexp(scaled + log_a.unsqueeze(-1), -2))
            if k % CHECK_EVERY == 0 or k == iterations:
                plan = (scaled + log_a.unsqueeze(-1) + log_b.unsqueeze(-2)).exp()
                if float((plan.sum(-1) - r).abs().max()) <= tolerance:
                    break
        return plan


def wasserstein(
    cost: Float[Tensor, "*batch n m"],
    eps: float = 0.05,
    rows: Float[Tensor, "*batch n"] | None = None,
    columns: Float[Tensor, "*batch m"] | None = None,
    tolerance: float = 1e-6,
    iterations: int = 2000,
) -> Float[Tensor, "*batch"]:
    """The primal cost sum_ij P_ij C_ij under the plan of `sinkhorn`, which is a constant: the gradient goes through C
    alone. At the unregularised optimum this is the gradient of the Wasserstein distance (envelope theorem)."""
    plan = sinkhorn(cost.detach(), eps, rows, columns, tolerance, iterations)
    with torch.autocast(cost.device.type, enabled=False):
        return (plan * cost.to(plan.dtype)).sum((-2, -1))


def _marginal(given: Tensor | None, cost: Tensor, dim: int) -> Tensor:
    shape = (*cost.shape[:-2], cost.shape[dim])
    if given is None:
        return cost.new_full(shape, 1 / cost.shape[dim])
    side = "rows" if dim == -2 else "columns"
    require(given.shape == shape, f"the marginal of the {side} has shape {tuple(given.shape)}, expected {shape}",
            DataError)
    require(bool((given >= 0).all()), f"the marginal of the {side} has negative entries", DataError)
    return given.to(cost)


def _finite(potential: Tensor) -> Tensor:
    """-inf (no mass there) as a very negative number, so that -inf - -inf never appears."""
    return potential.clamp_min(torch.finfo(potential.dtype).min / 4)
