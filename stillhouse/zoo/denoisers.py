"""Embedded diffusion teachers: exact ones, so nothing is trained but a mixture fitted to pictures."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from stillhouse.data.densities import ring
from stillhouse.data.digits import digits
from stillhouse.diffusion.exact import GaussianMixture, fit_class_mixture
from stillhouse.diffusion.process import Process, VPCosine
from stillhouse.zoo.cache import cached


def gauss2d_teacher(
    process: Process, centres: Tensor | None = None, std: float = 0.15, missing: int = 0, labels: Tensor | None = None
) -> GaussianMixture:
    """The exact denoiser of `gauss2d`; `missing` modes are left out, from the first, to make it a biased teacher."""
    centres = ring() if centres is None else centres
    kept = slice(missing, len(centres))
    stds = torch.full((len(centres),), std)
    return GaussianMixture(process, centres[kept], stds[kept], labels=None if labels is None else labels[kept])


def digits_teacher(process: Process, components: int = 3, ridge: float = 1e-2) -> GaussianMixture:
    """A class-conditional picture teacher in closed form: `components` full-covariance Gaussians per digit."""

    def build() -> dict[str, Any]:
        known = digits(8, "all")
        fit = fit_class_mixture(VPCosine(), known.image, known.label, components, ridge)
        covariances = torch.einsum("kde,ke,kfe->kdf", fit.axes, fit.variances, fit.axes)
        return {"means": fit.means, "covariances": covariances, "weights": fit.log_weights.exp(), "labels": fit.labels}

    found = cached("digits mixture", {"components": components, "ridge": ridge}, build)
    return GaussianMixture(process, found["means"], found["covariances"], found["weights"], found["labels"], (1, 8, 8))
