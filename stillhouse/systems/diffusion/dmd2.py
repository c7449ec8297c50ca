"""Improved Distribution Matching Distillation, DMD2 (Yin et al. 2024, arXiv 2405.14867).

A many-step teacher becomes a one- or few-step generator G whose distribution, not its trajectories, equals the
teacher's. With x = G(z), noised to x_s = alpha_s x + sigma_s n at a level drawn per sample:

    generator, every K-th step:  g = ((x - D_real(x_s)) - (x - D_fake(x_s))) / mean |x - D_real(x_s)|   per sample
                                 0.5 mean (x - stopgrad(x - g))^2 + w_G softplus(-C(x_s'))
    fake score, every step:      w(s) |D_fake(x_s) - x|^2 + w_C (softplus(C(x_s')) + softplus(-C(real_s')))

D_fake, begun as a copy of the teacher, follows the distribution of G (the two time-scale rule: K of its steps to one
of G). C is a small head on D_fake's bottleneck, so the adversarial gradient trains D_fake's encoder too. Guidance
acts on D_real only. A generator of several steps is trained on its own inputs (backward simulation): the steps before
a random one, shared by the batch, run without gradient and are noised afresh.

The same code is the EDM form (VE process) and the latent form (VP table): only the process of the denoisers differs.
Where the teacher is an exact density without weights, `network` makes the network that is fitted to it and then serves
as the start of D_fake and of G. SDXL's one-step generator starts from `recipes.ode_regression` and init="given".
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from stillhouse.data.densities import blank, gauss2d, ring
from stillhouse.data.sets import TensorSet
from stillhouse.diffusion.denoise import NetworkDenoiser, copy_weights
from stillhouse.diffusion.grids import check_times, level_times
from stillhouse.diffusion.guidance import Guided
from stillhouse.diffusion.process import VE
from stillhouse.diffusion.samplers import FewStepSampler, at, renoise_chain
from stillhouse.diffusion.weights import Weighting, weighted_error, x0_weight
from stillhouse.errors import RoleError, require
from stillhouse.evaluate.claims import Claim
from stillhouse.evaluate.distances import energy_distance, in_mode_std, mode_shares, modes_hit, sliced_wasserstein
from stillhouse.measures.adversarial import fake_loss, generator_loss, real_loss
from stillhouse.measures.score import distribution_matching
from stillhouse.models.denoisers import MLPDenoiser
from stillhouse.parts.discriminators import head_for
from stillhouse.parts.ema import EMA
from stillhouse.protocols import Conditions, Denoiser, Network, Samples
from stillhouse.recipes import ode_regression, score_fitting
from stillhouse.run import Run, begin, frozen, set_lr
from stillhouse.run.check import first_batch
from stillhouse.zoo.denoisers import gauss2d_teacher

NUMBER = 77
CLAIMS = [
    Claim("five fake updates per generator update beat one, at equal generator updates and with a slow fake score",
          lambda a: a["1:1"]["energy"] - a["5:1"]["energy"]),
    Claim("with a teacher that misses a mode, the GAN term on real samples brings the generator nearer to the data",
          lambda a: a["biased teacher"]["energy"] - a["biased teacher, GAN"]["energy"]),
    Claim("the GAN term recovers at least half of the missing mode's share",
          lambda a: a["biased teacher, GAN"]["missing"] - 0.5 / 8),
    Claim("four steps trained by backward simulation are within 1.1 times those trained on noised real data",
          lambda a: 1.1 * a["4 steps, noised data"]["energy"] - a["4 steps, simulated"]["energy"]),
    Claim("at equal compute (five times the generator updates), five to one beats one to one",
          lambda a: a["1:1, equal compute"]["energy"] - a["5:1"]["energy"], report=True),
    Claim("matching distributions beats regressing on ODE pairs",
          lambda a: a["ODE pairs"]["energy"] - a["5:1"]["energy"], report=True),
]


@dataclass(frozen=True)
class Config:
    steps: int = 400_000  # fake-score updates; the generator takes steps / ratio of them
    ratio: int = 5  # K, fake-score updates per generator update (10 for SD1.5)
    batch: int = 280  # samples per update
    times: tuple[float, ...] = (1.0,)  # t at which the generator is read, e.g. 1 0.75 0.5 0.25 for four steps
    simulate: Literal["backward", "data"] = "backward"  # later steps see the generator's own chain, or noised real data
    guidance: float = 1.0  # scale of the teacher's classifier-free guidance: 1.75 SD1.5, 8 SDXL, 1 none
    normalise: bool = True  # divide the matching gradient by each sample's mean |x - D_real|
    matching: float = 1.0  # weight of distribution matching
    gan: float = 3e-3  # w_G, weight of the generator's adversarial term (1e-3 SD1.5, 5e-3 SDXL); 0 needs no real data
    gan_fake: float = 1e-2  # w_C, weight of the discriminator's terms
    gan_from: float = 0.0  # fraction of the steps after which the adversarial terms begin
    levels: tuple[int, int] = (20, 980)  # first and last noise level, of 1000, of the matching gradient
    weight: Weighting = "edm"  # w(s) of the fake score's error in x0: edm, or snr for a plain eps error (VP)
    lr: float = 2e-6  # generator's AdamW learning rate (1e-5 SD1.5, 5e-7 SDXL)
    fake_lr: float = 2e-6  # the same of fake score and head
    late_lr: float = 1.0  # factor on both once the adversarial terms have begun (0.25 in the best ImageNet model)
    betas: tuple[float, float] = (0.9, 0.999)  # AdamW's betas
    decay: float = 0.01  # AdamW's weight decay
    clip: float = 10.0  # bound on each global gradient norm
    ema: float = 0.0  # decay of an average of the generator, returned in its place; 0 for none
    init: Literal["teacher", "given"] = "teacher"  # the generator starts from D_fake's weights, or as given
    fit: int = 2000  # updates of the fit of `network` to the teacher, where one is given
    fit_lr: float = 2e-3  # learning rate of that fit, annealed by a cosine
    shape: tuple[int, ...] = ()  # of one sample; () takes it from `real`

    def __post_init__(self):
        check_times((*self.times, 0.0))
        low, high = self.levels
        require(min(self.steps, self.ratio, self.batch) >= 1 and self.fit >= 0, "steps, ratio and batch must be at "
                f"least 1 and fit 0 or more; got {self}")
        require(0 <= low <= high <= 999, f"levels must be two of 0..999 in order, got {self.levels}")
        require(min(self.gan, self.gan_fake, self.matching, self.gan_from) >= 0 and 0 <= self.ema < 1,
                f"weights must be 0 or more and ema in [0, 1); got {self}")


EMBEDDED = Config(steps=2500, batch=256, gan=0.0, weight="edm", lr=2e-3, fake_lr=2e-4, betas=(0.0, 0.99), decay=0.0,
                  ema=0.99, fit=1500)
PRESETS = {
    "paper": Config(),
    "sd15": Config(ratio=10, batch=2048, guidance=1.75, gan=1e-3, weight="snr", lr=1e-5, fake_lr=1e-5,
                   gan_from=0.5, late_lr=0.05),
    "sdxl": Config(times=(1.0, 0.75, 0.5, 0.25), batch=128, guidance=8.0, gan=5e-3, weight="snr", lr=5e-7,
                   fake_lr=5e-7),
    "small": EMBEDDED,
}


def distill(
    teacher: Denoiser,
    student: Denoiser,
    real: Samples | None = None,
    conditions: Conditions | None = None,
    network: Network | None = None,
    config: Config = Config(),
    run: Run | None = None,
) -> FewStepSampler:
    """A sampler of len(config.times) steps around `student`, which is trained in place.

    `real` (field `x`, and `condition` where conditional) is the GAN's real side, and the inputs of the fit of
    `network`; `conditions` are what samples are generated for (by default those of `real`). Neither is needed by an
    unconditional teacher without a GAN, if config.shape says what a sample looks like.
    Raises RoleError, DataError or ConfigError, before any update, where roles or settings do not fit.
    """
    run = begin(run)
    shape, streams, sizes = _check(run, teacher, student, real, conditions, network, config)
    assert isinstance(student, nn.Module)
    process, guided = student.process, Guided(teacher, config.guidance)
    fake = fake_score(teacher, network, real, config, run)
    if config.init == "teacher":
        copy_weights(fake, student)
    student.eval()
    head = _head(fake, shape, streams, run)
    adamw = partial(torch.optim.AdamW, betas=config.betas, weight_decay=config.decay)
    generator_optimizer = adamw(student.parameters(), lr=config.lr)
    fake_optimizer = adamw([*fake.parameters(), *head.parameters()], lr=config.fake_lr)
    average = EMA(student) if config.ema else None

    def noised(x: Tensor, low: int = 0, high: int = 999) -> tuple[Tensor, Tensor]:
        t = level_times(process, run.randint(low, high + 1, len(x)))
        return process.noise(x, t, run.randn_like(x)), t

    def critic(x: Tensor, condition: Tensor | None) -> Tensor:
        return head(fake.features(*noised(x), condition))

    with frozen(teacher):
        for batch in run.loop("distil", streams, batch=sizes, steps=config.steps, student=student, fake=fake, head=head,
                              generator=generator_optimizer, fake_optimizer=fake_optimizer, average=average):
            adversarial = config.gan > 0 and run.progress >= config.gan_from
            for optimizer, lr in ((generator_optimizer, config.lr), (fake_optimizer, config.fake_lr)):
                set_lr(optimizer, lr * (config.late_lr if adversarial else 1.0))
            turn = run.k % config.ratio == 0
            with torch.set_grad_enabled(turn):
                x, condition = generate(student, batch, shape, config, run)
            if turn:
                with torch.no_grad():
                    x_s, s = noised(x, *config.levels)
                    x0_real, x0_fake = guided(x_s, s, condition), fake(x_s, s, condition)
                terms = {"matching": config.matching * distribution_matching(x, x0_real, x0_fake, config.normalise)}
                if adversarial:
                    terms["gan"] = config.gan * generator_loss(critic(x, condition))
                run.update(generator_optimizer, clip=config.clip, **terms)
                if average is not None:
                    average.update(student, config.ema)
            x = x.detach()
            x_s, s = noised(x)
            weight = x0_weight(config.weight, process, s, getattr(fake, "sigma_data", 1.0))
            terms = {"fake": weighted_error(fake(x_s, s, condition), x, weight)}
            if adversarial:
                data = batch["real"]
                terms["gan_fake"] = config.gan_fake * fake_loss(critic(x, condition))
                terms["gan_real"] = config.gan_fake * real_loss(critic(data["x"], data.get("condition")))
            run.update(fake_optimizer, clip=config.clip, **terms)
    if average is not None:
        copy_weights(average.module, student)
    return FewStepSampler(student, (*config.times, 0.0), "renoise")


def generate(
    student: Denoiser, batch: dict[str, Any], shape: tuple[int, ...], config: Config, run: Run
) -> tuple[Tensor, Tensor | None]:
    """Samples x0 [batch, ...] of the generator at one of its steps, shared by the batch, and their conditions.

    The step's input is the generator's own chain (backward simulation, without gradient) or noised real data.
    """
    k = run.shared_randint(0, len(config.times)) if len(config.times) > 1 else 0
    given = batch["drawn"] if config.simulate == "backward" else batch["real"]
    condition, n = given.get("condition"), len(given["index"])
    noise = run.randn(n, *shape)
    if config.simulate == "backward":
        with torch.no_grad():
            start = student.process.prior(noise)
            x_t = renoise_chain(student, start, config.times[: k + 1], condition, run.randn_like)
    else:
        x_t = student.process.noise(given["x"], at(config.times[k], noise), noise)
    return student(x_t, at(config.times[k], x_t), condition), condition


def fake_score(teacher: Denoiser, network: Network | None, real: Samples | None, config: Config, run: Run) -> Any:
    """The start of D_fake: a copy of the teacher, or `network()` fitted to it on noised `real`."""
    if network is None:
        return copy.deepcopy(teacher).requires_grad_(True).eval()  # type: ignore[attr-defined]
    fake: Any = network().to(run.device)
    assert real is not None
    fitting = score_fitting.Config(steps=config.fit, batch=config.batch, lr=config.fit_lr, weight=config.weight)
    with run.scope("fit"):
        return score_fitting.distill(fake, real, teacher, fitting, run).eval()


def _head(fake: Any, shape: tuple[int, ...], streams: dict[str, Any], run: Run) -> nn.Module:
    """A new head for the bottleneck of `fake`, found by sending two samples through it."""
    first = next(iter(streams.values()))[0]
    condition = first.get("condition")
    if condition is not None:
        condition = torch.as_tensor(condition, device=run.device).expand(2, *torch.as_tensor(condition).shape)
    with torch.no_grad():
        features = fake.features(torch.zeros(2, *shape, device=run.device), torch.ones(2, device=run.device), condition)
    return head_for(features).to(run.device)


def _check(
    run: Run, teacher: Any, student: Any, real: Any, conditions: Any, network: Any, config: Config
) -> tuple[tuple[int, ...], dict[str, Any], dict[str, int]]:
    """The shape of a sample, and the streams of a step with their batch sizes."""
    require(real is not None or not (config.gan or config.simulate == "data" or network is not None),
            "real samples are needed for the GAN term (gan > 0), for simulate='data' and for fitting `network`; give "
            "real=…, or set gan=0", RoleError)
    require(network is not None or any(True for _ in getattr(teacher, "parameters", list)()), "the teacher has no "
            "weights that the fake score could start from (an exact density?); give network=…, a factory of a Denoiser",
            RoleError)
    require(student.process == teacher.process, "teacher and student must share one noise process, got "
            f"{teacher.process} and {student.process}", RoleError)
    require(config.guidance == 1 or teacher.null_condition is not None, f"guidance {config.guidance} needs a teacher "
            "with a null condition; give it one, or set guidance=1", RoleError)
    if real is not None:
        run.check(Denoiser, real, teacher=teacher, student=student)
        shape = tuple(real[0]["x"].shape)
    else:
        shape = config.shape
        require(bool(shape), "without real samples config.shape must say what one sample looks like, e.g. (4, 64, 64)")
    drawn = conditions if conditions is not None else real if real is not None else blank(config.batch)
    if conditions is not None:
        first_batch(conditions, ("condition",))
        require(real is None or "condition" in real[0] or not config.gan, "with conditions, the real samples need "
                "their own field 'condition'", RoleError)
    streams = {"drawn": drawn}
    if config.gan or config.simulate == "data":
        streams["real"] = real
    return shape, streams, dict.fromkeys(streams, config.batch)


def experiment(run: Run) -> dict[str, dict[str, float]]:
    """`gauss2d`: the ring of 8 Gaussians (radius 2, std 0.15), exact teachers, sigma from 0.05 to 5.

    In the arms on the two time-scale rule the fake score learns ten times slower than the generator, which is where
    the rule shows; in the others both learn at one rate. The biased teacher misses one mode, which the generator then
    sees in real samples only, through the GAN.
    """
    centres, std, process = ring(8), 0.15, VE(0.05, 5.0, rho=0)
    data: Any = gauss2d(20_000, centres, std, seed=run.seed)
    exact, biased = gauss2d_teacher(process, centres, std), gauss2d_teacher(process, centres, std, missing=1)
    true, z = data.x[:5000], torch.randn(5000, 2)
    later = [torch.randn_like(z) for _ in range(3)]

    def network() -> NetworkDenoiser:
        return NetworkDenoiser(MLPDenoiser((2,), 64, 3), process, "edm", sigma_data=1.4)

    def measure(sampler: FewStepSampler) -> dict[str, float]:
        noises = iter(later)
        with torch.no_grad():
            x = sampler(z, noise=lambda x: next(noises))
        return {"energy": energy_distance(x, true), "sliced_w2": sliced_wasserstein(x, true),
                "modes": modes_hit(x, centres, 3 * std), "in_mode_std": in_mode_std(x, centres, 3 * std),
                "missing": float(mode_shares(x, centres, 3 * std)[0])}

    fitting = score_fitting.Config(steps=EMBEDDED.fit, batch=EMBEDDED.batch, lr=EMBEDDED.fit_lr, weight="edm")
    fitted: dict[str, Any] = {}
    for name, teacher in {"exact": exact, "biased": biased}.items():
        with run.scope(name):
            fitted[name] = score_fitting.distill(network(), data, teacher, fitting, run)

    def arm(name: str = "exact", **changes: Any) -> Callable[[], dict[str, float]]:
        config = replace(EMBEDDED, fit=0, **changes)
        teacher = {"exact": exact, "biased": biased}[name]
        start = partial(copy.deepcopy, fitted[name])
        return lambda: measure(distill(teacher, network(), data, None, start, config, run))

    def pairs() -> dict[str, float]:
        config = ode_regression.Config(steps=EMBEDDED.steps, batch=EMBEDDED.batch, lr=1e-3)
        return measure(ode_regression.distill(exact, network(), data, config, run))

    equal: dict[str, Any] = {"lr": 1e-3, "fake_lr": 1e-3}
    gan = {**equal, "gan": 20.0, "gan_fake": 0.1}
    four = {**equal, "times": (1.0, 0.75, 0.5, 0.25)}
    return run.arms(
        {
            "1:1": arm(ratio=1, steps=500),
            "5:1": arm(),
            "biased teacher": arm("biased", **equal),
            "biased teacher, GAN": arm("biased", **gan),
            "4 steps, simulated": arm(**four),
            "4 steps, noised data": arm(**four, simulate="data"),
            "1:1, equal compute": arm(ratio=1),
            "ODE pairs": pairs,
        },
        extended={
            "5:1, fast fake score": arm(fake_lr=2e-3),
            "1:1, fast fake score": arm(fake_lr=2e-3, ratio=1, steps=500),
            "5:1, not normalised": arm(normalise=False),
            "biased teacher, GAN only": arm("biased", **gan, matching=0.0),
            "biased teacher, late GAN": arm("biased", **gan, gan_from=0.5),
        },
    )


def tiny() -> dict[str, Any]:
    """Arguments of `distill` for the contract test: conditional, guided, two steps, GAN."""
    torch.manual_seed(0)

    def denoiser() -> NetworkDenoiser:
        return NetworkDenoiser(MLPDenoiser((2,), 8, 2, classes=3), VE(0.05, 5.0, 0), "edm",
                               null_condition=torch.tensor(3))

    real = TensorSet(x=torch.randn(24, 2), condition=torch.arange(24) % 3)
    config = replace(EMBEDDED, steps=4, ratio=2, batch=8, gan=0.1, guidance=1.5, times=(1.0, 0.5))
    return {"teacher": denoiser(), "student": denoiser(), "real": real,
            "conditions": TensorSet(condition=torch.arange(16) % 3), "config": config}
