"""Embedded diffusion teachers: exact ones, so nothing is trained but a mixture fitted to pictures."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from stillhouse.data.densities import ring
from stillhouse.data.digits import digits
from stillhouse.data.sets import TensorSet
from stillhouse.diffusion.denoise import NetworkDenoiser
from stillhouse.diffusion.exact import GaussianMixture, fit_class_mixture, smoothed_data
from stillhouse.diffusion.process import Process, VPCosine
from stillhouse.models.cameras import Cameras
from stillhouse.models.denoisers import MLPDenoiser
from stillhouse.models.radiance import volume_render
from stillhouse.recipes import score_fitting
from stillhouse.run import Run
from stillhouse.store import digest_of
from stillhouse.zoo.cache import cached


def gauss2d_teacher(
    process: Process, centres: Tensor | None = None, std: float = 0.15, missing: int = 0, labels: Tensor | None = None,
    background: float = 0.0,
) -> GaussianMixture:
    """The exact denoiser of `gauss2d`; `missing` modes are left out, from the first, to make it a biased teacher.

    `background` is the share of one broad Gaussian in the middle, as wide as the centres are far out; with `labels` it
    is a class of its own, the last.
    """
    centres = ring() if centres is None else centres
    kept = slice(missing, len(centres))
    stds = torch.full((len(centres),), std)
    labels = None if labels is None else labels[kept]
    if not background:
        return GaussianMixture(process, centres[kept], stds[kept], labels=labels)
    count = len(centres[kept])
    weights = torch.tensor([(1 - background) / count] * count + [background])
    means = torch.cat([centres[kept], centres.mean(0, keepdim=True)])
    stds = torch.cat([stds[kept], centres.norm(dim=1).mean().view(1)])
    labels = None if labels is None else torch.cat([labels, labels.max().view(1) + 1])
    return GaussianMixture(process, means, stds, weights, labels)


def gauss2d_network(process: Process, teacher: GaussianMixture, width: int = 64, steps: int = 3000) -> NetworkDenoiser:
    """An MLP fitted to a class-conditional `gauss2d` teacher, one sample in five without its class: for what needs a
    teacher with weights."""

    def new() -> NetworkDenoiser:
        network = MLPDenoiser((2,), width, 3, classes=teacher.classes)
        return NetworkDenoiser(network, process, "v", null_condition=torch.tensor(teacher.classes))

    def build() -> dict[str, Any]:
        run = Run(quiet=True)
        torch.manual_seed(0)
        x, component = teacher.sample(20_000)
        assert teacher.labels is not None
        label = torch.where(torch.rand(len(x)) < 0.2, teacher.classes, teacher.labels[component])
        fitting = score_fitting.Config(steps=steps, lr=2e-3)
        return dict(score_fitting.distill(new(), TensorSet(x=x, condition=label), teacher, fitting, run).state_dict())

    recipe = {"process": process.spec(), "width": width, "steps": steps,
              "teacher": digest_of(dict(teacher.state_dict()))}
    found = new()
    found.load_state_dict(cached("gauss2d network", recipe, build))
    return found


def coloured_ball(points: Tensor) -> tuple[Tensor, Tensor]:
    """Density and colour of a solid ball of radius 0.5 whose colour tells the direction: an object to learn."""
    normal = F.normalize(points, dim=1)
    density = 60.0 * (points.norm(dim=1) < 0.5)
    return density, 0.5 + 0.45 * torch.stack([normal[:, 2], -normal[:, 0], normal[:, 1]], 1)


def ball_pictures(cameras: Cameras, size: int, look: str = "colour", background: float = 0.5) -> Tensor:
    """Pictures of the ball in [-1, 1]: in colour before grey, or its normals before -1."""

    def normals(points: Tensor) -> tuple[Tensor, Tensor]:
        return coloured_ball(points)[0], F.normalize(points, dim=1)

    seen, opacity = volume_render(coloured_ball if look == "colour" else normals, cameras, size, 96)
    if look == "colour":
        return 2 * (seen + background * (1 - opacity)) - 1
    return seen - (1 - opacity)


def views_teacher(process: Process, size: int = 16, count: int = 160, std: float = 0.1) -> GaussianMixture:
    """An exact picture teacher for `coloured_ball` from around: `count` views, in colour and as normals, smoothed.

    The class of a picture is the view it shows (`stillhouse.models.cameras.VIEWS`); no class stands for all views.
    """
    u = torch.rand(count, 4, generator=torch.Generator().manual_seed(0))
    cameras = Cameras.draw(u, elevation=(-10.0, 80.0))
    pictures = torch.cat([ball_pictures(cameras, size, look) for look in ("colour", "normal")])
    return smoothed_data(process, pictures, std, cameras.views().repeat(2))


def digits_teacher(process: Process, components: int = 3, ridge: float = 1e-2) -> GaussianMixture:
    """A class-conditional picture teacher in closed form: `components` full-covariance Gaussians per digit."""

    def build() -> dict[str, Any]:
        known = digits(8, "all")
        fit = fit_class_mixture(VPCosine(), known.image, known.label, components, ridge)
        covariances = torch.einsum("kde,ke,kfe->kdf", fit.axes, fit.variances, fit.axes)
        return {"means": fit.means, "covariances": covariances, "weights": fit.log_weights.exp(), "labels": fit.labels}

    found = cached("digits mixture", {"components": components, "ridge": ridge}, build)
    return GaussianMixture(process, found["means"], found["covariances"], found["weights"], found["labels"], (1, 8, 8))
