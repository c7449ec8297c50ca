"""Density estimation using Real NVP (Dinh, Sohl-Dickstein & Bengio 2017, arXiv 1605.08803).

Unlabelled data become an invertible network f: x -> z with z standard normal, so that likelihood, sampling and latents
are exact and take one pass each:

    log p(x) = log N(f(x); 0, I) + log |det df/dx|                                        equation 3
    y = b x + (1 - b)(x exp(s(b x)) + t(b x)),  log-determinant sum (1 - b) s(b x)        equation 9
    s = learned scale per channel times tanh of a network's output, t its other output

Masks b alternate: three checkerboard couplings, a squeeze, three channel-wise ones; then half of the channels go to the
latent (multi-scale), and the last scale has four checkerboard couplings. Each coupling is followed by a batch norm
that is itself a layer of the flow. Pictures are dequantised, x + u with u ~ U[0, 1), and mapped by
logit(alpha + (1 - 2 alpha) x / 256); this symmetric form is the released code's. `stillhouse.models.flows` has it all.

Deviations: running averages of the flow's batch norm serve in evaluation only, as in ordinary batch norm (appendix E
also mixes them into training). Minimised is the negative log-likelihood in nats per dimension.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from stillhouse.data.densities import checkerboard, gauss2d, moons, ring
from stillhouse.data.dequantise import grey_levels, to_logit
from stillhouse.data.digits import digits
from stillhouse.data.sets import TensorSet
from stillhouse.diffusion.process import Flow
from stillhouse.errors import RoleError, require
from stillhouse.evaluate.claims import Arms, Claim
from stillhouse.evaluate.density import bits_per_dimension, divergence_to_truth
from stillhouse.models.flows import FlowDensity, picture_flow, point_flow, weight_scales
from stillhouse.models.made import MADE
from stillhouse.protocols import Density, Samples
from stillhouse.recipes.autoregressive import fit_made
from stillhouse.run import Run, begin, set_lr
from stillhouse.run.schedules import cosine
from stillhouse.zoo.denoisers import gauss2d_teacher

NUMBER = 33


def below(arm: str, metric: str) -> Callable[[Arms], float]:
    """By how much the metric of the affine flow is smaller than that of another arm."""
    return lambda arms: arms[arm][metric] - arms["affine"][metric]


CLAIMS = [
    Claim("on the ring of 8 Gaussians the flow is within 0.5 nats of the true density", lambda a:
          0.5 - a["affine"]["kl"]),
    Claim("there affine couplings are nearer to the true density than additive ones", below("additive", "kl")),
    Claim("on digits affine couplings need fewer bits per dimension than additive ones", below("additive", "bpd")),
    Claim("samples come back from their latents to 1e-4 (points and pictures)",
          lambda a: 1e-4 - a["affine"]["reconstruction"]),
    Claim("the flow needs fewer bits per dimension than one Gaussian on the logits of digits", below("gaussian", "bpd"),
          report=True),
    Claim("multi-scale factoring needs no more bits per dimension than keeping all channels to the end",
          below("no multi-scale", "bpd"), report=True),
    Claim("batch norm as a layer of the flow lowers bits per dimension on digits", below("no flow batch norm", "bpd"),
          report=True),
    Claim("batch norm as a layer of the flow brings points nearer to the true density",
          below("no flow batch norm", "kl"), report=True),
    Claim("affine couplings fit the two moons better than additive ones", lambda a:
          a["additive, other points"]["moons"] - a["affine, other points"]["moons"], report=True),
    Claim("affine couplings are nearer to the checkerboard's density than additive ones",
          lambda a:
          a["additive, other points"]["checkerboard"] - a["affine, other points"]["checkerboard"], report=True),
    Claim("1,000 digits are sampled in less time than by an autoregressive model", below("autoregressive", "seconds"),
          report=True),
    Claim("an autoregressive model needs more bits per dimension than the flow", below("autoregressive", "bpd"),
          report=True),
]


@dataclass(frozen=True)
class Config:
    steps: int = 200_000  # updates
    batch: int = 64  # samples per update
    lr: float = 1e-3  # Adam's learning rate
    last_lr: float = 1.0  # its last value as a multiple of lr, reached along a cosine; 1 keeps it constant
    l2: float = 5e-5  # weight of the sum of squared weight-normalisation scales
    flip: float = 0.5  # probability of a horizontal flip (pictures only)
    clip: float | None = None  # bound on the global gradient norm

    def __post_init__(self):
        require(min(self.steps, self.batch) >= 1 and self.lr > 0 and self.last_lr >= 0 and self.l2 >= 0,
                f"steps, batch and lr must be positive, last_lr and l2 0 or more; got {self}")
        require(0 <= self.flip <= 1, f"flip is a probability, not {self.flip}")


EMBEDDED = Config(steps=250, lr=2e-3, last_lr=0.0, l2=0.0, flip=0.0, clip=10.0)
POINTS = replace(EMBEDDED, steps=800, batch=256, lr=1e-2)


def distill(
    student: Density,
    data: Samples,
    config: Config = Config(),
    run: Run | None = None,
) -> nn.Module:
    """`student`, a flow such as `picture_flow` or `point_flow`, trained in place on the field `x` of `data`.

    Pictures are [channels, height, width] in [-1, 1]. Raises RoleError or DataError, before any update, where the
    student is no density of such samples.
    """
    run = begin(run)
    run.check(Density, data, student=student)
    _check(student, data)
    assert isinstance(student, nn.Module)
    student.train()
    optimizer = torch.optim.Adam(student.parameters(), lr=config.lr)
    scales = weight_scales(student) if config.l2 else []
    for batch in run.loop("likelihood", data, batch=config.batch, steps=config.steps, drop_last=True, student=student,
                          optimizer=optimizer):
        x = batch["x"]
        if x.ndim == 4 and config.flip:
            flipped = run.rand(len(x)) < config.flip
            x = torch.where(flipped[:, None, None, None], x.flip(-1), x)
        u = run.rand(*x.shape)
        terms = {"nll": -student.log_prob(x, u).mean() / x[0].numel()}
        if scales:
            terms["l2"] = config.l2 * torch.stack([g.square().sum() for g in scales]).sum()
        set_lr(optimizer, config.lr * (config.last_lr + (1 - config.last_lr) * cosine(run.progress)))
        run.update(optimizer, clip=config.clip, **terms)
    return student.eval()


def _check(student: Any, data: Any) -> None:
    x = torch.as_tensor(data[0]["x"])
    require(isinstance(student, nn.Module) and any(True for _ in student.parameters()),
            f"the student ({type(student).__name__}) has nothing to train", RoleError)
    shape = getattr(student, "shape", tuple(x.shape))
    require(tuple(shape) == tuple(x.shape), f"the student is a density of samples of shape {tuple(shape)}, the data's "
            f"are {tuple(x.shape)}", RoleError)
    if getattr(student, "levels", 0):
        grey_levels(x, student.levels)


def experiment(run: Run) -> dict[str, dict[str, float]]:
    """Points (ring of 8 Gaussians, std 0.2; moons; checkerboard) and `digits`, 8 x 8 pixels of 17 grey levels.

    kl: nats to the true density, by samples of it. moons, checkerboard: nats per test point, to the truth for the
    latter. bpd: bits per dimension of test digits. seconds: time to sample 1,000 digits. reconstruction: the largest
    |f^-1(f(x)) - x|.
    """
    centres = ring(8)
    data: Any = gauss2d(20_000, centres, 0.2, seed=run.seed)
    true = gauss2d(10_000, centres, 0.2, seed=run.seed + 10_000).x
    truth = gauss2d_teacher(Flow(), centres, 0.2).log_density(true, torch.zeros(len(true)))
    others = {"moons": (moons(20_000, seed=run.seed), moons(10_000, seed=run.seed + 10_000).x, 0.0),
              "checkerboard": (checkerboard(20_000, seed=run.seed), checkerboard(10_000, seed=run.seed + 10_000).x,
                               math.log(8))}
    known, unseen = digits(8, "train"), digits(8, "test").image
    pictures = TensorSet(x=known.image)
    u = torch.rand(unseen.shape, generator=torch.Generator().manual_seed(run.seed))

    def points(**options: Any) -> dict[str, float]:
        made = point_flow(2, **options)
        with run.scope("points"):
            model: Any = distill(made, data, POINTS, run)
        with torch.no_grad():
            run.picture("points", density_map(model))
            return {"kl": divergence_to_truth(truth, model.log_prob(true)), "reconstruction": returned(model, true)}

    def images(**options: Any) -> dict[str, float]:
        made = picture_flow((1, 8, 8), 17, scales=2, hidden=16, blocks=1, **options)
        with run.scope("digits"):
            model: Any = distill(made, pictures, EMBEDDED, run)
        with torch.no_grad():
            run.picture("digits", model.sample(40))
            run.picture("latent surface", model.manifold(unseen[:4]), columns=8)
            return {"bpd": bits_per_dimension(model.log_prob(unseen, u), 64, 17),
                    "seconds": timed(lambda: model.sample(1000)), "reconstruction": returned(model, unseen, u)}

    def both(**options: Any) -> dict[str, float]:
        first, second = points(**options), images(**options)
        worst = max(first.pop("reconstruction"), second.pop("reconstruction"))
        return {**first, **second, "reconstruction": worst}

    def shapes(**options: Any) -> dict[str, float]:
        nats = {}
        for name, (given, test, offset) in others.items():
            with run.scope(name):
                model: Any = distill(point_flow(2, **options), given, replace(POINTS, steps=400), run)
            with torch.no_grad():
                nats[name] = float(-model.log_prob(test).mean()) - offset
        return nats

    def gaussian() -> dict[str, float]:
        share = (grey_levels(known.image, 17) + torch.rand(known.image.shape)) / 17
        fit = normal(to_logit(share)[0].flatten(1), ridge=1e-2)
        value, log_det = to_logit((grey_levels(unseen, 17) + u) / 17)
        flat = normal(data.x, ridge=0.0)
        return {"kl": divergence_to_truth(truth, flat.log_prob(true)),
                "bpd": bits_per_dimension(fit.log_prob(value.flatten(1)) + log_det, 64, 17)}

    def autoregressive() -> dict[str, float]:
        model = fit_made(MADE(64, 17), TensorSet(x=grey_levels(known.image, 17).flatten(1)), EMBEDDED.steps,
                         EMBEDDED.batch, EMBEDDED.lr, run)
        with torch.no_grad():
            log_prob = model.log_prob(grey_levels(unseen, 17).flatten(1))
        return {"bpd": bits_per_dimension(log_prob, 64, 1), "seconds": timed(lambda: model.sample(1000))}

    return run.arms(
        {"affine": both, "additive": lambda: both(kind="additive", scaling=True), "gaussian": gaussian,
         "autoregressive": autoregressive},
        extended={
            "no flow batch norm": lambda: both(norm=False),
            "no multi-scale": lambda: images(factor=False),
            "affine, other points": shapes,
            "additive, other points": lambda: shapes(kind="additive", scaling=True),
        },
    )


def returned(model: FlowDensity, x: Tensor, u: Tensor | None = None) -> float:
    """The largest |f^-1(f(x)) - x| of the flow itself (on the logits, for pictures)."""
    if model.levels and u is not None:
        x = to_logit((grey_levels(x, model.levels) + u) / model.levels, model.alpha)[0]
    inverse: Any = model.flow.inverse
    return float((inverse(model.flow(x)[0])[0].view_as(x) - x).abs().max())


def normal(x: Tensor, ridge: float) -> torch.distributions.MultivariateNormal:
    """The Gaussian of largest likelihood, `ridge` added to its variances."""
    return torch.distributions.MultivariateNormal(x.mean(0), torch.cov(x.T) + ridge * torch.eye(x.shape[1]))


@torch.no_grad()
def timed(sample: Callable[[], Any]) -> float:
    """Seconds of one call, the best of three."""
    taken = []
    for _ in range(3):
        start = time.perf_counter()
        sample()
        taken.append(time.perf_counter() - start)
    return min(taken)


def density_map(model: FlowDensity, side: int = 80) -> Tensor:
    """exp(log p) on a grid over [-3, 3]^2 as a picture [1, 1, side, side]."""
    axis = torch.linspace(-3, 3, side)
    x = torch.stack(torch.meshgrid(axis, -axis, indexing="xy"), -1).view(-1, 2)
    return model.log_prob(x).exp().view(1, 1, side, side)


def tiny() -> dict[str, Any]:
    """Arguments of `distill` for the contract test: two scales, both masks and batch norms, decay, flips."""
    torch.manual_seed(0)
    student = picture_flow((1, 4, 4), 17, scales=2, hidden=4, blocks=1)
    pictures = TensorSet(x=torch.rand(24, 1, 4, 4) * 2 - 1)
    return {"student": student, "data": pictures, "config": Config(steps=4, batch=8)}
