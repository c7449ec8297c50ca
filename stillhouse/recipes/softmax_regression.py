"""Softmax regression on fixed features, solved to its optimum: the linear probe of theory papers."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from stillhouse.errors import DataError, NonFiniteError, require
from stillhouse.measures.divergences import signed_cross_entropy


class Solution(NamedTuple):
    """Weights, biases, the value of the objective and the largest entry of its gradient there."""

    weight: Float[Tensor, "classes features"]
    bias: Float[Tensor, " classes"]
    objective: float
    gradient: float

    def logits(self, features: Float[Tensor, "n features"]) -> Float[Tensor, "n classes"]:
        return features.double() @ self.weight.T + self.bias


def softmax_regression(
    features: Float[Tensor, "n features"], target: Float[Tensor, "n classes"], l2: float, steps: int = 500,
    start: Solution | None = None,
) -> Solution:
    """The minimum of -1/n sum target_c log softmax(W f + b)_c + l2/2 ||W||^2, by L-BFGS in float64.

    Rows of `target` add up to 1 and may be negative: the objective stays convex, as its second derivatives in the
    logits, diag(q) - q q^T, do not depend on the target. With l2 above 0 it has one minimum in W. `steps` bounds the
    iterations, which begin at `start` (zero if there is none).

    Raises ConfigError for l2 of 0 or less, DataError for rows that do not add up to 1, NonFiniteError where the
    features or targets are not finite.
    """
    require(l2 > 0, f"l2 must be above 0, not {l2}: without it the optimum may lie at infinity")
    require(len(features) == len(target), f"{len(features)} features for {len(target)} targets", DataError)
    features, target = features.detach().double(), target.detach().double()
    require(bool(torch.isfinite(features).all() and torch.isfinite(target).all()),
            "features and targets must be finite", NonFiniteError)
    require(bool((target.sum(1) - 1).abs().max() < 1e-4), "each row of the targets must add up to 1", DataError)
    weight = torch.zeros(target.shape[1], features.shape[1], dtype=torch.float64, device=features.device)
    bias = torch.zeros(target.shape[1], dtype=torch.float64, device=features.device)
    if start is not None:
        weight, bias = start.weight.clone(), start.bias.clone()
    both = [nn.Parameter(weight), nn.Parameter(bias)]
    optimizer = torch.optim.LBFGS(both, max_iter=steps, max_eval=2 * steps, tolerance_grad=1e-7, tolerance_change=1e-13,
                                  history_size=20, line_search_fn="strong_wolfe")

    def objective() -> Tensor:
        return signed_cross_entropy(target, features @ both[0].T + both[1]) + l2 / 2 * both[0].square().sum()

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = objective()
        value.backward()
        return value

    with torch.enable_grad():
        optimizer.step(closure)
        value = closure().detach()
    gradient = max(float(p.grad.abs().max()) for p in both if p.grad is not None)
    return Solution(both[0].detach(), both[1].detach(), float(value), gradient)
