"""Contrastive representation distillation (Tian et al. 2020), and what contrastive distillation shares: the tapped
features of both models, projectors, a critic, the memory, negatives drawn from it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.utils import parametrize

from stillhouse.data.modalities import SeenAs
from stillhouse.errors import DataError, RoleError, require
from stillhouse.measures.crd import crd_nce
from stillhouse.measures.divergences import kl
from stillhouse.parts.critics import UnitProjector, critic
from stillhouse.parts.feature_taps import FeatureTap, feature_tap, tapped_width
from stillhouse.parts.heads import feature_width
from stillhouse.parts.memory import ContrastMemory
from stillhouse.protocols import AnyImages, Classifier, Encoder
from stillhouse.recipes.supervised import View, check_training, optimizer_for
from stillhouse.recipes.views import both_views
from stillhouse.run import Run, begin, frozen, set_lr
from stillhouse.run.check import first_batch
from stillhouse.run.reading import to_device
from stillhouse.run.schedules import warmup_cosine

Scores = tuple[Float[Tensor, " n"], Float[Tensor, "n m"], Float[Tensor, "n m"]]


@dataclass(frozen=True)
class Config:
    steps: int = 187_500  # optimiser steps: 240 epochs of 50,000 pictures at this batch
    batch: int = 64  # pictures a step
    optimizer: Literal["sgd", "adamw", "lars"] = "sgd"  # SGD with momentum 0.9, AdamW, or LARS with momentum 0.9
    lr: float = 0.05  # peak learning rate; a cosine to 0
    warmup: float = 0.0  # part of the steps in which the learning rate rises
    weight_decay: float = 5e-4  # lambda
    ce: float = 1.0  # weight of the cross-entropy with the labels; 0: labels are not read
    kd: float = 0.0  # weight of T^2 KL between the softened probabilities of teacher and student
    temperature: float = 4.0  # T
    crd: float = 0.8  # beta
    tau: float = 0.07  # tau: divides the scores
    width: int = 128  # length of the embeddings u and v
    negatives: int = 16384  # M
    momentum: float = 0.5  # of the memory
    teacher_sees: str = "image"  # batch field that the teacher is given: "image" or "other"
    teacher_feature: str = "penultimate"  # h_T: "penultimate", "output" or the path of a module
    student_feature: str = "penultimate"  # h_S, likewise

    def __post_init__(self) -> None:
        check_contrast(self)
        require(self.crd > 0, f"crd must be above 0, not {self.crd}")


def check_contrast(config: Any) -> None:
    """Raise ConfigError for settings of contrastive distillation that are out of range."""
    check_training(config.steps, config.batch, config.lr, config.warmup, config.weight_decay)
    require(min(config.ce, config.kd) >= 0, f"weights must not be negative; got ce {config.ce} and kd {config.kd}")
    require(config.temperature > 0 and config.tau > 0, "temperature and tau must be above 0; got "
            f"{config.temperature} and {config.tau}")
    require(config.width >= 1 and config.negatives >= 1, "width and negatives must be 1 or more; got "
            f"{config.width} and {config.negatives}")
    require(0 <= config.momentum < 1, f"momentum must lie in [0, 1), not {config.momentum}")
    require(config.teacher_sees in ("image", "other"), f"teacher_sees is 'image' or 'other', not "
            f"{config.teacher_sees!r}")


class Contrast(nn.Module):
    """Projectors g_T and g_S, a critic and the memory: all that is thrown away afterwards.

    `spectral` normalises projectors and critic; `kind` names the critic (`stillhouse.parts.critics`).
    """

    def __init__(self, teacher_width: int, student_width: int, size: int, width: int = 128, momentum: float = 0.5,
                 kind: str = "dot", spectral: bool = False):
        super().__init__()
        self.g_t = UnitProjector(teacher_width, width, spectral)
        self.g_s = UnitProjector(student_width, width, spectral)
        self.critic = critic(kind, width, spectral)
        self.memory = ContrastMemory(size, width, momentum)

    def scores(self, v: Float[Tensor, "n width"], u: Float[Tensor, "n width"], far: Int[Tensor, "n m"]) -> Scores:
        """c of the pairs, of each student embedding with the memory's u, and of each teacher embedding with its v, at
        the rows `far`. The critic's weights are normalised once."""
        with parametrize.cached():
            return (self.critic(v, u), self.critic(v[:, None], self.memory.u[far]),
                    self.critic(self.memory.v[far], u[:, None]))


