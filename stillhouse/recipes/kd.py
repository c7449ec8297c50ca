"""Knowledge distillation as it began (Hinton et al. 2015): hard labels and the teacher's softened probabilities."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn

from stillhouse.data.modalities import SeenAs
from stillhouse.errors import RoleError, require
from stillhouse.measures.divergences import kl
from stillhouse.protocols import Classifier, Images, LabelledImages
from stillhouse.recipes.supervised import View, check_training, optimizer_for
from stillhouse.recipes.views import both_views
from stillhouse.run import Run, begin, frozen, set_lr
from stillhouse.run.check import first_batch
from stillhouse.run.reading import to_device
from stillhouse.run.schedules import warmup_cosine


@dataclass(frozen=True)
class Config:
    steps: int = 1000  # optimiser steps
    batch: int = 64  # pictures a step
    optimizer: Literal["sgd", "adamw", "lars"] = "sgd"  # SGD with momentum 0.9, AdamW, or LARS with momentum 0.9
    lr: float = 0.1  # peak learning rate; a cosine to 0
    warmup: float = 0.05  # part of the steps in which the learning rate rises
    weight_decay: float = 5e-4  # lambda
    temperature: float = 4.0  # T
    alpha: float = 0.9  # weight of the teacher's term; the labels have 1 - alpha
    teacher_sees: str = "image"  # batch field that the teacher is given: "image" or "other", a second modality

    def __post_init__(self) -> None:
        check_training(self.steps, self.batch, self.lr, self.warmup, self.weight_decay)
        require(0 <= self.alpha <= 1, f"alpha must lie in [0, 1], not {self.alpha}")
        require(self.temperature > 0, f"temperature must be above 0, not {self.temperature}")
        require(self.teacher_sees in ("image", "other"), f"teacher_sees is 'image' or 'other', not "
                f"{self.teacher_sees!r}")


def distill(
    teacher: Classifier,
    student: Classifier,
    labelled: LabelledImages | None,
    config: Config = Config(),
    run: Run | None = None,
    view: View | None = None,
    unlabelled: Images | None = None,
) -> nn.Module:
    """L = (1 - alpha) CE(y, z_s) + alpha T^2 KL(softmax(z_t / T) || softmax(z_s / T)), both on the same view.

    With `unlabelled`, the teacher's term is taken on batches of those pictures and the labels' term on batches of
    `labelled` (needed for alpha < 1 only); a term of weight 0 is not computed. With `teacher_sees="other"` the teacher
    sees the second modality of the same scene.
    """
    run = begin(run)
    read = unlabelled is None or config.alpha < 1
    if labelled is not None or read:
        _check(teacher, student, labelled, config, run, labels=read)
    if unlabelled is not None:
        _check(teacher, student, unlabelled, config, run)
    if labelled is None or unlabelled is not None:
        return _apart(teacher, student, labelled, unlabelled, config, run, view)
    assert isinstance(student, nn.Module)
    optimizer = optimizer_for(student.parameters(), config.optimizer, config.lr, config.weight_decay)
    student.train()
    with frozen(teacher):
        for batch in run.loop("kd", labelled, batch=config.batch, steps=config.steps, student=student,
                              drop_last=len(labelled) >= config.batch, optimizer=optimizer):
            set_lr(optimizer, config.lr * warmup_cosine(run.progress, config.warmup))
            x, y = both_views(batch, config, view)
            with torch.no_grad():
                target = teacher(y)
            logits = student(x)
            ce = F.cross_entropy(logits, batch["label"])
            run.update(optimizer, ce=(1 - config.alpha) * ce,
                       kd=config.alpha * kl(target, logits, config.temperature))
    return student


def _check(teacher: Any, student: Any, data: Any, config: Config, run: Run, labels: bool = False) -> None:
    """Both models on what they will see, over the same classes, and the labels where they are read."""
    if config.teacher_sees == "image":
        run.check(Classifier, data, labels, teacher=teacher, student=student)
        return
    run.check(Classifier, data, labels, student=student)
    seen = SeenAs(data, config.teacher_sees)
    run.check(Classifier, seen, teacher=teacher)
    with run.aside("classes", teacher, student):
        batch = to_device(first_batch(data, ("image", config.teacher_sees)), run.device)
        classes = teacher(batch[config.teacher_sees]).shape[1], student(batch["image"]).shape[1]
    require(classes[0] == classes[1], "all must have the same number of classes, but teacher has "
            f"{classes[0]}, student has {classes[1]}", RoleError)


def _apart(teacher: Classifier, student: Classifier, labelled: LabelledImages | None, unlabelled: Images | None,
           config: Config, run: Run, view: View | None) -> nn.Module:
    """The two terms on batches of their own."""
    assert isinstance(student, nn.Module)
    optimizer = optimizer_for(student.parameters(), config.optimizer, config.lr, config.weight_decay)
    weights = {"ce": 1 - config.alpha, "kd": config.alpha}
    data: dict[str, Any] = {n: d for n, d in (("ce", labelled), ("kd", unlabelled)) if weights[n] > 0}
    sizes = {name: min(config.batch, len(part)) for name, part in data.items()}
    student.train()
    with frozen(teacher):
        for batches in run.loop("kd", data, batch=sizes, steps=config.steps, student=student, drop_last=True,
                                optimizer=optimizer):
            set_lr(optimizer, config.lr * warmup_cosine(run.progress, config.warmup))
            terms = {}
            for name, batch in batches.items():
                if name == "ce":
                    x = view(batch["image"]) if view else batch["image"]
                    terms[name] = weights[name] * F.cross_entropy(student(x), batch["label"])
                else:
                    x, y = both_views(batch, config, view)
                    with torch.no_grad():
                        target = teacher(y)
                    terms[name] = weights[name] * kl(target, student(x), config.temperature)
            run.update(optimizer, clip=None, **terms)
    return student
