"""SLA: a classifier learns class and transformation as one joint label, and moves its own ensemble into one pass.

t_1, ..., t_M are invertible transformations, t_1 the identity; x^(j) = t_j(x). On the features f(x) sits a joint head
sigma: R^d -> R^(N M), z^(j) = sigma(f(x^(j))), beside the classifier's own head u. With j counted from 0,

    L_SLA = (1/M) sum_j CE(z^(j), y M + j)
    P_agg = softmax(s),   s_y = (1/M) sum_j z^(j)[y M + j]                    the ensemble over the copies
    L = w L_SLA + alpha T^2 KL(P_agg || softmax(u(f(x)))) + beta CE(u(f(x)), y)

P_agg is a constant, its temperature T that of u; u is trained on the picture as it is alone. The result answers from u
in one pass (SLA+SD), from sigma given j = 0 in one pass (SLA+SI), or with P_agg from M passes (SLA+AG).

Lee et al. 2020 (ICML), algorithm 1; the release has T = 1 and alpha = beta = 1. u is the student's own last layer.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stillhouse.data.sets import TensorSet
from stillhouse.data.transformations import copies, transformations
from stillhouse.data.upright import upright
from stillhouse.data.variants import balanced, long_tailed
from stillhouse.errors import require
from stillhouse.evaluate.claims import Claim
from stillhouse.evaluate.classification import accuracy
from stillhouse.measures.divergences import kl
from stillhouse.measures.joint_labels import aggregated_logits, joint_labels
from stillhouse.models.convnets import TinyConvNet
from stillhouse.models.label_augmented import INFERENCES, Inference, LabelAugmented, label_augmented
from stillhouse.protocols import Classifier, LabelledImages
from stillhouse.recipes import transformed
from stillhouse.recipes.supervised import check_training, optimizer_for
from stillhouse.recipes.views import random_view
from stillhouse.run import Run, begin, set_lr
from stillhouse.run.schedules import piecewise, warmup_cosine

NUMBER = 32

CLAIMS = [
    Claim("aggregated over the rotations, SLA beats plain training",
          lambda a: a["sla"]["aggregated"] - a["labels"]["accuracy"]),
    Claim("distilled into one pass, SLA beats plain training",
          lambda a: a["sla"]["distilled"] - a["labels"]["accuracy"]),
    Claim("aggregated SLA is at least as good as multi-task learning",
          lambda a: a["sla"]["aggregated"] - a["multi-task"]["accuracy"]),
    Claim("rotations as augmentation harm where they change what a thing is",
          lambda a: a["labels"]["accuracy"] - a["augmentation"]["accuracy"], report=True),
    Claim("the aggregate beats a single pass of the joint head", lambda a: a["sla"]["aggregated"] - a["sla"]["single"],
          report=True),
    Claim("distillation beats a single pass of the joint head", lambda a: a["sla"]["distilled"] - a["sla"]["single"],
          report=True),
    Claim("distilled into one pass it beats plain training on four times the pictures a step",
          lambda a: a["sla"]["distilled"] - a["labels, 4 x batch"]["accuracy"], report=True),
    Claim("the aggregate as target adds to the labels",
          lambda a: a["sla"]["distilled"] - a["no aggregate"]["distilled"], report=True),
    Claim("with colour cycles, too, the aggregate beats plain training",
          lambda a: a["colours"]["aggregated"] - a["labels"]["accuracy"], report=True),
    Claim("on a long tail the aggregate beats plain training",
          lambda a: a["long tail, sla"]["aggregated"] - a["long tail"]["accuracy"], report=True),
    Claim("with ten pictures a class the aggregate beats plain training",
          lambda a: a["few, sla"]["aggregated"] - a["few"]["accuracy"], report=True),
]


@dataclass(frozen=True)
class Config:
    steps: int = 80_000  # optimiser steps
    batch: int = 128  # pictures a step, before they are copied
    optimizer: Literal["sgd", "adamw", "lars"] = "sgd"  # SGD with momentum 0.9, AdamW, or LARS with momentum 0.9
    lr: float = 0.1  # peak learning rate
    schedule: Literal["drops", "cosine"] = "drops"  # a tenth at 1/2 and 3/4 of the steps, or a cosine to 0
    warmup: float = 0.0  # part of the steps in which the learning rate rises under "cosine"
    weight_decay: float = 1e-4  # lambda
    view: float = 0.0  # strength of the random shifts, turns and light changes, before the transformations
    transformations: str = "rotations"  # t_1, ..., t_M by name (`stillhouse.data.transformations`)
    sla: float = 1.0  # w: weight of L_SLA; M on large data sets
    alpha: float = 1.0  # weight of the KL to the aggregate; 0: no self-distillation
    beta: float = 1.0  # weight of the cross-entropy of u with the labels
    temperature: float = 1.0  # T
    inference: Inference = "distilled"  # what the result answers from: u, sigma in one pass, or sigma in M passes

    def __post_init__(self) -> None:
        check_training(self.steps, self.batch, self.lr, self.warmup, self.weight_decay)
        transformations(self.transformations)
        require(self.schedule in ("drops", "cosine"), f"schedule is 'drops' or 'cosine', not {self.schedule!r}")
        require(self.inference in INFERENCES, f"inference is one of {', '.join(INFERENCES)}, not {self.inference!r}")
        require(min(self.view, self.sla, self.alpha, self.beta) >= 0, "view and weights must not be negative")
        require(self.sla > 0 or self.alpha == 0, "self-distillation (alpha) needs the joint head: sla above 0")
        needed = self.alpha + self.beta if self.inference == "distilled" else self.sla
        require(needed > 0, f"inference '{self.inference}' asks a head that these weights do not train")
        require(self.temperature > 0, f"temperature must be above 0, not {self.temperature}")


EMBEDDED = Config(steps=300, batch=32, optimizer="adamw", lr=0.01, schedule="cosine", warmup=0.05)


def distill(
    student: Classifier,
    labelled: LabelledImages,
    config: Config = Config(),
    run: Run | None = None,
) -> LabelAugmented:
    """Train the student in place, with a joint head on its features; both are returned, and a call asks the one that
    `config.inference` names. The student alone is a plain classifier as well (SLA+SD)."""
    run = begin(run)
    example = run.check(Classifier, labelled, labels=True, student=student)["image"]
    assert isinstance(student, nn.Module)
    model = label_augmented(student, example, config.transformations, config.inference)
    count = model.count
    model.train()
    optimizer = optimizer_for(model.parameters(), config.optimizer, config.lr, config.weight_decay)
    for batch in run.loop("labels", labelled, batch=config.batch, steps=config.steps, student=student,
                          joint=model.joint, optimizer=optimizer, drop_last=len(labelled) >= config.batch):
        set_lr(optimizer, config.lr * (warmup_cosine(run.progress, config.warmup) if config.schedule == "cosine"
                                       else piecewise(run.progress, [(0.5, 0.1), (0.75, 0.1)])))
        x = random_view(batch["image"], run, config.view) if config.view else batch["image"]
        logits, joint = model.both(copies(x, model.transformations))
        run.update(optimizer, clip=None, **terms(logits[::count], joint, batch["label"], count, config))
    return model


def terms(logits: Tensor, joint: Tensor, label: Tensor, count: int, config: Config) -> dict[str, Tensor]:
    """The weighted terms of L from u(f(x)) [n, N] and sigma(f(x^(j))) [n M, N M]."""
    losses = {}
    if config.sla:
        losses["sla"] = config.sla * F.cross_entropy(joint, joint_labels(label, count))
    if config.alpha:
        aggregate = aggregated_logits(joint.detach(), count)
        losses["aggregate"] = config.alpha * kl(aggregate, logits, config.temperature)
    if config.beta:
        losses["ce"] = config.beta * F.cross_entropy(logits, label)
    return losses


def tiny() -> dict[str, Any]:
    torch.manual_seed(0)
    student = nn.Sequential(nn.Conv2d(3, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(108, 4))
    return {"student": student, "labelled": TensorSet(image=torch.randn(10, 3, 8, 8), label=torch.arange(10) % 4),
            "config": Config(steps=4, batch=4, transformations="colour cycles", view=1.0, temperature=2.0)}


# -------------------------------------------------------------------- the embedded experiment

WIDTH = 8
"""Of the student."""


def ground() -> dict[str, TensorSet]:
    """Noisy upright objects of 20 pixels in 8 classes, one of them another upside down: 40 a class, a long tail of 40
    to 4, 10 a class; 1,000 to test."""
    train = upright(320, seed=1, size=20, noise=0.7)
    return {"train": train, "long tail": long_tailed(train, 40, 10), "few": balanced(train, 10),
            "test": upright(1000, seed=2, size=20, noise=0.7)}


def experiment(run: Run) -> dict[str, dict[str, float]]:
    """All arms with the same student and steps on the same original pictures; accuracy on the test pictures, in one
    pass but for "aggregated". The long tail is tested on all classes alike."""
    g = ground()
    shared = {name: getattr(EMBEDDED, name) for name in ("steps", "batch", "optimizer", "lr", "warmup", "weight_decay")}

    def new() -> nn.Module:
        run.begin()
        return TinyConvNet(channels_in=3, classes=8, width=WIDTH).to(run.device)

    def baseline(kind: str = "none", task: Any = "augment", data: str = "train", **changes: Any) -> dict[str, float]:
        config = transformed.Config(**{**shared, "kind": kind, "task": task, **changes})
        return {"accuracy": accuracy(transformed.train(new(), g[data], config, run), g["test"], device=run.device)}

    def sla(data: str = "train", **changes: Any) -> dict[str, float]:
        model = distill(new(), g[data], dataclasses.replace(EMBEDDED, **changes), run)
        result: dict[str, float] = {}
        for way in INFERENCES[0 if changes.get("beta", 1) else 1 :]:
            model.inference = way
            result[way] = accuracy(model, g["test"], device=run.device)
        shown = g["test"].image[:6]
        run.picture("test pictures under every transformation", copies(shown, model.transformations), model.count)
        return result

    return run.arms(
        {"labels": baseline,
         "augmentation": lambda: baseline("rotations"),
         "multi-task": lambda: baseline("rotations", "multi"),
         "sla": sla},
        extended={
            "labels, 4 x batch": lambda: baseline(batch=4 * EMBEDDED.batch),
            "no self-distillation": lambda: sla(alpha=0.0, beta=0.0, inference="single"),
            "no aggregate": lambda: sla(alpha=0.0),
            "colours": lambda: sla(transformations="colour cycles"),
            "colours, augmentation": lambda: baseline("colour cycles"),
            "long tail": lambda: baseline(data="long tail"),
            "long tail, sla": lambda: sla("long tail"),
            "few": lambda: baseline(data="few"),
            "few, sla": lambda: sla("few")})
