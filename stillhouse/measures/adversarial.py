"""Adversarial losses on discriminator logits, where a positive logit says "real"."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from stillhouse.errors import ConfigError
from stillhouse.measures.divergences import Reduction, reduce_samples

Adversary = Literal["nonsaturating", "hinge", "lsgan", "wgan"]


def generator_loss(
    fake: Float[Tensor, "*batch"],
    kind: Adversary = "nonsaturating",
    weight: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """What the generator minimises on the logits of its samples.

    nonsaturating: softplus(-l), -log sigmoid of the logit (Goodfellow et al. 2014). hinge and wgan: -l (Lim & Ye 2017;
    Arjovsky et al. 2017). lsgan: (l - 1)^2 (Mao et al. 2017). Raises ConfigError on another kind.
    """
    match kind:
        case "nonsaturating":
            values = F.softplus(-fake)
        case "hinge" | "wgan":
            values = -fake
        case "lsgan":
            values = (fake - 1).square()
        case _:
            raise ConfigError(f"unknown adversarial loss {kind!r}; known are {', '.join(get_args(Adversary))}")
    return reduce_samples(values, weight, reduction=reduction)


def real_loss(
    real: Float[Tensor, "*batch"],
    kind: Adversary = "nonsaturating",
    weight: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """The discriminator's loss on real samples: softplus(-l), relu(1 - l), (l - 1)^2 or -l."""
    if kind == "hinge":
        return reduce_samples(F.relu(1 - real), weight, reduction=reduction)
    return generator_loss(real, kind, weight, reduction)


def fake_loss(
    fake: Float[Tensor, "*batch"],
    kind: Adversary = "nonsaturating",
    weight: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """The discriminator's loss on generated samples: softplus(l), relu(1 + l), l^2 or l."""
    match kind:
        case "nonsaturating":
            values = F.softplus(fake)
        case "hinge":
            values = F.relu(1 + fake)
        case "lsgan":
            values = fake.square()
        case "wgan":
            values = fake
        case _:
            raise ConfigError(f"unknown adversarial loss {kind!r}; known are {', '.join(get_args(Adversary))}")
    return reduce_samples(values, weight, reduction=reduction)


def r1_penalty(
    real: Float[Tensor, "*batch"],
    x: Float[Tensor, "batch ..."],
    weight: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """0.5 |d logit / d x|^2 at real samples x that require a gradient (Mescheder et al. 2018, equation 9)."""
    (gradient,) = torch.autograd.grad(real.sum(), x, create_graph=True)
    return reduce_samples(0.5 * gradient.square().flatten(1).sum(1), weight, reduction=reduction)
