"""Fit an autoregressive model of grey levels by maximum likelihood: the baseline of densities that sample in one pass.
"""

from __future__ import annotations

import torch

from stillhouse.models.made import MADE
from stillhouse.protocols import Samples
from stillhouse.run import Run, begin, set_lr
from stillhouse.run.schedules import cosine


def fit_made(
    model: MADE, data: Samples, steps: int = 500, batch: int = 64, lr: float = 1e-3, run: Run | None = None
) -> MADE:
    """`model` trained in place on whole grey levels `x` [entries], by Adam with a cosine to 0."""
    run = begin(run)
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    for content in run.loop("autoregressive", data, batch=batch, steps=steps, model=model, optimizer=optimizer):
        set_lr(optimizer, lr * cosine(run.progress))
        run.update(optimizer, nll=-model.log_prob(content["x"]).mean() / model.entries)
    return model
