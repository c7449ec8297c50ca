"""A generator of pictures learned against a discriminator (DCGAN, Radford et al. 2016), without labels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from stillhouse.errors import DataError, require
from stillhouse.measures.adversarial import fake_loss, generator_loss, real_loss
from stillhouse.models.generators import PictureGenerator
from stillhouse.parts.discriminators import PictureDiscriminator
from stillhouse.protocols import Images
from stillhouse.run import Run, begin
from stillhouse.run.check import first_batch

Weigh = Callable[[Float[Tensor, "n channels height width"]], Float[Tensor, " n"]]
"""Generated pictures in, the weight of each in the generator's loss out."""


@dataclass(frozen=True)
class Config:
    steps: int = 15_600  # optimiser steps of generator and discriminator
    batch: int = 64  # pictures a step, real and generated each
    latent: int = 100  # length of z ~ N(0, I)
    lr: float = 2e-4  # of Adam, for both
    betas: tuple[float, float] = (0.5, 0.999)  # of Adam
    width: int = 128  # channels of the generator
    critic_width: int = 16  # channels of the discriminator's first layer
    dropout: float = 0.25  # of its channels
    eps: float = 0.8  # of the BatchNorms; narrow networks need less, or next to nothing passes them at first

    def __post_init__(self) -> None:
        require(self.steps >= 0 and self.batch >= 2 and self.lr > 0, "steps must be 0 or more, batch 2 or more and lr "
                f"above 0; got {self.steps}, {self.batch} and {self.lr}")
        require(all(0 <= beta < 1 for beta in self.betas), f"betas must lie in [0, 1), not {self.betas}")
        require(self.eps > 0, f"eps must be above 0, not {self.eps}")
        require(0 <= self.dropout < 1, f"dropout is a share in [0, 1), not {self.dropout}")


def train(
    real: Images,
    config: Config = Config(),
    run: Run | None = None,
    weigh: Weigh | None = None,
    held: dict[str, Any] | None = None,
) -> PictureGenerator:
    """The discriminator minimises -log D(x) - log(1 - D(G(z))), the generator the mean of -w log D(G(z)), where w is 1
    or what `weigh` gives (called once a step, without gradient); both see the same z.

    `held` is what `weigh` counts, to be kept with the stage. Pictures are square and lie in [-1, 1]; raises DataError
    for others.
    """
    run = begin(run)
    channels, size = checked(first_batch(real, ("image",))["image"])
    generator = PictureGenerator(config.latent, channels, size, config.width, config.eps).to(run.device)
    critic = PictureDiscriminator(channels, size, config.critic_width, config.dropout, config.eps).to(run.device)
    for network in (generator, critic):
        network.apply(_initialised)
    ours, theirs = (torch.optim.Adam(m.parameters(), config.lr, config.betas) for m in (generator, critic))
    for batch in run.loop("gan", real, batch=config.batch, steps=config.steps, student=generator, critic=critic,
                          ours=ours, theirs=theirs, drop_last=len(real) >= config.batch, **(held or {})):
        x = batch["image"]
        fake = generator(run.randn(len(x), config.latent))
        run.update(theirs, real=real_loss(critic(x)), fake=fake_loss(critic(fake.detach())))
        weight = weigh(fake.detach()) if weigh is not None else None
        run.update(ours, generator=generator_loss(critic(fake), weight=weight))
    return generator


def checked(image: Tensor) -> tuple[int, int]:
    """Channels and side of pictures that can be generated. Raises DataError for others."""
    channels, height, width = image.shape[1:]
    require(height == width and height % 4 == 0, f"pictures of {height} x {width} cannot be generated: both sides must "
            "be the same multiple of 4; resize them", DataError)
    require(float(image.abs().max()) <= 1.001, "pictures must lie in [-1, 1], where generated ones do; these reach "
            f"{float(image.abs().max()):.3g}", DataError)
    return channels, height


def _initialised(module: nn.Module) -> None:
    """DCGAN's initial weights: N(0, 0.02) of convolutions, N(1, 0.02) of BatchNorms."""
    if isinstance(module, nn.Conv2d):
        nn.init.normal_(module.weight, 0.0, 0.02)
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.normal_(module.weight, 1.0, 0.02)
        nn.init.zeros_(module.bias)
