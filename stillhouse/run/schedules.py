"""Schedules as pure functions of progress p = k / steps in [0, 1]: no scheduler objects, nothing to save."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch.optim import Optimizer


def constant(p: float) -> float:
    return 1.0


def linear(p: float) -> float:
    """From 1 to 0 in a straight line."""
    return 1.0 - p


def cosine(p: float) -> float:
    """From 1 to 0 along half a cosine (Loshchilov and Hutter 2017, equation 5, without restarts)."""
    return 0.5 * (1.0 + math.cos(math.pi * p))


def warmup(p: float, fraction: float) -> float:
    """From 0 to 1 in the first `fraction` of the stage, then 1."""
    return 1.0 if fraction <= 0 else min(1.0, p / fraction)


def warmup_cosine(p: float, fraction: float) -> float:
    """Linear warm-up, then a cosine over what is left."""
    return warmup(p, fraction) if p < fraction else cosine((p - fraction) / (1.0 - fraction))


def warmup_linear(p: float, fraction: float) -> float:
    """Linear warm-up, then a straight line to 0 over what is left."""
    return warmup(p, fraction) if p < fraction else linear((p - fraction) / (1.0 - fraction))


def piecewise(p: float, drops: Sequence[tuple[float, float]]) -> float:
    """The product of the factors of all drops (start, factor) whose start has been reached."""
    return math.prod(factor for start, factor in drops if p >= start)


def set_lr(optimizer: Optimizer, lr: float) -> None:
    """Set the learning rate of every parameter group, times the group's own `lr_scale` where it has one."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)