def check_pair(teacher: Any, student: Any, data: Any, config: Any, run: Run) -> tuple[int, int]:
    """Check both models, each on the field that it will see, and the labels; the widths of h_T and h_S.

    Raises RoleError or DataError before any work.
    """
    own = data if config.teacher_sees == "image" else SeenAs(data, config.teacher_sees)
    batch = first_batch(data, ("image", config.teacher_sees, *(("label",) if config.ce else ())))
    if config.kd and own is data:
        run.check(Classifier, data, teacher=teacher, student=student)
    if config.ce:
        run.check(Classifier, data, labels=True, student=student)
    run.check(Encoder, data, student=student)
    run.check(Encoder, own, teacher=teacher)
    require(len(data) >= 2, "contrastive distillation needs at least two samples", DataError)
    batch = to_device(batch, run.device)
    widths = (tapped_width(teacher, batch[config.teacher_sees], config.teacher_feature),
              tapped_width(student, batch["image"], config.student_feature))
    if config.kd:
        t, s = feature_width(teacher, batch[config.teacher_sees]), feature_width(student, batch["image"])
        require(t == s, f"kd needs models of the same classes: teacher has {t}, student has {s}; set kd to 0",
                RoleError)
    return widths


@contextlib.contextmanager
def features_of(teacher: Any, student: Any, config: Any) -> Iterator[tuple[FeatureTap, FeatureTap]]:
    """The taps of h_T and h_S."""
    with (feature_tap(teacher, config.teacher_feature) as h_t, feature_tap(student, config.student_feature) as h_s):
        yield h_t, h_s


def label_terms(batch: dict[str, Any], logits: Tensor, target: Tensor, config: Any) -> dict[str, Any]:
    """The terms `ce` and `kd` that have a weight above 0."""
    terms: dict[str, Any] = {}
    if config.ce:
        terms["ce"] = config.ce * F.cross_entropy(logits, batch["label"])
    if config.kd:
        terms["kd"] = config.kd * kl(target, logits, config.temperature)
    return terms


def negatives_of(memory: ContrastMemory, index: Int[Tensor, " n"], count: int, run: Run) -> Int[Tensor, "n m"]:
    """`count` rows of the memory for every sample, drawn with replacement among all samples but itself."""
    return memory.others(index, run.randint(0, len(memory) - 1, len(index), count))


def nce(scores: Scores, memory: ContrastMemory, tau: float, run: Run) -> Tensor:
    """CRD's loss with both anchors, added; the normalisers Z are set on the first batch."""
    positive, *sides = scores
    terms = []
    for side, far in enumerate(sides):
        if not memory.normalised(side):
            exp = torch.cat([positive.detach()[:, None], far.detach()], 1).div(tau).exp()
            memory.normalise(side, run.mean(exp.sum(), exp.numel()))
        terms.append(crd_nce(positive, far, len(memory), memory.log_z[side], tau))
    return terms[0] + terms[1]


def remember(memory: ContrastMemory, index: Tensor, u: Tensor, v: Tensor, run: Run) -> None:
    """Update the memory with the batch of all processes."""
    memory.update(run.gather(index), run.gather(u.detach()), run.gather(v.detach()))


def distill(
    teacher: Classifier | Encoder,
    student: Classifier | Encoder,
    data: AnyImages,
    config: Config = Config(),
    run: Run | None = None,
    view: View | None = None,
) -> nn.Module:
    """L = CE + kd KD + beta [NCE(v, memory of u) + NCE(u, memory of v)] with u = g_T(h_T), v = g_S(h_S) of unit length.

    Returns the student. Deviation from the release: a sample is never its own negative.
    """
    run = begin(run)
    widths = check_pair(teacher, student, data, config, run)
    assert isinstance(student, nn.Module) and isinstance(teacher, nn.Module)
    student.train()
    contrast = Contrast(*widths, len(data), config.width, config.momentum).to(run.device)
    optimizer = optimizer_for([*student.parameters(), *contrast.parameters()], config.optimizer, config.lr,
                              config.weight_decay)
    with frozen(teacher), features_of(teacher, student, config) as (h_t, h_s):
        for batch in run.loop("crd", data, batch=config.batch, steps=config.steps, student=student, contrast=contrast,
                              optimizer=optimizer, drop_last=len(data) >= config.batch):
            set_lr(optimizer, config.lr * warmup_cosine(run.progress, config.warmup))
            x, y = both_views(batch, config, view)
            with torch.no_grad():
                target = teacher(y)
            logits = student(x)
            u, v = contrast.g_t(h_t()), contrast.g_s(h_s())
            far = negatives_of(contrast.memory, batch["index"], config.negatives, run)
            loss = nce(contrast.scores(v, u, far), contrast.memory, config.tau, run)
            run.update(optimizer, **label_terms(batch, logits, target, config), crd=config.crd * loss)
            remember(contrast.memory, batch["index"], u, v, run)
    return student
