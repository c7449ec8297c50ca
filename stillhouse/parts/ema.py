"""Exponential moving average of a module."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from stillhouse.errors import ConfigError, RoleError, require


class EMA(nn.Module):
    """A frozen copy of a module that follows it: `ema = EMA(student)`, then `ema.update(student, decay)` per step.

    Floating tensors (parameters and buffers) are averaged, theta' <- decay theta' + (1 - decay) theta; all others are
    copied. Tied tensors are averaged once. Calls and missing attributes go to the copy.
    """

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = copy.deepcopy(module).requires_grad_(False)

    @torch.no_grad()
    def update(self, module: nn.Module, decay: float) -> None:
        """Raises ConfigError for a decay outside [0, 1], RoleError for a module of another structure."""
        require(0.0 <= decay <= 1.0, f"decay must lie in [0, 1], not {decay}", ConfigError)
        theirs = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        ours = {**dict(self.module.named_parameters()), **dict(self.module.named_buffers())}
        require(ours.keys() == theirs.keys(), "the average and the module have different tensors, first "
                f"'{next(iter(ours.keys() ^ theirs.keys()), '')}'; average the module it was made of", RoleError)
        for name, average in ours.items():
            if average.is_floating_point() or average.is_complex():
                average.lerp_(theirs[name].to(average.device, average.dtype), 1.0 - decay)
            else:
                average.copy_(theirs[name])

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("module"), name)
