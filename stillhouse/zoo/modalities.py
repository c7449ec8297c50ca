"""Pairs of shapes in two modalities, and a teacher that knows one of them, trained on first use and cached."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from stillhouse.data.sets import TensorSet
from stillhouse.data.shapes import SHAPES, edges, grey, shapes
from stillhouse.models.convnets import SmallResNet
from stillhouse.recipes import supervised
from stillhouse.recipes.views import random_view
from stillhouse.run import Run
from stillhouse.zoo.cache import cached


def edge_pairs(n: int, seed: int = 0, size: int = 20) -> TensorSet:
    """`n` shapes of six kinds on a plain ground: `image` their edge maps, `other` the grey pictures, both
    [n, 1, size, size] in [-1, 1], `label` the kind."""
    drawn = shapes(n, seed, size, SHAPES, noise=0.1)
    return TensorSet(image=edges(drawn.image), other=grey(drawn.image), label=drawn.label)


def grey_teacher(size: int = 20, width: int = 12, steps: int = 400) -> nn.Module:
    """A SmallResNet that names the six kinds of shape on grey pictures, in eval mode: trained on 3,000 labelled ones
    under random views."""
    recipe = {"what": "SmallResNet on plain grey shapes", "size": size, "width": width, "steps": steps, "version": 1}

    def build() -> dict[str, torch.Tensor]:
        run = Run(seed=1000).begin()
        run.say(f"training the teacher of grey shapes ({steps} steps, kept for later runs) …")
        pairs = edge_pairs(3000, seed=1000, size=size)
        data: Any = TensorSet(image=pairs.other, label=pairs.label)
        config = supervised.Config(steps=steps, batch=64, lr=0.05)
        teacher = supervised.train(SmallResNet(1, len(SHAPES), width), data, config, run,
                                   lambda x: random_view(x, run, 0.5))
        return dict(teacher.state_dict())

    teacher = SmallResNet(1, len(SHAPES), width)
    teacher.load_state_dict(cached("grey-shapes-teacher", recipe, build))
    return teacher.eval()
