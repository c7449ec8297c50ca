"""Fit a denoiser to data (denoising score matching), or to another denoiser where weights cannot be copied."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import nn

from stillhouse.diffusion.weights import Weighting, weighted_error, x0_weight
from stillhouse.errors import require
from stillhouse.protocols import Denoiser, Samples
from stillhouse.run import Run, begin, frozen, set_lr
from stillhouse.run.schedules import cosine


@dataclass(frozen=True)
class Config:
    steps: int = 2000  # updates
    batch: int = 256  # samples per update
    lr: float = 1e-3  # Adam's learning rate, annealed to 0 by a cosine
    weight: Weighting = "snr_plus_one"  # weight of the squared error in x0
    grid: int = 0  # draw times i / grid, i = 1..grid; 0 draws them uniformly from [0, 1)
    clip: float = 1.0  # bound on the global gradient norm

    def __post_init__(self):
        require(self.steps >= 0 and self.batch >= 1 and self.lr > 0 and self.grid >= 0,
                f"steps and grid must be 0 or more, batch and lr positive; got {self}")


def distill(
    student: Denoiser,
    data: Samples,
    teacher: Denoiser | None = None,
    config: Config = Config(),
    run: Run | None = None,
) -> nn.Module:
    """Train `student` in place so that its x0 estimate on noised `data` is that of `teacher`, or the data itself.

    Raises RoleError or DataError where a role does not fit.
    """
    run = begin(run)
    run.check(Denoiser, data, student=student, teacher=teacher)
    assert isinstance(student, nn.Module)
    process = student.process
    optimizer = torch.optim.Adam(student.parameters(), lr=config.lr)
    with frozen(teacher) if teacher is not None else nullcontext():
        for batch in run.loop("fit", data, batch=config.batch, steps=config.steps, student=student,
                              optimizer=optimizer):
            x, condition, n = batch["x"], batch.get("condition"), len(batch["x"])
            t = run.randint(1, config.grid + 1, n) / config.grid if config.grid else run.rand(n)
            x_t = process.noise(x, t, run.randn_like(x))
            with torch.no_grad():
                target = x if teacher is None else teacher(x_t, t, condition)
            weight = x0_weight(config.weight, process, t, getattr(student, "sigma_data", 1.0))
            set_lr(optimizer, config.lr * cosine(run.progress))
            run.update(optimizer, clip=config.clip, fit=weighted_error(student(x_t, t, condition), target, weight))
    return student
