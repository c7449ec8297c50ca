"""Learning without forgetting: new classes are learned, and what the network said of the old ones is kept."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn

from stillhouse.data.sets import column
from stillhouse.errors import DataError, RoleError, require
from stillhouse.measures.divergences import kl
from stillhouse.parts.heads import feature_width
from stillhouse.protocols import Classifier, LabelledImages
from stillhouse.recipes.supervised import View, check_training, optimizer_for
from stillhouse.run import Run, begin, frozen, set_lr
from stillhouse.run.schedules import warmup_cosine


@dataclass(frozen=True)
class Config:
    steps: int = 1000  # optimiser steps
    batch: int = 64  # pictures a step
    optimizer: Literal["sgd", "adamw", "lars"] = "sgd"  # SGD with momentum 0.9, AdamW, or LARS with momentum 0.9
    lr: float = 0.01  # peak learning rate; a cosine to 0
    warmup: float = 0.05  # part of the steps in which the learning rate rises
    weight_decay: float = 5e-4  # lambda
    old: tuple[int, ...] = ()  # the classes that the network knows
    weight: float = 1.0  # lambda_o: of what it said of them; 0: plain fine-tuning
    temperature: float = 2.0  # T

    def __post_init__(self) -> None:
        check_training(self.steps, self.batch, self.lr, self.warmup, self.weight_decay)
        require(self.weight >= 0 and self.temperature > 0, "weight must not be negative, and temperature above 0; got "
                f"{self.weight} and {self.temperature}")
        require(len(set(self.old)) == len(self.old), f"old names a class twice: {self.old}")


def train(
    student: Classifier,
    labelled: LabelledImages,
    config: Config = Config(),
    run: Run | None = None,
    view: View | None = None,
) -> nn.Module:
    """LwF (Li and Hoiem 2016): a network over all classes that was trained on the `old` ones learns `labelled`, which
    has none of them:

    L = CE(y, z over the new classes) + weight T^2 KL(z_0 over the old classes || z over the old classes),

    with z_0 of the network as it came, on the new pictures. Each group of classes has a softmax of its own. Raises
    RoleError for classes that the network has not, DataError for labels of old classes.
    """
    run = begin(run)
    example = run.check(Classifier, labelled, labels=True, student=student)["image"]
    assert isinstance(student, nn.Module)
    classes = feature_width(student, example)
    require(all(0 <= c < classes for c in config.old), f"old classes {config.old} of a network with {classes}",
            RoleError)
    new = [c for c in range(classes) if c not in config.old]
    require(bool(new), "all classes are old: there is nothing to learn", RoleError)
    require(not set(column(labelled, "label").tolist()) & set(config.old), "labelled has pictures of the old classes "
            f"{config.old}", DataError)
    before = copy.deepcopy(student)
    place = torch.full((classes,), -100, device=run.device)
    place[new] = torch.arange(len(new), device=run.device)
    optimizer = optimizer_for(student.parameters(), config.optimizer, config.lr, config.weight_decay)
    student.train()
    with frozen(before):
        for batch in run.loop("lifelong", labelled, batch=config.batch, steps=config.steps, student=student,
                              optimizer=optimizer, drop_last=len(labelled) >= config.batch):
            set_lr(optimizer, config.lr * warmup_cosine(run.progress, config.warmup))
            x = view(batch["image"]) if view else batch["image"]
            logits = student(x)
            terms: dict[str, Any] = {"ce": F.cross_entropy(logits[:, new], place[batch["label"]])}
            if config.weight and config.old:
                with torch.no_grad():
                    said = before(x)[:, list(config.old)]
                terms["kept"] = config.weight * kl(said, logits[:, list(config.old)], config.temperature)
            run.update(optimizer, **terms)
    return student
