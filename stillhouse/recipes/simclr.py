"""SimCLR (Chen et al. 2020): two views of a picture attract each other among all others of the batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from stillhouse.errors import require
from stillhouse.measures.contrastive import nt_xent
from stillhouse.parts.ema import EMA
from stillhouse.parts.heads import Projected, feature_width
from stillhouse.parts.queues import Queue
from stillhouse.protocols import Encoder, Images
from stillhouse.recipes.supervised import View, check_training, optimizer_for
from stillhouse.run import Run, begin, set_lr
from stillhouse.run.check import first_batch
from stillhouse.run.schedules import warmup_cosine


@dataclass(frozen=True)
class Config:
    steps: int = 1000  # optimiser steps
    batch: int = 64  # pictures a step
    optimizer: Literal["sgd", "adamw", "lars"] = "sgd"  # SGD with momentum 0.9, AdamW, or LARS with momentum 0.9
    lr: float = 0.1  # peak learning rate
    warmup: float = 0.05  # part of the steps in which the learning rate rises
    weight_decay: float = 5e-4  # lambda
    temperature: float = 0.1  # tau
    cosine: bool = True  # a cosine of the learning rate; else constant after the warm-up
    queue: int = 0  # negatives kept from earlier steps, written by a momentum encoder; 0: neither of the two
    decay: float = 0.999  # m of the momentum encoder

    def __post_init__(self) -> None:
        check_training(self.steps, self.batch, self.lr, self.warmup, self.weight_decay)
        require(self.temperature > 0, f"temperature must be above 0, not {self.temperature}")
        require(self.queue >= 0 and 0 <= self.decay <= 1, "queue must be 0 or more and decay lie in [0, 1]; got "
                f"{self.queue} and {self.decay}")


def train(
    student: Projected,
    data: Images,
    view: View,
    config: Config = Config(),
    run: Run | None = None,
) -> nn.Module:
    """NT-Xent between two views of every picture; the student (encoder and projector) is trained in place and
    returned. Over several processes the negatives come from all of them. With a `queue`, the average of the student
    over its steps writes what it gives for the second views into a queue of further negatives."""
    run = begin(run)
    run.check(Encoder, data, student=student)
    optimizer = optimizer_for(student.parameters(), config.optimizer, config.lr, config.weight_decay)
    student.train()
    memory: dict[str, Any] = {}
    if config.queue:
        width = feature_width(student, first_batch(data, ("image",))["image"].to(run.device))
        memory = {"average": EMA(student), "queue": Queue(config.queue, width).to(run.device)}
    for batch in run.loop("simclr", data, batch=config.batch, steps=config.steps, drop_last=len(data) >= config.batch,
                          student=student, optimizer=optimizer, **memory):
        decay = warmup_cosine(run.progress, config.warmup) if config.cosine else 1.0
        set_lr(optimizer, config.lr * decay)
        x, x_plus = (view(batch["image"]) for _ in range(2))
        z, z_plus = student(x), student(x_plus)
        negatives = memory["queue"]() if memory else None
        run.update(optimizer, nt_xent=nt_xent(run.gather(z), run.gather(z_plus), config.temperature, queue=negatives))
        if memory:
            with torch.no_grad():
                memory["queue"].push(run.gather(memory["average"](x_plus)))
            memory["average"].update(student, config.decay)
    return student
