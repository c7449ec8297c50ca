"""Adversarial losses on discriminator logits, where a positive logit says "real"."""

from __future__ import annotations

from typing import Any, Literal, get_args

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


def two_logit_loss(
    fake: Float[Tensor, "n 2"],
    real: Float[Tensor, "n 2"],
    weight: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """Binary cross-entropy of a discriminator with a logit for each side: targets [1, 0] for `fake` and [0, 1] for
    `real`, the mean over both sides and both logits, per pair (MEAL, Shen et al. 2019). ln 2 where all logits are 0.
    """
    sides = [F.softplus(-fake[:, 0]), F.softplus(fake[:, 1]), F.softplus(real[:, 0]), F.softplus(-real[:, 1])]
    return reduce_samples(torch.stack(sides).mean(0), weight, reduction=reduction)


class _Reversal(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, coefficient: float) -> Tensor:
        ctx.coefficient = coefficient
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return -ctx.coefficient * gradients[0], None


def reverse_gradient(x: Float[Tensor, "*any"], coefficient: float = 1.0) -> Float[Tensor, "*any"]:
    """`x`, whose gradient is -coefficient times what comes back (Ganin and Lempitsky 2015, equation 16): what comes
    after it minimises a loss, what comes before maximises it, in one step. 0 stops the gradient, -1 passes it on."""
    reversed_x = _Reversal.apply(x, coefficient)
    assert isinstance(reversed_x, Tensor)
    return reversed_x
