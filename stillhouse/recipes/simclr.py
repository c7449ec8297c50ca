"""SimCLR (Chen et al. 2020): two views of a picture attract each other among all others of the batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import nn

from stillhouse.errors import require
from stillhouse.measures.contrastive import nt_xent
from stillhouse.parts.heads import Projected
from stillhouse.protocols import Encoder, Images
from stillhouse.recipes.supervised import View, check_training, optimizer_for
from stillhouse.run import Run, begin, set_lr
from stillhouse.run.schedules import warmup_cosine


@dataclass(frozen=True)
class Config:
    steps: int = 1000  # optimiser steps
    batch: int = 64  # pictures a step
    optimizer: Literal["sgd", "adamw"] = "sgd"  # SGD with momentum 0.9, or AdamW
    lr: float = 0.1  # peak learning rate
    warmup: float = 0.05  # part of the steps in which the learning rate rises
    weight_decay: float = 5e-4  # lambda
    temperature: float = 0.1  # tau
    cosine: bool = True  # a cosine of the learning rate; else constant after the warm-up

    def __post_init__(self) -> None:
        check_training(self.steps, self.batch, self.lr, self.warmup, self.weight_decay)
        require(self.temperature > 0, f"temperature must be above 0, not {self.temperature}")


def train(
    student: Projected,
    data: Images,
    view: View,
    config: Config = Config(),
    run: Run | None = None,
) -> nn.Module:
    """NT-Xent between two views of every picture; the student (encoder and projector) is trained in place and
    returned. Over several processes the negatives come from all of them."""
    run = begin(run)
    run.check(Encoder, data, student=student)
    optimizer = optimizer_for(student.parameters(), config.optimizer, config.lr, config.weight_decay)
    student.train()
    for batch in run.loop("simclr", data, batch=config.batch, steps=config.steps, drop_last=len(data) >= config.batch,
                          student=student, optimizer=optimizer):
        decay = warmup_cosine(run.progress, config.warmup) if config.cosine else 1.0
        set_lr(optimizer, config.lr * decay)
        z, z_plus = (student(view(batch["image"])) for _ in range(2))
        run.update(optimizer, nt_xent=nt_xent(run.gather(z), run.gather(z_plus), config.temperature))
    return student
