"""Distillation without data: a generator learns which pictures the teacher is sure of, the student learns on them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from stillhouse.data.sets import TensorSet
from stillhouse.errors import RoleError, require
from stillhouse.measures.divergences import kl
from stillhouse.models.generators import PictureGenerator
from stillhouse.parts.feature_taps import feature_tap
from stillhouse.protocols import Classifier
from stillhouse.recipes.supervised import check_training, optimizer_for
from stillhouse.run import Run, begin, frozen, set_lr
from stillhouse.run.schedules import warmup_cosine


@dataclass(frozen=True)
class Config:
    shape: tuple[int, int, int] = (3, 32, 32)  # channels, height, width of the pictures
    steps: int = 24_000  # optimiser steps of generator and student
    batch: int = 512  # pictures a step
    optimizer: Literal["sgd", "adamw", "lars"] = "sgd"  # of the student
    lr: float = 0.1  # its peak learning rate; a cosine to 0
    warmup: float = 0.0  # part of the steps in which it rises
    weight_decay: float = 5e-4  # lambda
    generator_lr: float = 1e-3  # of Adam
    latent: int = 100  # length of the noise
    width: int = 128  # channels of the generator
    one_hot: float = 1.0  # weight of the cross-entropy with the teacher's own decision
    activation: float = 0.1  # alpha: of the mean size of its features
    information: float = 5.0  # beta: of the entropy of its mean answer
    temperature: float = 1.0  # T of the student's KL

    def __post_init__(self) -> None:
        check_training(self.steps, self.batch, self.lr, self.warmup, self.weight_decay)
        require(self.generator_lr > 0 and self.temperature > 0, "generator_lr and temperature must be above 0")
        require(min(self.one_hot, self.activation, self.information) >= 0, "weights must not be negative")
        require(len(self.shape) == 3 and self.shape[1] == self.shape[2], f"shape is (channels, side, side), not "
                f"{self.shape}")


def generator_terms(logits: Float[Tensor, "n classes"], features: Float[Tensor, "n d"], config: Config
                    ) -> dict[str, Tensor]:
    """DAFL's three terms (Chen et al. 2019, equations 3 to 6) on the teacher's answers to generated pictures: the
    one-hot loss CE(z, argmax z), minus the mean absolute feature, minus the entropy of the mean probabilities."""
    mean = logits.softmax(1).mean(0)
    return {"one_hot": config.one_hot * F.cross_entropy(logits, logits.argmax(1)),
            "activation": -config.activation * features.abs().mean(),
            "information": config.information * torch.xlogy(mean, mean).sum()}


def distill(
    teacher: Classifier,
    student: Classifier,
    config: Config = Config(),
    run: Run | None = None,
) -> nn.Module:
    """DAFL (Chen et al. 2019): in every step the generator makes a batch, learns from the teacher's answers to it
    (`generator_terms`), and the student learns them: T^2 KL(softmax(z_t / T) || softmax(z_s / T)).

    The teacher must let gradients through. The student is returned, the generator thrown away.
    """
    run = begin(run)
    probe = TensorSet(image=torch.randn(4, *config.shape))
    run.check(Classifier, probe, teacher=teacher, student=student)
    require(isinstance(teacher, nn.Module), "data-free distillation needs gradients through its teacher: an nn.Module, "
            f"not {type(teacher).__name__}", RoleError)
    assert isinstance(student, nn.Module) and isinstance(teacher, nn.Module)
    generator = PictureGenerator(config.latent, config.shape[0], config.shape[1], config.width).to(run.device)
    optimizer = optimizer_for(student.parameters(), config.optimizer, config.lr, config.weight_decay)
    adam = torch.optim.Adam(generator.parameters(), config.generator_lr)
    n = len(list(run.shard(range(config.batch))))
    student.train()
    with frozen(teacher), feature_tap(teacher) as features:
        for _ in run.loop("data-free", None, batch=config.batch, steps=config.steps, student=student,
                          generator=generator, optimizer=optimizer, adam=adam):
            set_lr(optimizer, config.lr * warmup_cosine(run.progress, config.warmup))
            x = generator(run.randn(n, config.latent))
            target = teacher(x)
            terms: dict[str, Any] = generator_terms(run.gather(target), run.gather(features()), config)
            answer = student(x.detach())
            run.update([optimizer, adam], **terms, kd=kl(target.detach(), answer, config.temperature))
    with torch.no_grad():
        run.picture("generated", generator.eval()(torch.randn(64, config.latent, device=run.device)))
    return student
