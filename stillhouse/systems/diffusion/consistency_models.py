"""Consistency Models (Song, Dhariwal, Chen & Sutskever 2023, arXiv 2303.01469).

A diffusion model, or data alone, becomes a network f(x_t, t) that maps every point of a probability-flow path to the
path's start, so that one call samples and a few more trade compute for quality. On the variance-exploding path
x_t = x + t z, t in [eps, T], with the rho = 7 grid eps = t_1 < ... < t_N = T and n ~ U{1..N - 1}:

    distillation (CD)   x^ = one Heun step of the teacher from x_{n+1} = x + t_{n+1} z down to t_n
    training (CT)       x^ = x + t_n z with the same x and z, no teacher
    loss                lambda d(f_theta(x_{n+1}, t_{n+1}), stopgrad f_theta-(x^, t_n)),  lambda = 1
    target network      theta- <- mu theta- + (1 - mu) theta

    f(x, t) = c_skip(t) x + c_out(t) F(x, t),  c_skip = sd^2 / ((t - eps)^2 + sd^2),  c_out = sd (t - eps) / sqrt(..)

so f(x, eps) = x for any weights; without that, a constant f has no loss. CT starts with few points and lets N(k) grow
and mu(k) fall. A sample is f(T z, T), then, as often as wanted, f(x + sqrt(tau^2 - eps^2) z', tau); the same chain
edits (`stillhouse.diffusion.editing`). The sampler returned has the weights' average over training.

The paper's t is the level sigma of a `VE(eps, T)` process, whose own time runs from 0 to 1; other processes work too.
Deviations: in two dimensions, where LPIPS does not exist, the embedded experiment's d is the pseudo-Huber metric, and
the continuous-time losses (appendix B) are not built. mu(k) is the paper's; the released code divides by N(k) - 1.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from stillhouse.data.densities import gauss2d, ring
from stillhouse.data.sets import TensorSet
from stillhouse.diffusion.consistency import (
    Solver,
    consistency_pair,
    decay_at,
    follow,
    greedy_times,
    points_at,
    rho_grid,
    solver_step,
)
from stillhouse.diffusion.convert import Parameterisation
from stillhouse.diffusion.denoise import NetworkDenoiser, copy_weights
from stillhouse.diffusion.editing import edit, inpainting
from stillhouse.diffusion.grids import Times, check_times, uniform
from stillhouse.diffusion.process import VE
from stillhouse.diffusion.samplers import FewStepSampler
from stillhouse.errors import RoleError, require
from stillhouse.evaluate.claims import Claim
from stillhouse.evaluate.distances import energy_distance, rmse
from stillhouse.measures.sample_distances import Metric, sample_distance
from stillhouse.models.denoisers import MLPDenoiser
from stillhouse.parts.ema import EMA
from stillhouse.protocols import Denoiser, Encoder, Samples
from stillhouse.recipes import halving
from stillhouse.run import Run, begin, frozen, set_lr
from stillhouse.run.check import first_batch
from stillhouse.run.pictures import scatter
from stillhouse.run.schedules import cosine
from stillhouse.zoo.denoisers import gauss2d_teacher

NUMBER = 106
CLAIMS = [
    Claim("one call of the distilled model samples nearer to the data than a Heun step of the teacher (two calls)",
          lambda a: a["heun"]["energy_2"] - a["cd"]["energy_1"]),
    Claim("two calls of the distilled model sample nearer to the data than two Heun steps of the teacher (four calls)",
          lambda a: a["heun"]["energy_4"] - a["cd"]["energy_2"]),
    Claim("distilled with Heun steps, one call ends nearer to the exact flow than distilled with Euler steps",
          lambda a: a["cd, Euler"]["rmse_1"] - a["cd"]["rmse_1"]),
    Claim("the boundary condition brings one call nearer to the exact flow than a free network",
          lambda a: a["cd, free network"]["rmse_1"] - a["cd"]["rmse_1"]),
    Claim("distillation samples nearer to the data than training from data alone, one call",
          lambda a: a["ct"]["energy_1"] - a["cd"]["energy_1"]),
    Claim("consistency distillation beats progressive distillation with as many updates, one call (energy distance)",
          lambda a: a["pd"]["energy_1"] - a["cd"]["energy_1"], report=True),
    Claim("consistency distillation beats progressive distillation with as many updates, two calls (energy distance)",
          lambda a: a["pd"]["energy_2"] - a["cd"]["energy_2"], report=True),
    Claim("a second call brings samples nearer to the data",
          lambda a: a["cd"]["energy_1"] - a["cd"]["energy_2"], report=True),
    Claim("the curriculum brings training from data nearer to the data than its last grid from the start",
          lambda a: a["ct, no curriculum"]["energy_1"] - a["ct"]["energy_1"], report=True),
    Claim("a target network that lags (mu 0.9) brings one call nearer to the exact flow than a detached copy (mu 0)",
          lambda a: a["cd, mu 0"]["rmse_1"] - a["cd"]["rmse_1"], report=True),
    Claim("made coordinates fit the known ones of a point better than those of independent samples (editing)",
          lambda a: a["cd"]["edit_0"] - a["cd"]["edit_4"], report=True),
    Claim("training from data needs one z for both points of a pair",
          lambda a: a["ct, fresh noise"]["energy_1"] - a["ct"]["energy_1"], report=True),
]


@dataclass(frozen=True)
class Config:
    steps: int = 800_000  # K, updates
    batch: int = 512  # samples per update
    points: int = 18  # N, points of the grid in distillation (40 on ImageNet 64)
    mu: float = 0.0  # decay of the target network in distillation (0.95 on ImageNet 64)
    solver: Solver = "heun"  # the teacher's step from t_{n+1} to t_n
    s0: int = 2  # N at the start of training without a teacher
    s1: int = 150  # N at its end, less one (200 on ImageNet 64); s1 = s0 - 1 keeps N
    mu0: float = 0.9  # decay of its target network at the start (0.95 on ImageNet 64)
    pair: Literal["same", "fresh"] = "same"  # without a teacher both points of a pair have one z, or each its own
    metric: Metric = "lpips"  # d; lpips needs the role `perceptual`
    rho: float = 7.0  # of the grid; 0 spaces it evenly in the process's own time
    boundary: Literal["exact", "free"] = "exact"  # refuse a student with f(x, eps) != x, or take it
    init: Literal["teacher", "given"] = "teacher"  # start from the teacher's weights (if any), or from the student
    lr: float = 4e-4  # RAdam's learning rate
    last_lr: float = 1.0  # its last value as a multiple of lr, reached along a cosine; 1 keeps it constant
    ema: float = 0.9999  # decay of the average of the weights that is returned; 0 for none
    times: Times = (1.0, 0.0)  # t at which the returned sampler calls f, e.g. 1 0.4 0 for two calls
    bound: float | None = None  # samples are clipped to [-bound, bound] (the data range of pictures: 1)

    def __post_init__(self):
        require(min(self.steps, self.batch) >= 1 and self.lr > 0, f"steps, batch and lr must be positive; got {self}")
        require(self.points >= 2 and self.s0 >= 2 and self.s1 >= self.s0 - 1,
                f"points and s0 must be at least 2, s1 at least s0 - 1; got {self.points}, {self.s0}, {self.s1}")
        require(0 <= self.mu < 1 and 0 <= self.mu0 < 1 and 0 <= self.ema < 1,
                f"mu, mu0 and ema are decays in [0, 1); got {self.mu}, {self.mu0}, {self.ema}")
        check_times(self.times)


EMBEDDED = Config(steps=1800, batch=256, mu=0.9, s1=40, metric="pseudo_huber", init="given", lr=2e-3, last_lr=0.0,
                  ema=0.9)


def distill(
    student: Denoiser,
    data: Samples,
    teacher: Denoiser | None = None,
    perceptual: Encoder | None = None,
    config: Config = Config(),
    run: Run | None = None,
) -> FewStepSampler:
    """A sampler of len(config.times) - 1 calls; `student` is trained in place, from `teacher` or from `data` alone.

    `data` has the field `x`, and `condition` where the student is conditional; `perceptual` makes the features that
    the metric lpips compares. A student given in train mode keeps its dropout, with equal masks at both points of a
    pair. Raises RoleError, DataError or ConfigError, before any update, where roles or settings
    do not fit.
    """
    run = begin(run)
    run.check(Denoiser, data, teacher=teacher, student=student)
    assert isinstance(student, nn.Module)
    _check(teacher, student, perceptual, data, config)
    if teacher is not None and config.init == "teacher":
        copy_weights(_module(teacher), student)
    process: Any = student.process
    target, average = EMA(student), EMA(student)
    optimizer = torch.optim.RAdam(student.parameters(), lr=config.lr)
    with frozen(teacher, perceptual):
        for batch in run.loop("consistency", data, batch=config.batch, steps=config.steps, student=student,
                              target=target, average=average, optimizer=optimizer):
            x, condition = batch["x"], batch.get("condition")
            points, mu = schedule(run.k, teacher is not None, config)
            grid = rho_grid(points, process, config.rho).to(x)
            n = run.randint(0, points - 1, len(x))
            t, s, z = grid[n + 1], grid[n], run.randn_like(x)
            x_t = process.noise(x, t, z)
            if teacher is not None:
                x_s = solver_step(config.solver, teacher, x_t, t, s, condition)
            else:
                x_s = process.noise(x, s, z if config.pair == "same" else run.randn_like(x))
            set_lr(optimizer, config.lr * (config.last_lr + (1 - config.last_lr) * cosine(run.progress)))
            f, goal = consistency_pair(student, target, x_t, t, x_s, s, condition=condition)
            run.update(optimizer, consistency=sample_distance(config.metric, f, goal, perceptual).mean())
            target.update(student, mu)
            average.update(student, config.ema)
    return FewStepSampler(average.module.eval(), config.times, "consistency", config.bound)  # type: ignore[arg-type]


def schedule(k: int, distilling: bool, config: Config) -> tuple[int, float]:
    """N and mu of update k: fixed in distillation, by the curriculum in training from data."""
    if distilling:
        return config.points, config.mu
    points = points_at(k, config.steps, config.s0, config.s1)
    return points, decay_at(points, config.s0, config.mu0)


def _check(teacher: Any, student: Any, perceptual: Any, data: Any, config: Config) -> None:
    rho_grid(config.points, student.process, config.rho)
    require(config.metric != "lpips" or perceptual is not None, "the metric lpips compares features: give "
            "perceptual=…, a network of pictures, or set metric to l2, l1 or pseudo_huber", RoleError)
    if teacher is not None:
        require(student.process == teacher.process, "teacher and student must share one noise process, got "
                f"{teacher.process} and {student.process}", RoleError)
        require(config.init == "given" or any(True for _ in _module(teacher).parameters()), "the teacher has no "
                "weights to copy (an exact density?); set init='given'", RoleError)
    batch = first_batch(data, ("x",))
    device = next(student.parameters()).device
    x, condition = batch["x"].to(device), batch.get("condition")
    if perceptual is not None:
        try:
            with frozen(perceptual), torch.no_grad():
                sample_distance("lpips", x, x, perceptual)
        except Exception as error:
            raise RoleError(f"perceptual ({type(perceptual).__name__}) makes no features of samples of shape "
                            f"{tuple(x.shape[1:])}: {type(error).__name__}: {error}") from error
    if config.boundary == "exact":
        with torch.no_grad():
            f = student(x, torch.zeros(len(x), device=device), None if condition is None else condition.to(device))
        require(torch.allclose(f, x, rtol=1e-4, atol=1e-4), "the student breaks the boundary condition f(x, 0) = x, "
                "without which a constant has no loss; build it as NetworkDenoiser(…, boundary=True), or set "
                "boundary='free'", RoleError)


def _module(model: Any) -> nn.Module:
    return model if isinstance(model, nn.Module) else nn.Module()


def experiment(run: Run) -> dict[str, dict[str, float]]:
    """A ring of 8 Gaussians of standard deviation 0.5 in all, its exact teacher with T = 10, and an MLP student.

    rmse: distance to where the teacher's flow takes the same noise. energy: energy distance to fresh data. The time of
    the second call is searched on training data. `ct` has the data only.
    """
    centres, process = ring(8, 0.7), VE(0.002, 10.0)
    data: Any = gauss2d(20_000, centres, 0.07, seed=run.seed)
    true = gauss2d(10_000, centres, 0.07, seed=run.seed + 10_000).x
    teacher = gauss2d_teacher(process, centres, 0.07)
    z, again = torch.randn(5000, 2), torch.randn(5000, 2)
    start = process.prior(z)
    endpoint = follow("heun", teacher, start, uniform(256))

    def measure(x: Tensor, calls: int) -> dict[str, float]:
        return {f"rmse_{calls}": rmse(x, endpoint), f"energy_{calls}": energy_distance(x, true)}

    def calls(sampler: FewStepSampler) -> dict[str, float]:
        def sample(times: Times, n: int = 5000) -> Tensor:
            return FewStepSampler(sampler.denoiser, times, "consistency")(z[:n], noise=lambda x: again[:n])

        with torch.no_grad():
            two = greedy_times(lambda times: energy_distance(sample(times, 1000), data.x[:1000]), 2, low=0.2)
            run.picture("one call", scatter(data=true, samples=sample((1.0, 0.0))))
            return {**measure(sample((1.0, 0.0)), 1), **measure(sample(two), 2), "second time": two[1]}

    def train(kind: Parameterisation = "edm", teacher: Denoiser | None = teacher, **changes: Any) -> FewStepSampler:
        student = NetworkDenoiser(MLPDenoiser((2,), 128, 3), process, kind, 0.5, boundary=kind == "edm")
        return distill(student, data, teacher, config=replace(EMBEDDED, **changes), run=run)

    def progressive() -> dict[str, float]:
        student = NetworkDenoiser(MLPDenoiser((2,), 128, 3), process, "edm", 0.5)
        config = halving.Config(16, EMBEDDED.steps // 4, EMBEDDED.batch, EMBEDDED.lr)
        ladder = halving.distill(teacher, student, data, config, run)
        with torch.no_grad():
            return {**measure(ladder[1](z), 1), **measure(ladder[2](z), 2)}

    def editing(sampler: FewStepSampler) -> dict[str, float]:
        """The first coordinate of true points is known, the second is made in n calls; 0 puts it into samples."""
        model, kept = sampler.denoiser, inpainting(torch.tensor([True, False]))
        x = {n: edit(model, true[:5000], kept, uniform(n)) for n in (2, 4, 8)}
        with torch.no_grad():
            x[0] = kept.project(sampler(z), true[:5000])
        return {f"edit_{n}": energy_distance(x[n], true) for n in x}

    def system() -> dict[str, float]:
        sampler = train()
        return {**calls(sampler), **editing(sampler)}

    no_teacher = partial(train, teacher=None)
    return run.arms(
        {
            "heun": lambda: {**measure(follow("heun", teacher, start, uniform(1)), 2),
                             **measure(follow("heun", teacher, start, uniform(2)), 4)},
            "cd": system,
            "cd, Euler": lambda: calls(train(solver="euler")),
            "cd, free network": lambda: calls(train("x0", boundary="free")),
            "ct": lambda: calls(no_teacher()),
            "pd": progressive,
        },
        extended={
            "cd, mu 0": lambda: calls(train(mu=0.0)),
            "cd, l2": lambda: calls(train(metric="l2")),
            "ct, no curriculum": lambda: calls(no_teacher(s0=41, s1=40)),
            "ct, fresh noise": lambda: calls(no_teacher(pair="fresh")),
        },
    )


def tiny() -> dict[str, Any]:
    """Arguments of `distill` for the contract test: conditional distillation, dropout, a moving target."""
    torch.manual_seed(0)

    def denoiser(boundary: bool) -> NetworkDenoiser:
        return NetworkDenoiser(MLPDenoiser((2,), 8, 2, classes=3), VE(0.05, 5.0), "edm", 0.5, boundary=boundary)

    data = TensorSet(x=torch.randn(24, 2), condition=torch.arange(24) % 3)
    return {"student": denoiser(True), "data": data, "teacher": denoiser(False),
            "config": replace(EMBEDDED, steps=4, batch=8, mu=0.5, metric="l2", init="teacher", ema=0.5)}
