"""Adversarial distillation: a discriminator tells the student's features from the teacher's until it no longer can."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn

from stillhouse.errors import require
from stillhouse.measures.adversarial import fake_loss, real_loss, reverse_gradient
from stillhouse.measures.divergences import kl
from stillhouse.parts.discriminators import VectorHead
from stillhouse.parts.feature_taps import feature_tap, tapped_width
from stillhouse.protocols import Classifier, LabelledImages
from stillhouse.recipes.supervised import View, check_training, optimizer_for
from stillhouse.run import Run, begin, frozen, set_lr
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
    ce: float = 0.1  # weight of the cross-entropy with the labels
    kd: float = 0.9  # weight of T^2 KL between the softened probabilities
    weight: float = 0.1  # of the discriminator's gradient in the student
    teacher_feature: str = "penultimate"  # "penultimate", "output" or the path of a module
    student_feature: str = "penultimate"  # likewise

    def __post_init__(self) -> None:
        check_training(self.steps, self.batch, self.lr, self.warmup, self.weight_decay)
        require(min(self.ce, self.kd, self.weight) >= 0 and self.temperature > 0, "weights must not be negative, and "
                "temperature above 0")


def distill(
    teacher: Classifier,
    student: Classifier,
    labelled: LabelledImages,
    config: Config = Config(),
    run: Run | None = None,
    view: View | None = None,
) -> nn.Module:
    """L = ce CE + kd T^2 KL, and a game on the features (Wang et al. 2018, "Adversarial learning of portable student
    networks"): D learns to tell h_T from a linear map of h_S, the student and the map learn to make them alike.

    One optimizer: the gradient of D's loss is reversed on its way into the student. D and the map are thrown away.
    """
    run = begin(run)
    example = run.check(Classifier, labelled, labels=True, teacher=teacher, student=student)["image"]
    assert isinstance(student, nn.Module) and isinstance(teacher, nn.Module)
    wide = tapped_width(teacher, example, config.teacher_feature)
    lift = nn.Linear(tapped_width(student, example, config.student_feature), wide).to(run.device)
    critic = VectorHead(wide).to(run.device)
    optimizer = optimizer_for([*student.parameters(), *lift.parameters(), *critic.parameters()], config.optimizer,
                              config.lr, config.weight_decay)
    student.train()
    with (frozen(teacher), feature_tap(teacher, config.teacher_feature) as h_t,
          feature_tap(student, config.student_feature) as h_s):
        for batch in run.loop("adversarial", labelled, batch=config.batch, steps=config.steps, student=student,
                              lift=lift, critic=critic, optimizer=optimizer, drop_last=len(labelled) >= config.batch):
            set_lr(optimizer, config.lr * warmup_cosine(run.progress, config.warmup))
            x = view(batch["image"]) if view else batch["image"]
            with torch.no_grad():
                target = teacher(x)
            logits = student(x)
            fake = critic(reverse_gradient(lift(h_s()), config.weight))
            terms: dict[str, Any] = {"ce": config.ce * F.cross_entropy(logits, batch["label"]),
                                     "kd": config.kd * kl(target, logits, config.temperature),
                                     "game": fake_loss(fake) + real_loss(critic(h_t()))}
            run.update(optimizer, **terms)
    return student
