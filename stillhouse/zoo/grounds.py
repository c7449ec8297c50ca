"""Grounds on which systems are compared: the same models, data, budget and measures for everyone who enters."""

from __future__ import annotations

import dataclasses
import inspect
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from stillhouse.data.densities import gauss2d, ring
from stillhouse.data.digits import digits
from stillhouse.data.sets import concatenate
from stillhouse.diffusion.denoise import NetworkDenoiser
from stillhouse.diffusion.grids import uniform
from stillhouse.diffusion.process import VE, VPCosine
from stillhouse.diffusion.samplers import FewStepSampler, ode_endpoint
from stillhouse.errors import RoleError, require
from stillhouse.evaluate.classification import accuracy
from stillhouse.evaluate.cost import parameters
from stillhouse.evaluate.distances import energy_distance, modes_hit, rmse
from stillhouse.evaluate.size import full_bits, model_size
from stillhouse.models.convnets import TinyConvNet
from stillhouse.models.denoisers import MLPDenoiser
from stillhouse.parts.packed import QuantizedModel
from stillhouse.recipes import kd, ode_regression, supervised
from stillhouse.recipes.views import random_view
from stillhouse.run import Run
from stillhouse.zoo.classifiers import digits_classifier, digits_teacher
from stillhouse.zoo.denoisers import gauss2d_teacher

Metrics = dict[str, float]
Roles = dict[str, Any]


@dataclass(frozen=True)
class Ground:
    """What everyone gets and how everyone is measured.

    `roles(run, **options)` makes fresh models and data for one entrant, `measure(target, run)` its metrics, the first
    of which ranks the entrants. `baselines`, functions of (run, roles), enter with every comparison. `budget` is set on
    every field of that name in an entrant's config; what it counts is said in `sentence`. `students` are the options of
    `roles` for students of several sizes, by name; everyone distils into each, and the one called `main` ranks.
    """

    title: str
    sentence: str
    better: dict[str, str]
    budget: dict[str, Any]
    roles: Callable[..., Roles]
    measure: Callable[[Any, Run], Metrics]
    baselines: dict[str, Callable[..., Any]]
    students: dict[str, dict[str, Any]] = field(default_factory=lambda: {"": {}})
    main: str = ""


def enter(ground: Ground, module: Any, run: Run, config: dict[str, Any] | None = None,
          options: dict[str, Any] | None = None) -> Metrics:
    """What a system's module reaches on a ground with its `EMBEDDED` config, the ground's budget and the changes in
    `config`; `options` go to the ground's roles.

    Raises RoleError where the system needs a role that the ground does not have.
    """
    run.begin()
    roles = ground.roles(run, **options or {})
    return _timed(ground, run, lambda: distilled(ground, module, roles, run, config))


def distilled(ground: Ground, module: Any, roles: Roles, run: Run, config: dict[str, Any] | None = None) -> Any:
    """What a system's `distill` makes of a ground's roles; see `enter`."""
    wanted = inspect.signature(module.distill).parameters
    absent = [name for name, p in wanted.items() if p.default is inspect.Parameter.empty and name not in roles]
    require(not absent, f"the ground '{ground.title}' has no {' and no '.join(absent)}; it has {', '.join(roles)}",
            RoleError)
    given = {name: roles[name] for name in wanted if name in roles}
    return module.distill(**given, config=config_on(ground, module, config), run=run)


def config_on(ground: Ground, module: Any, config: dict[str, Any] | None = None) -> Any:
    """A system's `EMBEDDED` config with the ground's budget and the changes in `config`."""
    fields = {f.name for f in dataclasses.fields(module.EMBEDDED)}
    return _changed(module.EMBEDDED, {**{k: v for k, v in ground.budget.items() if k in fields}, **(config or {})})


def baseline(ground: Ground, name: str, run: Run, options: dict[str, Any] | None = None) -> Metrics:
    """What one of the ground's baselines reaches; `options` go to the ground's roles."""
    run.begin()
    roles = ground.roles(run, **options or {})
    return _timed(ground, run, lambda: ground.baselines[name](run, roles))


def _changed(config: Any, changes: dict[str, Any]) -> Any:
    """JSON knows no tuples: a list becomes one where the config has one."""
    fitted = {k: tuple(v) if isinstance(v, list) else v for k, v in changes.items()}
    return dataclasses.replace(config, **fitted)


def _timed(ground: Ground, run: Run, work: Callable[[], Any]) -> Metrics:
    start = time.monotonic()
    target = work()
    seconds = time.monotonic() - start
    return {**ground.measure(target, run), "training seconds": seconds}


# -------------------------------------------------------------------- digits: a small classifier from a big one

_TRAINING: dict[str, Any] = {"steps": 500, "batch": 64, "optimizer": "adamw", "weight_decay": 1e-4}
_LABELLED, _UNLABELLED = 100, 1000


def _digits_roles(run: Run, width: int = 8) -> Roles:
    train = digits(16, "train")
    labelled = train.select(range(_LABELLED))
    teacher, second = digits_teacher(16), digits_classifier("vit", 16, steps=1500)

    def network() -> nn.Module:
        return TinyConvNet(width=width).to(run.device)

    return {"teacher": teacher.to(run.device), "teachers": [teacher.to(run.device), second.to(run.device)],
            "student": network(), "network": network, "data": labelled, "labelled": labelled,
            "unlabelled": train.select(range(_LABELLED, _UNLABELLED)).without("label"),
            "validation": train.select(range(_UNLABELLED, 1200))}


