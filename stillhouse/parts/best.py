"""The best checkpoint seen so far, kept in memory and in the stage's state."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn


class Best:
    """The weights that gave the highest score. Holds the trained parameters and all buffers, on the CPU."""

    def __init__(self) -> None:
        self.score = -math.inf
        self.weights: dict[str, Tensor] = {}

    def offer(self, score: float, model: nn.Module) -> bool:
        """Keep the weights of `model` if `score` is higher than every one before; whether it was."""
        if not score > self.score:
            return False
        self.score = score
        self.weights = {name: value.detach().cpu().clone() for name, value in _kept(model).items()}
        return True

    @torch.no_grad()
    def restore(self, model: nn.Module) -> None:
        """Put the best weights back; nothing happens if none was ever offered."""
        current = _kept(model)
        for name, value in self.weights.items():
            current[name].copy_(value)

    def state_dict(self) -> dict[str, Any]:
        return {"score": self.score, "weights": dict(self.weights)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.score, self.weights = state["score"], {n: v.cpu() for n, v in state["weights"].items()}


def _kept(model: nn.Module) -> dict[str, Tensor]:
    trained = {name: value for name, value in model.named_parameters() if value.requires_grad}
    return {**trained, **dict(model.named_buffers())}
