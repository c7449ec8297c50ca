"""Distillation of one kind of knowledge beside labels and softened probabilities: the classic losses on feature maps
and on relations among samples, each with its taps and, where the widths differ, a regressor."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stillhouse.errors import RoleError, require
from stillhouse.measures.classes import decoupled_kd, dist
from stillhouse.measures.divergences import kl
from stillhouse.measures.feature_maps import attention_transfer, flow_matrix, hint, neuron_selectivity
from stillhouse.measures.relations import cka, graph_distance, rkd_angle, rkd_distance, similarity_preserving
from stillhouse.measures.zero_cost import channel_correlation
from stillhouse.parts.regressors import Regressor
from stillhouse.parts.stages import feature_map, pooled, stages_of
from stillhouse.parts.taps import taps
from stillhouse.protocols import Classifier, LabelledImages
from stillhouse.recipes.supervised import View, check_training, optimizer_for
from stillhouse.run import Run, begin, frozen, set_lr
from stillhouse.run.schedules import warmup_cosine

Kind = Literal["none", "hint", "attention", "nst", "fsp", "rkd", "sp", "cka", "irg", "ickd", "sp+ickd", "dkd", "dist"]
KNOWLEDGE: dict[str, str] = {"none": "response", "dkd": "response", "dist": "relation", "hint": "feature",
                             "attention": "feature", "nst": "feature", "fsp": "relation", "rkd": "relation",
                             "sp": "relation", "cka": "relation", "irg": "relation",
                             "ickd": "relation", "sp+ickd": "relation"}
"""Which kind of knowledge each loss moves, in the survey's words (Gou et al. 2021)."""


@dataclass(frozen=True)
class Config:
    steps: int = 1000  # optimiser steps
    batch: int = 64  # pictures a step
    optimizer: Literal["sgd", "adamw", "lars"] = "sgd"  # SGD with momentum 0.9, AdamW, or LARS with momentum 0.9
    lr: float = 0.1  # peak learning rate; a cosine to 0
    warmup: float = 0.05  # part of the steps in which the learning rate rises
    weight_decay: float = 5e-4  # lambda
    temperature: float = 4.0  # T
    ce: float = 1.0  # weight of the cross-entropy with the labels
    kd: float = 0.0  # weight of T^2 KL between the softened probabilities
    kind: Kind = "hint"  # what else is matched
    weight: float = 1.0  # its weight
    teacher_taps: tuple[str, ...] = ()  # module paths, shallow to deep; empty: the stages that are found
    student_taps: tuple[str, ...] = ()  # likewise, as many

    def __post_init__(self) -> None:
        check_training(self.steps, self.batch, self.lr, self.warmup, self.weight_decay)
        require(self.kind in KNOWLEDGE, f"kind is one of {', '.join(KNOWLEDGE)}, not {self.kind!r}")
        require(min(self.ce, self.kd, self.weight) >= 0, "weights must not be negative")
        require(self.temperature > 0, f"temperature must be above 0, not {self.temperature}")
        require(not (self.teacher_taps and self.student_taps) or len(self.teacher_taps) == len(self.student_taps),
                f"give as many taps of both models; got {self.teacher_taps} and {self.student_taps}")


def distill(
    teacher: Classifier,
    student: Classifier,
    labelled: LabelledImages,
    config: Config = Config(),
    run: Run | None = None,
    view: View | None = None,
) -> nn.Module:
    """L = ce CE(y, z_s) + kd T^2 KL + weight L_kind, all on the same view; the student is returned.

    - "hint": mean squared error of each stage's features after a regressor (FitNets, as one stage of training).
    - "attention", "nst": attention maps and neuron selectivity of each stage; "fsp": flow matrices of neighbours
      among the stages. Widths: the regressor of "fsp" maps the student's channels to the teacher's.
    - "rkd" (distance + 2 angle), "sp", "cka" (1 - CKA), "irg" (instance graphs): relations of the deepest stage's
      features over the batch. "ickd": correlations of its channels; "sp+ickd": both, as DisWOT's distillers.
    - "dkd", "dist": of the logits. "none": nothing.
    """
    run = begin(run)
    example = run.check(Classifier, labelled, labels=True, teacher=teacher, student=student)["image"]
    assert isinstance(student, nn.Module) and isinstance(teacher, nn.Module)
    t_taps, s_taps, regressors = _paired(teacher, student, example, config)
    regressors.to(run.device)
    optimizer = optimizer_for([*student.parameters(), *regressors.parameters()], config.optimizer, config.lr,
                              config.weight_decay)
    student.train()
    with frozen(teacher), taps(teacher, t_taps) as of_teacher, taps(student, s_taps) as of_student:
        for batch in run.loop("knowledge", labelled, batch=config.batch, steps=config.steps, student=student,
                              regressors=regressors, optimizer=optimizer, drop_last=len(labelled) >= config.batch):
            set_lr(optimizer, config.lr * warmup_cosine(run.progress, config.warmup))
            x = view(batch["image"]) if view else batch["image"]
            with torch.no_grad():
                target = teacher(x)
            logits = student(x)
            terms: dict[str, Any] = {"ce": config.ce * F.cross_entropy(logits, batch["label"])}
            if config.kd:
                terms["kd"] = config.kd * kl(target, logits, config.temperature)
            among = run.gather if config.kind in AMONG_SAMPLES else _as_is
            if config.kind in LOGITS:
                terms[config.kind] = config.weight * LOGITS[config.kind](among(target), among(logits),
                                                                         among(batch["label"]), config)
            elif config.kind != "none":
                fs = [of_student[path] for path in s_taps]
                if len(regressors):
                    fs = [r(f) for r, f in zip(regressors, fs, strict=True)]
                ts = [of_teacher[path] for path in t_taps]
                if config.kind in AMONG_SAMPLES:
                    ts, fs = [among(ts[-1])], [among(fs[-1])]
                terms[config.kind] = config.weight * FEATURES[config.kind](ts, fs)
            run.update(optimizer, **terms)
    return student


