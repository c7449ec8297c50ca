"""Networks that learn from the one before them: each generation starts afresh and is taught by the last one's outputs.

    f_0 = lesson(new network, None),   f_k = lesson(new network, f_{k-1}),   k = 1 … count

`generations` is that chain for any lesson; `taught` is the lesson of stochastic gradients, whose loss is pluggable.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from stillhouse.errors import RoleError, require
from stillhouse.recipes.supervised import View, check_training, optimizer_for
from stillhouse.run import Run, frozen, set_lr
from stillhouse.run.schedules import piecewise, warmup, warmup_cosine

Lesson = Callable[[nn.Module, Any, int], nn.Module]
"""lesson(network, before, k) trains generation k in place, `before` being generation k - 1 (None for k = 0)."""

Terms = Callable[[Any, Any, Mapping[str, Any]], dict[str, Tensor]]
"""terms(said before, said, batch) names the terms of a loss; the first is None where there is no generation before."""


def generations(network: Callable[[], nn.Module], lesson: Lesson, count: int, run: Run, teacher: Any = None
                ) -> list[Any]:
    """[f_0, f_1, …, f_count]: generation 0 is the `teacher` where there is one, every other a new network under
    `lesson`, in a scope of its own, so that it has its own initial weights, data order and draws.

    Raises RoleError where `network` gives the same module twice, ConfigError for a negative count.
    """
    require(count >= 0, f"the number of generations after the first must be 0 or more, not {count}")
    made: list[Any] = [] if teacher is None else [teacher]
    for k in range(len(made), count + 1):
        with run.scope(f"generation {k}"):
            child = network().to(run.device)
            require(all(child is not other for other in made), "the network factory returns the same module every "
                    "time; it must build a new one at every call", RoleError)
            made.append(lesson(child, made[-1] if made else None, k))
    return made


def same_size(networks: list[nn.Module]) -> bool:
    """Whether all have parameters of the same names and shapes."""
    shapes = [[(name, tuple(p.shape)) for name, p in network.named_parameters()] for network in networks]
    return all(shape == shapes[0] for shape in shapes)


@dataclass(frozen=True)
class Config:
    steps: int = 1000  # optimiser steps of one generation
    batch: int = 64  # samples a step
    optimizer: Literal["sgd", "adamw", "lars"] = "sgd"  # SGD with momentum 0.9, AdamW, or LARS with momentum 0.9
    lr: float = 0.1  # peak learning rate
    schedule: Literal["cosine", "step"] = "step"  # to 0 along a cosine, or a tenth after 1/2 and after 3/4
    warmup: float = 0.0  # part of the steps in which the learning rate rises
    weight_decay: float = 1e-4  # lambda
    clip: float = math.inf  # largest global norm of the gradient

    def __post_init__(self) -> None:
        check_training(self.steps, self.batch, self.lr, self.warmup, self.weight_decay)
        require(self.schedule in ("cosine", "step"), f"schedule is 'cosine' or 'step', not {self.schedule!r}")
        require(self.clip > 0, f"clip is a norm above 0, not {self.clip}")


def rate(config: Config, progress: float) -> float:
    """The learning rate at `progress` in [0, 1]."""
    if config.schedule == "cosine":
        return config.lr * warmup_cosine(progress, config.warmup)
    return config.lr * warmup(progress, config.warmup) * piecewise(progress, ((0.5, 0.1), (0.75, 0.1)))


def pictured(model: Any, batch: Mapping[str, Any]) -> Tensor:
    """What a classifier says of a batch of pictures: its logits."""
    return model(batch["image"])


def taught(
    network: nn.Module,
    before: Any,
    data: Any,
    terms: Terms,
    config: Config,
    run: Run,
    say: Callable[[Any, Mapping[str, Any]], Any] = pictured,
    view: View | None = None,
    name: str = "train",
) -> nn.Module:
    """Train `network` in place, in the stage `name`, on the sum of `terms(say(before, batch), say(network, batch),
    batch)`; `before` is frozen, in eval mode, and sees what the network sees (`view` of the batch's pictures)."""
    optimizer = optimizer_for([p for p in network.parameters() if p.requires_grad], config.optimizer, config.lr,
                              config.weight_decay)
    clip = config.clip if math.isfinite(config.clip) else None
    network.train()
    with frozen(before):
        for batch in run.loop(name, data, batch=config.batch, steps=config.steps, student=network, optimizer=optimizer,
                              drop_last=len(data) >= config.batch):
            set_lr(optimizer, rate(config, run.progress))
            if view is not None:
                batch["image"] = view(batch["image"])
            said = None
            if before is not None:
                with torch.no_grad():
                    said = say(before, batch)
            run.update(optimizer, clip=clip, **terms(said, say(network, batch), batch))
    return network
