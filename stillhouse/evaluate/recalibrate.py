"""Running statistics that fit a network's weights: measured anew where the weights, or the paths, were changed."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from stillhouse.data.sets import fetch
from stillhouse.errors import DataError, require


@torch.no_grad()
def recalibrated(model: nn.Module, data: Any, batch: int = 256, device: torch.device | str = "cpu") -> nn.Module:
    """A copy in eval mode whose BatchNorm layers have the statistics of the pictures of `data`: the mean over batches,
    a last incomplete one left out. Raises DataError for fewer than two pictures."""
    require(len(data) >= 2, f"statistics need two pictures or more, not {len(data)}", DataError)
    made = copy.deepcopy(model).eval()
    norms = [m for m in made.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
        norm.train()
    size = min(batch, len(data))
    for start in range(0, len(data) - size + 1, size):
        made(fetch(data, range(start, start + size))["image"].to(device))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    return made.eval()