def _digits_measure(target: Any, run: Run) -> Metrics:
    model, bits = target, None
    if isinstance(target, QuantizedModel):
        size = model_size(target)
        model, bits = target.model, size.quantized + size.rest
    return {"accuracy": accuracy(model, digits(16, "test"), device=run.device), "parameters": float(parameters(model)),
            "kilobytes": (bits or full_bits(target)) / 8192}


def _student_alone(run: Run, roles: Roles, lr: float = 0.01) -> nn.Module:
    return supervised.train(roles["student"], roles["labelled"], supervised.Config(**_TRAINING, lr=lr), run,
                            lambda x: random_view(x, run))


def _plain_kd(run: Run, roles: Roles, lr: float = 0.08) -> nn.Module:
    return kd.distill(roles["teacher"], roles["student"], roles["labelled"], kd.Config(**_TRAINING, lr=lr), run,
                      lambda x: random_view(x, run))


def _kd_without_labels(run: Run, roles: Roles, lr: float = 0.02) -> nn.Module:
    pool = concatenate(roles["labelled"].without("label"), roles["unlabelled"])
    return kd.distill(roles["teacher"], roles["student"], None, kd.Config(**_TRAINING, lr=lr, alpha=1.0), run,
                      lambda x: random_view(x, run), unlabelled=pool)


# -------------------------------------------------------------------- gauss2d: one-step samplers of a known density

_CENTRES, _STD = ring(8), 0.15
_UPDATES = 4000


def _gauss2d_roles(run: Run, process: str = "ve", parameterisation: str = "edm", boundary: bool = False) -> Roles:
    noise = VE(0.05, 5.0, rho=0) if process == "ve" else VPCosine()
    data = gauss2d(20_000, _CENTRES, _STD, seed=run.seed)

    def network() -> NetworkDenoiser:
        kind: Any = parameterisation
        scale = 1.4 if kind == "edm" else 1.0
        return NetworkDenoiser(MLPDenoiser((2,), 64, 3), noise, kind, sigma_data=scale, boundary=boundary
                               ).to(run.device)

    return {"teacher": gauss2d_teacher(noise, _CENTRES, _STD).to(run.device), "student": network(), "network": network,
            "data": data, "real": data}


def _gauss2d_measure(target: Any, run: Run) -> Metrics:
    generator = torch.Generator().manual_seed(run.seed)
    z = torch.randn(5000, 2, generator=generator)
    true = gauss2d(5000, _CENTRES, _STD, seed=run.seed + 10_000).x
    with torch.no_grad():
        x = target(z.to(run.device)).cpu()
    return {"energy distance": energy_distance(x, true), "modes of 8": float(modes_hit(x, _CENTRES, 3 * _STD)),
            "distance to the exact flow": rmse(x, _exact_flow(z, _process_of(target)))}


def _process_of(target: Any) -> Any:
    sampler = target[target.rungs[-1]] if hasattr(target, "rungs") else target
    return sampler.denoiser.process


def _exact_flow(z: torch.Tensor, process: Any) -> torch.Tensor:
    return ode_endpoint(gauss2d_teacher(process, _CENTRES, _STD), z, uniform(256))


def _ode_pairs(run: Run, roles: Roles) -> FewStepSampler:
    config = ode_regression.Config(steps=_UPDATES, batch=256)
    return ode_regression.distill(roles["teacher"], roles["student"], roles["data"], config, run)


GROUNDS = {
    "digits": Ground(
        "A small classifier from a big one",
        "Digits of 16 pixels: 100 with labels, 900 without, 200 to choose by, 597 to test; a ResNet as teacher, and a "
        "ViT beside it for those who listen to several; the same three small networks and 500 steps of 64 pictures in "
        "all for everyone, under random views where a system has any.",
        {"accuracy": "higher", "training seconds": "lower", "parameters": "lower", "kilobytes": "lower"},
        {"steps": 500, "batch": 64, "view": 1.0}, _digits_roles, _digits_measure,
        {"the teacher itself": lambda run, roles: roles["teacher"], "student alone": _student_alone,
         "plain KD on all pictures": _kd_without_labels, "plain KD": _plain_kd},
        {"1,200 parameters": {"width": 4}, "4,600 parameters": {"width": 8}, "17,000 parameters": {"width": 16}},
        "4,600 parameters"),
    "gauss2d": Ground(
        "Samples in one step from a known density",
        "A ring of 8 Gaussians with its exact teacher; the same MLP for everyone, 4,000 updates of 256 samples in all, "
        "the fit of a fake score or of a first student included; measured on samples drawn in one step.",
        {"energy distance": "lower", "distance to the exact flow": "lower", "modes of 8": "higher",
         "training seconds": "lower"},
        {"batch": 256}, _gauss2d_roles, _gauss2d_measure,
        {"one step of the teacher": lambda run, roles: FewStepSampler(roles["teacher"]),
         "regression on ODE pairs": _ode_pairs}),
}
"""Grounds by name; a system's entry in the catalog says which of them it enters, and how."""
