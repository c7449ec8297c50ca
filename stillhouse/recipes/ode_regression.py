"""Regression of noise onto the endpoints of the teacher's probability-flow ODE: the baseline of one-step samplers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from stillhouse.data.sets import TensorSet, as_tensor_set
from stillhouse.diffusion.grids import uniform
from stillhouse.diffusion.samplers import FewStepSampler, at, ode_endpoint
from stillhouse.errors import require
from stillhouse.protocols import Denoiser, Samples
from stillhouse.run import Run, begin, frozen, set_lr
from stillhouse.run.schedules import cosine

CHUNK = 1024


@dataclass(frozen=True)
class Config:
    steps: int = 2000  # updates
    batch: int = 256  # pairs per update
    lr: float = 1e-3  # Adam's learning rate, annealed to 0 by a cosine
    pairs: int = 8192  # noise-endpoint pairs made before training
    ode_steps: int = 32  # Heun steps per pair
    time: float = 1.0  # t at which the student reads the noise
    clip: float = 1.0  # bound on the global gradient norm

    def __post_init__(self):
        require(min(self.steps, self.batch, self.pairs, self.ode_steps) >= 1 and self.lr > 0 and 0 < self.time <= 1,
                f"steps, batch, pairs and ode_steps must be at least 1, lr positive, time in (0, 1]; got {self}")


def distill(
    teacher: Denoiser,
    student: Denoiser,
    data: Samples,
    config: Config = Config(),
    run: Run | None = None,
) -> FewStepSampler:
    """Train `student` in place to map unit noise to where the teacher's ODE takes it.

    `data` gives the shape of a sample and, where the teacher is conditional, the conditions.
    Raises RoleError or DataError where a role does not fit.
    """
    run = begin(run)
    run.check(Denoiser, data, teacher=teacher, student=student)
    assert isinstance(student, nn.Module)
    optimizer = torch.optim.Adam(student.parameters(), lr=config.lr)
    with frozen(teacher):
        pairs = TensorSet(**run.once("pairs", lambda: make_pairs(teacher, data, config.pairs, config.ode_steps)))
        for batch in run.loop("regress", pairs, batch=config.batch, steps=config.steps, student=student,
                              optimizer=optimizer):
            x = student(student.process.prior(batch["z"]), at(config.time, batch["z"]), batch.get("condition"))
            set_lr(optimizer, config.lr * cosine(run.progress))
            run.update(optimizer, clip=config.clip, regression=(x - batch["x"]).square().mean())
    return FewStepSampler(student, (config.time, 0.0))


def make_pairs(teacher: Denoiser, data: Samples, pairs: int, ode_steps: int) -> dict[str, Any]:
    """Noise `z`, endpoint `x` and, where `data` has it, `condition`, drawn from torch's global generator."""
    known = as_tensor_set(data)
    z = torch.randn(pairs, *known.x.shape[1:], device=known.x.device)
    made = {"z": z}
    if "condition" in known.fields:
        made["condition"] = known.condition[torch.randint(len(known), (pairs,))]
    parts = [ode_endpoint(teacher, z[i : i + CHUNK], uniform(ode_steps),
                          made["condition"][i : i + CHUNK] if "condition" in made else None)
             for i in range(0, pairs, CHUNK)]
    return {**made, "x": torch.cat(parts)}
