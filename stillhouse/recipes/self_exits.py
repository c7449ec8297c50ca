"""A network that is its own teacher: exits from its inner stages learn from its deepest one, and it from them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn

from stillhouse.errors import RoleError, require
from stillhouse.measures.divergences import kl
from stillhouse.measures.feature_maps import hint
from stillhouse.parts.exits import exit_branches
from stillhouse.parts.heads import feature_width
from stillhouse.parts.regressors import Regressor
from stillhouse.parts.stages import feature_map, stages_of
from stillhouse.parts.taps import taps
from stillhouse.protocols import Classifier, LabelledImages
from stillhouse.recipes.supervised import View, check_training, optimizer_for
from stillhouse.run import Run, begin, set_lr
from stillhouse.run.schedules import warmup_cosine


@dataclass(frozen=True)
class Config:
    steps: int = 1000  # optimiser steps
    batch: int = 64  # pictures a step
    optimizer: Literal["sgd", "adamw", "lars"] = "sgd"  # SGD with momentum 0.9, AdamW, or LARS with momentum 0.9
    lr: float = 0.1  # peak learning rate; a cosine to 0
    warmup: float = 0.05  # part of the steps in which the learning rate rises
    weight_decay: float = 5e-4  # lambda
    alpha: float = 0.1  # weight of the deepest exit's answer for the others; their labels have 1 - alpha
    temperature: float = 3.0  # T
    features: float = 1e-3  # weight of the squared difference of the features from the deepest ones
    taps: tuple[str, ...] = ()  # module paths of the stages, shallow to deep; empty: those that are found

    def __post_init__(self) -> None:
        check_training(self.steps, self.batch, self.lr, self.warmup, self.weight_decay)
        require(0 <= self.alpha <= 1, f"alpha must lie in [0, 1], not {self.alpha}")
        require(self.temperature > 0 and self.features >= 0, "temperature must be above 0 and features not negative; "
                f"got {self.temperature} and {self.features}")


def train(
    student: Classifier,
    labelled: LabelledImages,
    config: Config = Config(),
    run: Run | None = None,
    view: View | None = None,
) -> nn.Module:
    """Be your own teacher (Zhang et al. 2019, section 3.2), with z the network's own answer and z_i those of the exits:

    L = CE(y, z) + sum_i [(1 - alpha) CE(y, z_i) + alpha T^2 KL(z || z_i) + features |F_i - F|^2].

    z and the deepest features F are constants in the exits' terms. Exits and regressors are thrown away.
    """
    run = begin(run)
    example = run.check(Classifier, labelled, labels=True, student=student)["image"]
    assert isinstance(student, nn.Module)
    stages = stages_of(student, example, config.taps)
    require(len(stages) >= 2, f"exits need two stages or more; found {list(stages)}. Name them with taps", RoleError)
    classes = feature_width(student, example)
    paths = list(stages)
    exits = exit_branches(stages, classes)[:-1].to(run.device)
    regressors = nn.ModuleList(Regressor(stages[p], stages[paths[-1]]) for p in paths[:-1]).to(run.device)
    optimizer = optimizer_for([*student.parameters(), *exits.parameters(), *regressors.parameters()], config.optimizer,
                              config.lr, config.weight_decay)
    student.train()
    with taps(student, paths) as features:
        for batch in run.loop("exits", labelled, batch=config.batch, steps=config.steps, student=student, exits=exits,
                              regressors=regressors, optimizer=optimizer, drop_last=len(labelled) >= config.batch):
            set_lr(optimizer, config.lr * warmup_cosine(run.progress, config.warmup))
            x, y = view(batch["image"]) if view else batch["image"], batch["label"]
            z = student(x)
            inner = [features[p] for p in paths[:-1]]
            answers = [branch(f) for branch, f in zip(exits, inner, strict=True)]
            deepest = feature_map(features[paths[-1]]).detach()
            near = [hint(deepest, r(f)) for r, f in zip(regressors, inner, strict=True)]
            ce = torch.stack([F.cross_entropy(a, y) for a in answers]).sum()
            kd = torch.stack([kl(z.detach(), a, config.temperature) for a in answers]).sum()
            terms: dict[str, Any] = {"ce": F.cross_entropy(z, y), "exits": (1 - config.alpha) * ce,
                                     "kd": config.alpha * kd, "features": config.features * torch.stack(near).sum()}
            run.update(optimizer, **terms)
    return student
