"""Training a network on a mixture of its labels and a teacher's probabilities, of any real weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.optim import Optimizer

from stillhouse.errors import require
from stillhouse.evaluate.classification import accuracy
from stillhouse.measures.divergences import signed_cross_entropy
from stillhouse.parts.best import Best
from stillhouse.recipes.supervised import View, check_training, optimizer_for
from stillhouse.run import Run, frozen, set_lr
from stillhouse.run.schedules import warmup, warmup_cosine

LOOKS = 10


@dataclass(frozen=True)
class Config:
    steps: int = 1000  # optimiser steps
    batch: int = 64  # pictures a step
    optimizer: Literal["adam", "sgd", "adamw"] = "adamw"  # "adam" and "sgd" (momentum 0.9) have lambda/2 ||theta||^2
    lr: float = 1e-3  # peak learning rate
    schedule: Literal["cosine", "constant"] = "cosine"  # of the learning rate after its warm-up
    warmup: float = 0.05  # part of the steps in which it rises
    weight_decay: float = 1e-4  # lambda
    loss: Literal["ce", "squared"] = "ce"  # cross-entropy, or the squared error of probabilities, mean over all numbers

    def __post_init__(self) -> None:
        check_training(self.steps, self.batch, self.lr, self.warmup, self.weight_decay)
        for name, known in (("optimizer", ("adam", "sgd", "adamw")), ("schedule", ("cosine", "constant")),
                            ("loss", ("ce", "squared"))):
            value = getattr(self, name)
            require(value in known, f"{name} is one of {', '.join(known)}, not {value!r}")


def mixed_target(label: Int[Tensor, " n"] | None, teacher: Float[Tensor, "n classes"] | None, weight: float,
                 classes: int) -> Float[Tensor, "n classes"]:
    """weight softmax(teacher) + (1 - weight) onehot(label), any real weight; its entries add up to 1 and are negative
    where the weight exceeds 1. With weight 0 the teacher's logits are not read, with 1 the labels are not."""
    parts = []
    if weight != 0:
        require(teacher is not None, f"a weight of {weight} needs a teacher")
        assert teacher is not None
        parts.append(weight * teacher.softmax(-1))
    if weight != 1:
        assert label is not None
        parts.append((1 - weight) * F.one_hot(label, classes).to(teacher if teacher is not None else torch.float32))
    return parts[0] if len(parts) == 1 else parts[0] + parts[1]


def squared_error(target: Float[Tensor, "n classes"], logits: Float[Tensor, "n classes"]) -> Float[Tensor, ""]:
    """The squared distance between `target` and softmax(logits), mean over samples and classes."""
    return (logits.softmax(-1) - target).square().mean()


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"ce": signed_cross_entropy, "squared": squared_error}


def optimizer_of(parameters: Any, config: Config) -> Optimizer:
    """The optimiser that `config` names."""
    if config.optimizer == "adam":
        return torch.optim.Adam(parameters, lr=config.lr, weight_decay=config.weight_decay)
    return optimizer_for(parameters, config.optimizer, config.lr, config.weight_decay)


def train(
    name: str,
    student: nn.Module,
    labelled: Any,
    teacher: nn.Module | None,
    weight: float,
    config: Config,
    run: Run,
    view: View | None = None,
    validation: Any = None,
) -> nn.Module:
    """Train the student in place, in the stage `name`, on `mixed_target` with `weight` on the frozen teacher.

    Both see the same view. With `validation` (labelled pictures) it is scored there ten times and the weights of the
    highest accuracy are kept: early stopping, which a negative weight of the labels needs where nothing else holds
    the network back, as its cross-entropy has no lower bound then.
    """
    return train_together(name, [student], labelled, teacher, [weight], config, run, view, validation)[0]


def train_together(
    name: str,
    students: Sequence[nn.Module],
    labelled: Any,
    teacher: nn.Module | None,
    weights: Sequence[float],
    config: Config,
    run: Run,
    view: View | None = None,
    validation: Any = None,
) -> Sequence[nn.Module]:
    """`train` for several students at once, each with a weight of its own: the same batches for all, and the teacher is
    asked once a batch."""
    require(len(students) == len(weights) >= 1, f"{len(weights)} weights for {len(students)} students")
    require(teacher is not None or not any(weights), f"weights {tuple(weights)} on a teacher, but no teacher was given")
    optimizers = [optimizer_of(student.parameters(), config) for student in students]
    best = [Best() for _ in students] if validation is not None else []
    held: dict[str, Any] = {"student": students[0]} if len(students) == 1 else {"students": list(students)}
    for student in students:
        student.train()
    with frozen(teacher):
        for batch in run.loop(name, labelled, batch=config.batch, steps=config.steps, best=best, optimizers=optimizers,
                              drop_last=len(labelled) >= config.batch, **held):
            x = view(batch["image"]) if view else batch["image"]
            answer = None
            if any(weights):
                with torch.no_grad():
                    answer = teacher(x) if teacher is not None else None
            due = (run.k + 1) * LOOKS // config.steps > run.k * LOOKS // config.steps
            for i, (student, weight, optimizer) in enumerate(zip(students, weights, optimizers, strict=True)):
                set_lr(optimizer, config.lr * rate(run.progress, config))
                logits = student(x)
                target = mixed_target(batch.get("label"), answer, weight, logits.shape[-1])
                term = config.loss if len(students) == 1 else f"{config.loss} {weight:g}"
                run.update(optimizer, clip=None, **{term: LOSSES[config.loss](target, logits)})
                if best and due:
                    with run.aside("validation", student):
                        score = accuracy(student, validation, device=run.device)
                    run.log(**{term.replace(config.loss, "validation"): score})
                    best[i].offer(score, student)
    for student, kept in zip(students, best, strict=False):
        kept.restore(student)
    return students


def rate(progress: float, config: Config) -> float:
    """The learning rate as a part of its peak."""
    if config.schedule == "cosine":
        return warmup_cosine(progress, config.warmup)
    return warmup(progress, config.warmup)
