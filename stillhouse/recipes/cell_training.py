"""Training the network of a genotype from scratch: an auxiliary head, drop-path and cutout (Liu et al. 2019)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch.nn.functional as F
from torch import nn

from stillhouse.errors import require
from stillhouse.models.cells import CellNet
from stillhouse.parts.taps import taps
from stillhouse.protocols import Classifier, LabelledImages
from stillhouse.recipes.supervised import check_training, optimizer_for
from stillhouse.recipes.views import random_view
from stillhouse.run import Run, set_lr
from stillhouse.run.schedules import warmup_cosine


@dataclass(frozen=True)
class Config:
    batch: int = 96  # pictures a step
    optimizer: Literal["sgd", "adamw"] = "sgd"  # SGD with momentum 0.9, or AdamW
    lr: float = 0.025  # peak learning rate; a cosine to 0
    warmup: float = 0.0  # part of the steps in which it rises
    weight_decay: float = 3e-4  # lambda
    clip: float = 5.0  # largest global norm of the gradient
    auxiliary: float = 0.4  # weight of the head at 2/3 of the depth; 0: none
    drop_path: float = 0.2  # share of edges that are missing at the end; it rises from 0 in a straight line
    view: float = 0.0  # strength of random shifts, turns and light changes; 0: the view that the data set gives
    erase: float = 0.5  # side of the square that is cut out of a picture, as a part of the picture's
    flip: bool = False  # whether pictures are mirrored at random

    def __post_init__(self) -> None:
        check_training(0, self.batch, self.lr, self.warmup, self.weight_decay)
        require(self.clip > 0 and min(self.auxiliary, self.view) >= 0, "clip must be above 0, auxiliary and view not "
                f"negative; got {self.clip}, {self.auxiliary} and {self.view}")
        require(0 <= self.drop_path < 1 and 0 <= self.erase <= 1, "drop_path lies in [0, 1) and erase in [0, 1]; got "
                f"{self.drop_path} and {self.erase}")


def auxiliary_head(channels: int, classes: int) -> nn.Module:
    """Logits from a map of any size: pooled to 2 x 2, then convolutions of 128 and 768 channels (for pictures of 32
    pixels the original pools overlapping windows of 5)."""
    return nn.Sequential(nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Conv2d(channels, 128, 1, bias=False),
                         nn.BatchNorm2d(128), nn.ReLU(), nn.Conv2d(128, 768, 2, bias=False), nn.BatchNorm2d(768),
                         nn.ReLU(), nn.Flatten(), nn.Linear(768, classes))


def train(network: CellNet, labelled: LabelledImages, steps: int, config: Config, run: Run) -> CellNet:
    """L = CE(y, z) + auxiliary CE(y, z_auxiliary); the network is trained in place. The auxiliary head stands behind
    the last cell that halves the picture and is thrown away."""
    run.check(Classifier, labelled, network=network, labels=True)
    layers: list[Any] = list(network.body.layers)
    halving = [i for i, layer in enumerate(layers) if layer.kind == "reduce"]
    place: list[str] = []
    head: nn.Module | None = None
    if config.auxiliary and halving:
        place = [f"body.layers.{halving[-1]}"]
        head = auxiliary_head(layers[halving[-1]].out, network.classes).to(run.device)
    optimizer = optimizer_for([*network.parameters(), *(head.parameters() if head else ())], config.optimizer,
                              config.lr, config.weight_decay)
    clip = config.clip if math.isfinite(config.clip) else None
    network.train()
    with taps(network, place) as features:
        for batch in run.loop("retrain", labelled, batch=config.batch, steps=steps, student=network, head=head,
                              optimizer=optimizer, drop_last=len(labelled) >= config.batch):
            set_lr(optimizer, config.lr * warmup_cosine(run.progress, config.warmup))
            network.drop_path(config.drop_path * run.progress)
            x, y = batch["image"], batch["label"]
            if config.view or config.erase or config.flip:
                x = random_view(x, run, config.view, config.erase, flip=config.flip)
            terms = {"ce": F.cross_entropy(network(x), y)}
            if head is not None:
                terms["auxiliary"] = config.auxiliary * F.cross_entropy(head(features[place[0]]), y)
            run.update(optimizer, clip=clip, **terms)
    network.drop_path(0.0)
    return network
