"""Progressive Distillation for Fast Sampling of Diffusion Models (Salimans & Ho 2022, arXiv 2202.00512).

A denoiser whose DDIM sampler takes N steps is distilled into a copy that needs N / 2, again and again down to one.
In a round with N student steps, i ~ U{1..N}, t = i / N, t' = t - 0.5 / N, t'' = t - 1 / N:

    x_t  = alpha_t x + sigma_t eps
    x_t'' = two DDIM steps of the teacher, t -> t' -> t''
    x~   = (x_t'' - r x_t) / (alpha_t'' - r alpha_t),  r = sigma_t'' / sigma_t   (for t'' = 0: the teacher's last x0)
    loss = w(t) |x~ - x_student(x_t, t)|^2,  w = max(SNR, 1), SNR + 1 or SNR

so that one DDIM step of the student lands where two of the teacher's do. Then the student becomes the teacher. The
target `naive` is the teacher's second x0, right only where t'' = 0.

The student may predict x0, v, (x, eps) or eps; eps says nothing about x0 where alpha = 0. Where the teacher has no
weights to copy (an exact density) or another parameterisation, the student is first fitted to it at the times of its
own N steps. Dropout is off (eval mode) throughout, as in the paper.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import nn

from stillhouse.data.densities import gauss2d, ring
from stillhouse.data.sets import TensorSet
from stillhouse.diffusion.convert import Parameterisation
from stillhouse.diffusion.denoise import NetworkDenoiser, copy_weights
from stillhouse.diffusion.grids import uniform
from stillhouse.diffusion.process import VPCosine, VPTable
from stillhouse.diffusion.samplers import FewStepSampler, SamplerLadder, ode_endpoint
from stillhouse.diffusion.weights import Weighting
from stillhouse.errors import RoleError, require
from stillhouse.evaluate.claims import Arms, Claim
from stillhouse.evaluate.distances import energy_distance, rmse
from stillhouse.models.denoisers import MLPDenoiser
from stillhouse.protocols import Denoiser, Samples
from stillhouse.recipes import score_fitting
from stillhouse.recipes.halving import halve
from stillhouse.run import Run, begin, frozen
from stillhouse.zoo.denoisers import gauss2d_teacher

NUMBER = 79


def below(arm: str, metric: str) -> Callable[[Arms], float]:
    """By how much the metric of pd is smaller than that of another arm."""
    return lambda arms: arms[arm][metric] - arms["pd"][metric]


CLAIMS = [
    *(Claim(f"{n}-step students end nearer to the exact flow than {n}-step DDIM of their teacher",
            below("ddim", f"rmse_{n}")) for n in (4, 2, 1)),
    *(Claim(f"{n}-step samples are nearer to the data than {n}-step DDIM of the teacher",
            below("ddim", f"energy_{n}")) for n in (4, 2, 1)),
    *(Claim(f"with {n} steps the corrected target beats the teacher's second x0 as a target (energy distance)",
            below("naive", f"energy_{n}")) for n in (4, 2)),
    Claim("with 1 step the corrected target beats the teacher's second x0 as a target (energy distance)",
          below("naive", "energy_1"), report=True),
]


@dataclass(frozen=True)
class Config:
    start: int = 8192  # N, DDIM steps of the teacher; a power of two times `end`
    end: int = 1  # steps of the last student
    steps: int = 50_000  # updates per round
    last: float = 1.0  # updates of the rounds with one and two steps, as a multiple of `steps` (2 in the paper's text)
    fit: float = 0.0  # updates of the initial fit to the teacher, as a multiple of `steps`; 0 for none
    fit_lr: float = 1e-3  # learning rate of the initial fit, annealed by a cosine
    init: Literal["teacher", "given"] = "teacher"  # copy the teacher's weights, or start from the student as given
    batch: int = 128  # samples per update
    lr: float = 5e-5  # Adam's learning rate at the start of a round, linearly to 0 within it
    clip: float = 1.0  # bound on the global gradient norm
    weight: Weighting = "truncated_snr"  # w, weight of the squared error in x0
    target: Literal["corrected", "naive"] = "corrected"  # x~, or the teacher's second x0
    keep: int = 8  # students of at most so many steps are returned
    bound: float | None = None  # x0 is clipped to [-bound, bound] when sampling (the data range of pictures: 1)

    def __post_init__(self):
        halvings = (self.start // max(self.end, 1)).bit_length() - 1
        require(self.end >= 1 and halvings >= 1 and self.start == self.end << halvings,
                f"start must be end times a power of two, got {self.start} and {self.end}")
        require(min(self.steps, self.batch) >= 1 and min(self.lr, self.fit_lr, self.clip, self.last) > 0 <= self.fit,
                f"steps, batch, lr, fit_lr, clip and last must be positive, fit 0 or more; got {self}")


EMBEDDED = Config(start=64, steps=600, fit=3.0, init="given", batch=256, lr=1e-3)


def distill(
    teacher: Denoiser,
    student: Denoiser,
    data: Samples,
    config: Config = Config(),
    run: Run | None = None,
) -> SamplerLadder:
    """Samplers of `config.keep`, ..., `config.end` steps; `student`, trained in place, is the last one's network.

    `data` (field `x`, and `condition` where the models are conditional) only makes the noisy inputs.
    Raises RoleError, DataError or ConfigError, before any update, where roles or settings do not fit.
    """
    run = begin(run)
    run.check(Denoiser, data, teacher=teacher, student=student)
    assert isinstance(student, nn.Module)
    _check(teacher, student, config)
    student.eval()
    if config.init == "teacher":
        copy_weights(_module(teacher), student)
    ladder: dict[int, FewStepSampler] = {}
    with frozen(teacher):
        if config.fit:
            fitting = score_fitting.Config(steps=round(config.fit * config.steps), batch=config.batch, lr=config.fit_lr,
                                           grid=config.start, clip=config.clip)
            with run.scope("fit"):
                score_fitting.distill(student, data, teacher, fitting, run)
        previous, steps = teacher, config.start // 2
        while steps >= config.end:
            updates = round(config.steps * (config.last if steps <= 2 else 1.0))
            halve(previous, student, data, steps, updates, config, run, config.target)
            previous = student if steps == config.end else copy.deepcopy(student)
            if steps <= max(config.keep, config.end):
                ladder[steps] = FewStepSampler(previous, uniform(steps), "ddim", config.bound)
            steps //= 2
    return SamplerLadder(ladder)


def _check(teacher: Denoiser, student: Denoiser, config: Config) -> None:
    ours, theirs = student.process, teacher.process
    require(ours == theirs, f"teacher and student must share one noise process, got {theirs} and {ours}", RoleError)
    kinds = [getattr(model, "parameterisation", None) for model in (teacher, student)]
    if config.init == "teacher":
        require(any(True for _ in _module(teacher).parameters()), "the teacher has no weights to copy (an exact "
                "density?); set init='given' and fit=1 or more", RoleError)
        require(kinds[0] == kinds[1] or config.fit > 0, f"the teacher predicts {kinds[0]} and the student {kinds[1]}: "
                "weights alone do not carry over; set fit=1 or so to fit the student first", RoleError)
    silent = kinds[1] == "eps" and abs(float(ours.alpha(torch.ones(())))) < 1e-6
    require(not silent, "an eps-predicting student says nothing about x0 at t = 1, where this process has no signal; "
            "wrap it as v or x0, and set fit", RoleError)
    require(not isinstance(ours, VPTable) or config.start <= ours.timesteps, f"{config.start} steps do not fit "
            "on a schedule of fewer timesteps; lower start", RoleError)


def _module(model: Any) -> nn.Module:
    return model if isinstance(model, nn.Module) else nn.Module()


def experiment(run: Run) -> dict[str, dict[str, float]]:
    """The ring of 8 Gaussians (std 0.08), its exact teacher, and an MLP student halved from 64 steps to 1.

    The rounds down to 8 steps are shared by all arms: targets are compared from there on, at equal updates.
    """
    centres, process = ring(8), VPCosine()
    data: Any = gauss2d(20_000, centres, 0.08, seed=run.seed)
    teacher = gauss2d_teacher(process, centres, 0.08)
    z = torch.randn(5000, 2)
    true, endpoint = data.x[:10_000], ode_endpoint(teacher, z, uniform(256))

    def measure(samplers: dict[int, FewStepSampler]) -> dict[str, float]:
        with torch.no_grad():
            samples = {n: sampler(z) for n, sampler in sorted(samplers.items())}
        return {**{f"rmse_{n}": rmse(x, endpoint) for n, x in samples.items()},
                **{f"energy_{n}": energy_distance(x, true) for n, x in samples.items()}}

    def trunk(config: Config, kind: Parameterisation = "v") -> FewStepSampler:
        outputs = 2 if kind == "joint" else 1
        student = NetworkDenoiser(MLPDenoiser((2,), 128, 3, outputs=outputs), process, kind)
        with run.scope("trunk"):
            return distill(teacher, student, data, config, run)[8]

    def arm(start: FewStepSampler, **changes: Any) -> dict[str, float]:
        config = replace(EMBEDDED, start=8, fit=0.0, **changes)
        ladder = distill(start.denoiser, copy.deepcopy(start.denoiser), data, config, run)
        return measure({8: start, **{n: ladder[n] for n in ladder.rungs}})

    def other(kind: Parameterisation = "v", **changes: Any) -> dict[str, float]:
        return arm(trunk(replace(EMBEDDED, end=8, **changes), kind), **changes)

    shared = trunk(replace(EMBEDDED, end=8))
    return run.arms(
        {
            "ddim": lambda: measure({n: FewStepSampler(teacher, uniform(n)) for n in (8, 4, 2, 1)}),
            "pd": lambda: arm(shared),
            "naive": lambda: arm(shared, target="naive"),
        },
        extended={
            "v, weight SNR + 1": lambda: other(weight="snr_plus_one"),
            "v, weight SNR": lambda: other(weight="snr"),
            "x0": lambda: other("x0"),
            "(x, eps)": lambda: other("joint"),
            "eps": lambda: other("eps"),
            "eps, weight SNR": lambda: other("eps", weight="snr"),
        },
    )


def tiny() -> dict[str, Any]:
    """Arguments of `distill` for the contract test."""
    torch.manual_seed(0)
    teacher, student = (NetworkDenoiser(MLPDenoiser((2,), 8, 2), VPCosine(), "v") for _ in range(2))
    data = TensorSet(x=torch.randn(24, 2))
    return {"teacher": teacher, "student": student, "data": data,
            "config": Config(start=8, steps=2, fit=1.0, batch=8, lr=1e-3)}
