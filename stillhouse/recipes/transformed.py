"""Labels with transformed copies, without a joint label: the baselines of label augmentation (Lee et al. 2020)."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Literal

import torch.nn.functional as F
from torch import nn

from stillhouse.data.transformations import copies, transformations
from stillhouse.errors import require
from stillhouse.measures.joint_labels import copy_labels
from stillhouse.parts.feature_taps import feature_tap, tapped_width
from stillhouse.protocols import Classifier, LabelledImages
from stillhouse.recipes.supervised import View, check_training, optimizer_for
from stillhouse.run import Run, begin, set_lr
from stillhouse.run.schedules import warmup_cosine


@dataclass(frozen=True)
class Config:
    steps: int = 1000  # optimiser steps
    batch: int = 64  # pictures a step, before they are copied
    optimizer: Literal["sgd", "adamw", "lars"] = "sgd"  # SGD with momentum 0.9, AdamW, or LARS with momentum 0.9
    lr: float = 0.1  # peak learning rate; a cosine to 0
    warmup: float = 0.05  # part of the steps in which the learning rate rises
    weight_decay: float = 5e-4  # lambda
    kind: str = "rotations"  # the transformations, by name; "none": plain training
    task: Literal["augment", "multi"] = "augment"  # copies keep the class; "multi": a second head says which copy it is
    weight: float = 1.0  # weight of the second head's cross-entropy

    def __post_init__(self) -> None:
        check_training(self.steps, self.batch, self.lr, self.warmup, self.weight_decay)
        transformations(self.kind)
        require(self.task in ("augment", "multi"), f"task is 'augment' or 'multi', not {self.task!r}")
        require(self.weight >= 0, f"weight must not be negative, not {self.weight}")


def train(student: Classifier, labelled: LabelledImages, config: Config = Config(), run: Run | None = None,
          view: View | None = None) -> nn.Module:
    """L = CE(y, z(x^(j))), averaged over pictures and their M copies (data augmentation), and with "multi" also
    CE(j, v(f(x^(j)))) with a linear head v that is thrown away (multi-task learning). The student is returned."""
    run = begin(run)
    example = run.check(Classifier, labelled, labels=True, student=student)["image"]
    assert isinstance(student, nn.Module)
    chosen = transformations(config.kind)
    copies(example, chosen)
    head = nn.Linear(tapped_width(student, example) if config.task == "multi" else 1, len(chosen)).to(run.device)
    parameters = [*student.parameters(), *(head.parameters() if config.task == "multi" else ())]
    optimizer = optimizer_for(parameters, config.optimizer, config.lr, config.weight_decay)
    student.train()
    with feature_tap(student) if config.task == "multi" else contextlib.nullcontext() as features:
        for batch in run.loop("labels", labelled, batch=config.batch, steps=config.steps, student=student, head=head,
                              optimizer=optimizer, drop_last=len(labelled) >= config.batch):
            set_lr(optimizer, config.lr * warmup_cosine(run.progress, config.warmup))
            label, which = copy_labels(batch["label"], len(chosen))
            logits = student(copies(view(batch["image"]) if view else batch["image"], chosen))
            terms = {"ce": F.cross_entropy(logits, label)}
            if features is not None:
                terms["which"] = config.weight * F.cross_entropy(head(features()), which)
            run.update(optimizer, clip=None, **terms)
    return student
