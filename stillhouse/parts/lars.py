"""Layer-wise adaptive rate scaling: an optimiser for large batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.optim import Optimizer

from stillhouse.errors import require


class LARS(Optimizer):
    """Momentum SGD whose step is scaled to each layer's weights (You et al. 2017, algorithm 1).

        g <- g + lambda w,    v <- mu v + lr * (eta |w| / |g|) g,    w <- w - v

    Biases and the scales and shifts of normalisations (tensors of fewer than two dimensions) get neither weight decay
    lambda nor the factor eta |w| / |g|, nor do parameter groups with `adapt` False (SimCLR v2: the classifier that is
    fine-tuned). Where one of the norms is 0 the factor is 1. Raises ConfigError for a negative setting.
    """

    def __init__(self, parameters: Iterable[Any], lr: float, momentum: float = 0.9, weight_decay: float = 0.0,
                 trust: float = 1e-3):
        require(min(lr, momentum, weight_decay, trust) >= 0, "lr, momentum, weight_decay and trust must be 0 or more; "
                f"got {lr}, {momentum}, {weight_decay}, {trust}")
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "trust": trust,
                                      "adapt": True})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update; parameters without a gradient are left alone."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for w in group["params"]:
                if w.grad is None:
                    continue
                g, rate = w.grad, group["lr"]
                if w.dim() > 1 and group["adapt"]:
                    g = g.add(w, alpha=group["weight_decay"])
                    size, slope = w.norm(), g.norm()
                    rate = rate * torch.where((size > 0) & (slope > 0), group["trust"] * size / slope, 1.0)
                state = self.state[w]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(w)
                state["momentum_buffer"].mul_(group["momentum"]).add_(rate * g)
                w.sub_(state["momentum_buffer"])
        return loss
