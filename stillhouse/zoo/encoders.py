"""Embedded encoders that learned without labels, trained on first use and cached."""

from __future__ import annotations

from typing import Any

import torch

from stillhouse.data.digits import digits
from stillhouse.models.convnets import ConvEncoder
from stillhouse.parts.heads import Projected, projector
from stillhouse.recipes import simclr
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