LOGITS: dict[str, Callable[..., Tensor]] = {
    "dkd": lambda t, s, y, config: decoupled_kd(t, s, y, temperature=config.temperature),
    "dist": lambda t, s, y, config: dist(t, s, temperature=config.temperature),
}


def _as_is(x: Tensor) -> Tensor:
    return x


def _each(measure: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Sequence[Tensor], Sequence[Tensor]], Tensor]:
    return lambda ts, fs: torch.stack([measure(t, s) for t, s in zip(ts, fs, strict=True)]).mean()


def _maps(measure: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Sequence[Tensor], Sequence[Tensor]], Tensor]:
    return _each(lambda t, s: measure(feature_map(t), feature_map(s)))


def _deepest(measure: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Sequence[Tensor], Sequence[Tensor]], Tensor]:
    return lambda ts, fs: measure(pooled(ts[-1]), pooled(fs[-1]))


def _flows(ts: Sequence[Tensor], fs: Sequence[Tensor]) -> Tensor:
    gaps = [(flow_matrix(feature_map(t), feature_map(u)) - flow_matrix(feature_map(s), feature_map(v))).square().mean()
            for t, u, s, v in zip(ts, ts[1:], fs, fs[1:], strict=False)]
    return torch.stack(gaps).mean()


FEATURES: dict[str, Callable[[Sequence[Tensor], Sequence[Tensor]], Tensor]] = {
    "hint": _maps(hint),
    "attention": _maps(attention_transfer),
    "nst": _maps(neuron_selectivity),
    "fsp": _flows,
    "rkd": _deepest(lambda t, s: rkd_distance(t, s) + 2 * rkd_angle(t, s)),
    "sp": _deepest(similarity_preserving),
    "cka": _deepest(lambda t, s: 1 - cka(t, s)),
    "irg": _deepest(graph_distance),
    "ickd": lambda ts, fs: channel_correlation(feature_map(ts[-1]), feature_map(fs[-1])),
    "sp+ickd": lambda ts, fs: (similarity_preserving(pooled(ts[-1]), pooled(fs[-1]))
                               + channel_correlation(feature_map(ts[-1]), feature_map(fs[-1]))),
}


AMONG_SAMPLES = ("rkd", "sp", "cka", "irg", "sp+ickd", "dist")
"""Kinds that compare the samples of the whole batch with one another, over all processes."""

REGRESSED = ("hint", "fsp", "ickd", "sp+ickd")
"""Kinds that compare channels, through a regressor from the student's to the teacher's."""


def _paired(teacher: nn.Module, student: nn.Module, example: Tensor, config: Config
            ) -> tuple[list[str], list[str], nn.ModuleList]:
    """The taps of both models and the regressors from the student's features to the teacher's."""
    if config.kind in LOGITS or config.kind == "none":
        return [], [], nn.ModuleList()
    found = {}
    for who, model, given in (("teacher", teacher, config.teacher_taps), ("student", student, config.student_taps)):
        found[who] = stages_of(model, example, given)
    count = min(len(found["teacher"]), len(found["student"]))
    needed = 2 if config.kind == "fsp" else 1
    require(count >= needed, f"'{config.kind}' needs {needed} or more stages of both models; found "
            f"{len(found['teacher'])} in the teacher and {len(found['student'])} in the student. Name them with "
            "teacher_taps and student_taps (`still taps MODEL` lists what can be read)", RoleError)
    ts, fs = ((list(found[who].items()))[-count:] for who in ("teacher", "student"))
    regressors = nn.ModuleList()
    if config.kind in REGRESSED:
        regressors.extend(Regressor(s, t, resize=config.kind == "hint") for (_, t), (_, s) in zip(ts, fs, strict=True))
    return [path for path, _ in ts], [path for path, _ in fs], regressors
