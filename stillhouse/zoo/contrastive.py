"""Residual encoders of the digits with the head of SimCLR v2, pretrained without labels and cached."""

from __future__ import annotations

from typing import Any

import torch

from stillhouse.data.digits import digits
from stillhouse.models.convnets import SmallResNet
from stillhouse.parts.heads import Projected, normed_projector, replace_head
from stillhouse.recipes import simclr
from stillhouse.recipes.views import colour_view, crop_view
from stillhouse.run import Run
from stillhouse.zoo.cache import cached


def residual_encoder(width: int = 16, out: int = 64, channels_in: int = 1) -> Projected:
    """A SmallResNet of three blocks without its classes (features of four times the width) and SimCLR v2's head of
    three layers, with fresh weights."""
    encoder, _ = replace_head(SmallResNet(channels_in, 1, width))
    return Projected(encoder, normed_projector(4 * width, out))


def digits_simclr_v2(
    width: int = 16, size: int = 16, steps: int = 600, batch: int = 128, lr: float = 5e-3, temperature: float = 0.5,
    area: float = 0.4, colour: float = 0.5,
) -> Projected:
    """`residual_encoder`, trained by SimCLR on the 1,200 pictures of digits/train without their labels: AdamW, views of
    at least the part `area` of a picture, light and contrast distorted with strength `colour`. In eval mode."""
    recipe = {"what": "SimCLR v2 on digits", "width": width, "size": size, "steps": steps, "batch": batch, "lr": lr,
              "temperature": temperature, "area": area, "colour": colour, "version": 1}

    def build() -> dict[str, torch.Tensor]:
        run = Run(seed=1000).begin()
        run.say(f"training the SimCLR encoder of the digits, width {width} ({steps} steps, kept for later runs) …")
        data: Any = digits(size, "train").without("label")
        config = simclr.Config(steps, batch, "adamw", lr, weight_decay=1e-4, temperature=temperature)
        return dict(simclr.train(
            residual_encoder(width), data,
            lambda x: colour_view(crop_view(x, run, (area, 1.0), flip=False), run, colour), config, run).state_dict())

    model = residual_encoder(width)
    model.load_state_dict(cached("digits-simclr-v2", recipe, build))
    return model.eval()
