"""A constraint on a size, kept by multipliers that are trained against the model."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn


class Lagrangian(nn.Module):
    """The augmented Lagrangian of the constraint s = t (Wang, Wohlwend and Lei 2020, section 3.3):

        L = lambda1 (s - t) + lambda2 (s - t)^2

    The multipliers start at 0 and climb: `group` gives them to the model's own optimizer with a negative rate. While
    s < t, lambda1 falls below 0, so that the model's step raises s; lambda2 never decreases.
    """

    def __init__(self) -> None:
        super().__init__()
        self.lambda1 = nn.Parameter(torch.zeros(()))
        self.lambda2 = nn.Parameter(torch.zeros(()))

    def forward(self, s: Float[Tensor, ""], t: float) -> Float[Tensor, ""]:
        """`s` is what the model has now, with gradient, and `t` what it shall have."""
        gap = s - t
        return self.lambda1 * gap + self.lambda2 * gap.square()

    def group(self, rate: float, scale: float = 1.0) -> dict[str, Any]:
        """A parameter group for an optimizer of one rate: gradient ascent at `rate`. `scale` is by how much `rate`
        exceeds that of the other groups, for `set_lr`. Adam and SGD climb at a negative rate without weight decay."""
        return {"params": list(self.parameters()), "lr": -rate, "lr_scale": -scale, "weight_decay": 0.0}
