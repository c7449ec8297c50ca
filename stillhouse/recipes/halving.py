"""Halving a sampler: the round that progressive distillation is made of, and all rounds as a baseline (Salimans & Ho
2022)."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from stillhouse.diffusion.grids import uniform
from stillhouse.diffusion.samplers import FewStepSampler, SamplerLadder, ddim_step, rollout_target
from stillhouse.diffusion.weights import Weighting, weighted_error, x0_weight
from stillhouse.errors import RoleError, require
from stillhouse.protocols import Denoiser, Samples
from stillhouse.run import Run, begin, frozen, set_lr
from stillhouse.run.schedules import linear

Target = Literal["corrected", "naive"]


@dataclass(frozen=True)
class Config:
    start: int = 16  # DDIM steps of the teacher, a power of two
    steps: int = 500  # updates per round
    batch: int = 256  # samples per update
    lr: float = 1e-3  # Adam's learning rate at the start of a round, linearly to 0 within it
    weight: Weighting = "x0"  # weight of the squared error in x0
    clip: float = 1.0  # bound on the global gradient norm

    def __post_init__(self):
        require(self.start >= 2 and self.start & (self.start - 1) == 0, f"start must be a power of two, 2 or more, got "
                f"{self.start}")
        require(min(self.steps, self.batch) >= 1 and self.lr > 0, f"steps, batch and lr must be positive; got {self}")


def distill(
    teacher: Denoiser,
    student: Denoiser,
    data: Samples,
    config: Config = Config(),
    run: Run | None = None,
) -> SamplerLadder:
    """Samplers of config.start / 2, ..., 2, 1 steps, at uniform times; `student`, as given, is trained in place.

    The first round learns from the teacher's steps, each later one from the student of the round before.
    Raises RoleError or DataError where a role does not fit.
    """
    run = begin(run)
    run.check(Denoiser, data, teacher=teacher, student=student)
    assert isinstance(student, nn.Module)
    process: Any = student.process
    require(process == teacher.process, f"teacher and student must share one noise process, got {teacher.process} and "
            f"{process}", RoleError)
    previous: Denoiser = teacher
    ladder: dict[int, FewStepSampler] = {}
    with frozen(teacher):
        steps = config.start // 2
        while steps >= 1:
            halve(previous, student, data, steps, config.steps, config, run)
            previous = student if steps == 1 else copy.deepcopy(student)
            ladder[steps] = FewStepSampler(previous, uniform(steps), "ddim")
            steps //= 2
    return SamplerLadder(ladder)


class Round(Protocol):
    """What a round reads of a config: batch, lr (linearly to 0 within the round), weight of the error in x0, clip."""

    @property
    def batch(self) -> int: ...
    @property
    def lr(self) -> float: ...
    @property
    def weight(self) -> Weighting: ...
    @property
    def clip(self) -> float: ...


def halve(teacher: Denoiser, student: Any, data: Samples, steps: int, updates: int, config: Round, run: Run,
          target: Target = "corrected") -> None:
    """One round: `student` learns to do with `steps` DDIM steps what `teacher` does with twice as many."""
    process = student.process
    optimizer = torch.optim.Adam(student.parameters(), lr=config.lr)
    for batch in run.loop(f"{steps} steps", data, batch=config.batch, steps=updates, student=student,
                          optimizer=optimizer):
        x, condition = batch["x"], batch.get("condition")
        i = run.randint(1, steps + 1, len(x)).to(x.dtype)
        t, middle, s = i / steps, (i - 0.5) / steps, (i - 1) / steps
        x_t = process.noise(x, t, run.randn_like(x))
        with torch.no_grad():
            wanted = two_step_target(teacher, x_t, (t, middle, s), condition, target)
        error = weighted_error(student(x_t, t, condition), wanted, x0_weight(config.weight, process, t))
        set_lr(optimizer, config.lr * linear(run.progress))
        run.update(optimizer, clip=config.clip, distil=error)


def two_step_target(
    teacher: Denoiser,
    x_t: Tensor,
    times: tuple[Tensor, Tensor, Tensor],
    condition: Tensor | None = None,
    target: Target = "corrected",
) -> Tensor:
    """x~ for the step t -> t'' = times[0] -> times[2] (Salimans & Ho 2022, algorithm 2), or, where `naive`, the
    teacher's second x0 [batch, ...]."""
    if target == "corrected":
        return rollout_target(teacher, x_t, times, condition)
    t, middle, _ = times
    x_middle = ddim_step(teacher.process, x_t, teacher(x_t, t, condition), t, middle)
    return teacher(x_middle, middle, condition)
