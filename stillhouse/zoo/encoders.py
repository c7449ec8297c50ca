"""Embedded encoders that learned without labels, trained on first use and cached."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from stillhouse.data.digits import digits
from stillhouse.data.shapes import shape_factors
from stillhouse.models.convnets import ConvEncoder
from stillhouse.models.vit import SmallViT
from stillhouse.parts.heads import Projected, projector
from stillhouse.recipes import simclr, supervised
from stillhouse.recipes.views import random_view
from stillhouse.run import Run
from stillhouse.zoo.cache import cached


def digits_simclr(
    size: int = 16, seed: int = 0, split: str = "train", width: int = 32, features: int = 128, out: int = 64,
    steps: int = 200, strength: float = 1.5,
) -> Projected:
    """A ConvEncoder (2 blocks, about 75,000 parameters) with a projection head, trained by SimCLR on the pictures of
    `split` without their labels: AdamW, batch 256, temperature 0.2, views of that `strength`. In eval mode.
    """
    recipe = {"what": "SimCLR on digits", "size": size, "seed": seed, "split": split, "width": width,
              "features": features, "out": out, "steps": steps, "strength": strength, "version": 1}

    def fresh() -> Projected:
        encoder = ConvEncoder(1, features, width, depth=2, image_size=size)
        return Projected(encoder, projector(features, features, out))

    def build() -> dict[str, torch.Tensor]:
        run = Run(seed=1000 + seed).begin()
        run.say(f"training the SimCLR encoder of the digits ({steps} steps, kept for later runs) …")
        data: Any = digits(size, split)
        config = simclr.Config(steps=steps, batch=256, optimizer="adamw", lr=2e-3, weight_decay=1e-4, temperature=0.2)
        return dict(simclr.train(fresh(), data, lambda x: random_view(x, run, strength, erase=0.25, noise=0.05),
                                 config, run).state_dict())

    model = fresh()
    model.load_state_dict(cached("digits-simclr", recipe, build))
    return model.eval()


FACTOR_STEPS = {"shape": 1200, "colour": 500, "texture": 500, "position": 500}


def factor_teacher(factor: str, width: int = 32, depth: int = 3) -> nn.Module:
    """A SmallViT for pictures of 3 x 16 x 16, in eval mode, trained with the labels of one factor of `shape_factors`
    alone: 92 % (shape) to 100 % (colour, texture) on new pictures, while its features know little of the others."""
    recipe = {"what": "SmallViT on shape factors", "factor": factor, "width": width, "depth": depth,
              "steps": FACTOR_STEPS[factor], "version": 1}

    def fresh() -> nn.Module:
        return SmallViT(3, 4, 16, width=width, depth=depth)

    def build() -> dict[str, torch.Tensor]:
        run = Run(seed=1000).begin()
        run.say(f"training the teacher of {factor} ({FACTOR_STEPS[factor]} steps, kept for later runs) …")
        data = shape_factors(6000, seed=3000)
        config = supervised.Config(steps=FACTOR_STEPS[factor], batch=64, lr=3e-3, optimizer="adamw")
        return dict(supervised.train(fresh(), data.with_fields(label=data.data[factor]), config, run).state_dict())

    model = fresh()
    model.load_state_dict(cached("factor-teacher", recipe, build))
    return model.eval()
