"""Training a classifier on hard labels: the baseline of most systems, the making of teachers, and fine-tuning."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from stillhouse.errors import require
from stillhouse.parts.lars import LARS
from stillhouse.protocols import Classifier, LabelledImages
from stillhouse.run import Run, begin, set_lr
from stillhouse.run.schedules import warmup_cosine

View = Callable[[Tensor], Tensor]
"""An augmentation: a batch of pictures in, one view of each out."""


@dataclass(frozen=True)
class Config:
    steps: int = 1000  # optimiser steps
    batch: int = 64  # pictures a step
    optimizer: Literal["sgd", "adamw", "lars"] = "sgd"  # SGD with momentum 0.9, AdamW, or LARS with momentum 0.9
    lr: float = 0.1  # peak learning rate; a cosine to 0
    warmup: float = 0.05  # part of the steps in which the learning rate rises
    weight_decay: float = 5e-4  # lambda
    label_smoothing: float = 0.0  # epsilon

    def __post_init__(self) -> None:
        check_training(self.steps, self.batch, self.lr, self.warmup, self.weight_decay)
        require(0 <= self.label_smoothing < 1, f"label_smoothing must lie in [0, 1), not {self.label_smoothing}")


def check_training(steps: int, batch: int, lr: float, warmup: float, weight_decay: float) -> None:
    """Raise ConfigError for settings of a training stage that are out of range."""
    require(steps >= 0 and batch >= 1, f"steps must be 0 or more and batch 1 or more; got {steps} and {batch}")
    require(lr > 0 and weight_decay >= 0, f"lr must be above 0 and weight_decay 0 or more; got {lr} and {weight_decay}")
    require(0 <= warmup < 1, f"warmup is a fraction of the steps in [0, 1), not {warmup}")


def optimizer_for(parameters: Iterable[Any], kind: str, lr: float, weight_decay: float) -> Optimizer:
    """SGD with momentum 0.9, AdamW, or LARS with momentum 0.9 over parameters or parameter groups. Raises ConfigError
    for another word."""
    require(kind in ("sgd", "adamw", "lars"), f"optimizer is 'sgd', 'adamw' or 'lars', not {kind!r}")
    if kind == "lars":
        return LARS(parameters, lr, momentum=0.9, weight_decay=weight_decay)
    if kind == "sgd":
        return torch.optim.SGD(parameters, lr=lr, momentum=0.9, weight_decay=weight_decay)
    return torch.optim.AdamW(parameters, lr=lr, weight_decay=weight_decay)


def train(
    student: Classifier,
    labelled: LabelledImages,
    config: Config = Config(),
    run: Run | None = None,
    view: View | None = None,
) -> nn.Module:
    """Cross-entropy on hard labels; the student is trained in place and returned."""
    run = begin(run)
    run.check(Classifier, labelled, labels=True, student=student)
    assert isinstance(student, nn.Module)
    student.train()
    return _train("supervised", student, student.parameters(), labelled, config, run, view)


def fine_tune(
    student: Classifier,
    labelled: LabelledImages,
    head: nn.Module,
    config: Config = Config(),
    run: Run | None = None,
    view: View | None = None,
    backbone_lr: float = 0.1,
) -> nn.Module:
    """Cross-entropy with the `head` (a part of the student) at the full learning rate and all else at
    `backbone_lr` times it; 0 trains the head alone on a frozen backbone in eval mode (a linear evaluation). LARS does
    not adapt the head."""
    run = begin(run)
    run.check(Classifier, labelled, labels=True, student=student)
    assert isinstance(student, nn.Module)
    heads = {id(p) for p in head.parameters()}
    backbone = [p for p in student.parameters() if id(p) not in heads]
    require(len(backbone) + len(heads) == len(list(student.parameters())), "head must be a part of the student")
    student.train(backbone_lr > 0)
    head.train()
    groups = [{"params": list(head.parameters())}]
    if config.optimizer == "lars":
        groups[0]["adapt"] = False  # type: ignore[assignment]
    if backbone_lr > 0:
        groups.append({"params": backbone, "lr_scale": backbone_lr})  # type: ignore[dict-item]
    return _train("fine-tune", student, groups, labelled, config, run, view)


def _train(name: str, student: nn.Module, parameters: Iterable[Any], labelled: Any, config: Config, run: Run,
           view: View | None) -> nn.Module:
    optimizer = optimizer_for(parameters, config.optimizer, config.lr, config.weight_decay)
    for batch in run.loop(name, labelled, batch=config.batch, steps=config.steps, student=student,
                          drop_last=len(labelled) >= config.batch, optimizer=optimizer):
        set_lr(optimizer, config.lr * warmup_cosine(run.progress, config.warmup))
        logits = student(view(batch["image"]) if view else batch["image"])
        run.update(optimizer, ce=F.cross_entropy(logits, batch["label"], label_smoothing=config.label_smoothing))
    return student
