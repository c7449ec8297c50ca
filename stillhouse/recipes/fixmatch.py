"""FixMatch (Sohn et al. 2020): few labels and many pictures without; confident predictions on a weak view are the
labels of a strong view."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from stillhouse.data.augment import RAND_AUGMENT
from stillhouse.errors import require
from stillhouse.parts.ema import EMA
from stillhouse.protocols import Classifier, Images, LabelledImages
from stillhouse.recipes.supervised import check_training, optimizer_for
from stillhouse.recipes.views import random_view, strong_view
from stillhouse.run import Run, begin, set_lr


@dataclass(frozen=True)
class Config:
    steps: int = 2**20  # optimiser steps
    batch: int = 64  # B: labelled pictures a step
    ratio: int = 7  # mu: unlabelled pictures a labelled one
    optimizer: Literal["sgd", "adamw", "lars"] = "sgd"  # SGD with momentum 0.9, AdamW, or LARS with momentum 0.9
    lr: float = 0.03  # eta: multiplied by cos(7 pi k / (16 K))
    weight_decay: float = 5e-4  # lambda
    threshold: float = 0.95  # tau: smallest probability that counts as a label
    weight: float = 1.0  # lambda_u: weight of the unlabelled term
    ema: float = 0.0  # decay of the average whose weights the student ends with (the paper: 0.999); 0: its own
    weak: float = 1.0  # strength of the weak view
    strong: float = 1.0  # strength of the strong view
    operations: Sequence[str] = RAND_AUGMENT  # among which the strong view draws
    count: int = 2  # how many of them
    erase: float = 0.5  # side of the square that the strong view erases, as a part of the picture's
    flip: bool = True  # mirror half of the pictures

    def __post_init__(self) -> None:
        check_training(self.steps, self.batch, self.lr, 0.0, self.weight_decay)
        require(self.ratio >= 1, f"ratio is a number of pictures, 1 or more, not {self.ratio}")
        require(0 <= self.threshold <= 1 and 0 <= self.ema < 1, f"threshold must lie in [0, 1] and ema in [0, 1); got "
                f"{self.threshold} and {self.ema}")
        require(self.weight >= 0, f"weight must not be negative, got {self.weight}")


def train(
    student: Classifier,
    labelled: LabelledImages,
    unlabelled: Images,
    config: Config = Config(),
    run: Run | None = None,
) -> nn.Module:
    """L = CE(y, weak view) + lambda_u pseudo_label_loss(weak view, strong view) (equations 3 and 4), all views in one
    forward pass; the student is trained in place and returned."""
    run = begin(run)
    run.check(Classifier, labelled, labels=True, student=student)
    run.check(Classifier, unlabelled, student=student)
    assert isinstance(student, nn.Module)
    student.train()
    average = EMA(student) if config.ema else None
    optimizer = optimizer_for(student.parameters(), config.optimizer, config.lr, config.weight_decay)
    for batch in run.loop("fixmatch", {"labelled": labelled, "unlabelled": unlabelled},
                          batch={"labelled": config.batch, "unlabelled": config.ratio * config.batch},
                          steps=config.steps, student=student, optimizer=optimizer, average=average):
        set_lr(optimizer, config.lr * math.cos(7 * math.pi / 16 * run.progress))
        x, u = (random_view(batch[name]["image"], run, config.weak, flip=config.flip)
                for name in ("labelled", "unlabelled"))
        v = strong_view(batch["unlabelled"]["image"], run, config.strong, config.operations, config.count, config.erase,
                        flip=config.flip)
        z, weak, strong = student(torch.cat([x, u, v])).split([len(x), len(u), len(v)])
        run.update(optimizer, ce=F.cross_entropy(z, batch["labelled"]["label"]),
                   unlabelled=config.weight * pseudo_label_loss(weak, strong, config.threshold))
        if average is not None:
            average.update(student, config.ema)
    if average is not None:
        student.load_state_dict(average.module.state_dict())
    return student


def pseudo_label_loss(weak: Float[Tensor, "n classes"], strong: Float[Tensor, "n classes"], threshold: float = 0.95
                      ) -> Float[Tensor, ""]:
    """mean of 1[max q >= tau] CE(argmax q, strong), q = softmax(weak) without gradient; the mean is over all samples,
    the unsure ones too."""
    confidence, label = weak.detach().softmax(-1).max(-1)
    return ((confidence >= threshold) * F.cross_entropy(strong, label, reduction="none")).mean()
