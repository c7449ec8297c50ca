"""Fantastic gains: what other trained classifiers know besides is moved into an already trained student, sample by
sample, whichever of them is the better one.

With logits z_t of a frozen teacher, z_st of a frozen copy of the student as it was at first and z_s of the student that
is trained, KL-Dist + DP (data partitioning) is

    L = T^2 / n sum_i [ m_t KL(p_t || p_s) + m_st KL(p_st || p_s) ],   m_st = 1 - m_t

    supervised:    m_t = 1 where p_t(y_i) > p_st(y_i)
    unsupervised:  m_t = 1 where max_c p_t(c) > max_c p_st(c)

The KLs are at temperature T, the masks at T = 1. Samples on which the student was the surer keep it where it was, the
others teach it; no label is needed beside the mask's. `partition="none"` is the baseline KL-Dist (m_t = 1), with
`alpha` below 1 XE-KL, (1 - alpha) CE + alpha KL, and with `slow_every` XE-KL + MCL, which returns slow weights,
theta_slow <- tau theta_slow + (1 - tau) theta_fast every N steps. Several teachers come one after another (each time
the student as it is becomes the frozen one), in parallel (per sample the surest of all teachers and the frozen student)
or as a soup (the mean of the weights of one transfer per teacher).

Roth, Thede et al. 2024, "Fantastic Gains and Where to Find Them". The student may first be trained on the labels
(`pretrain`), which the paper has behind it. Models of hf:, timm: and torchvision: bring their own normalisation of the
pictures, all see the same view. Where the paper leaves room: the learning rate falls along a cosine, T is 1.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stillhouse.data.mining import pictures
from stillhouse.data.sets import TensorSet, column, subset
from stillhouse.data.shapes import shape_pairs
from stillhouse.data.variants import balanced_indices
from stillhouse.errors import ConfigError, DataError, RoleError, require
from stillhouse.evaluate.claims import Claim
from stillhouse.evaluate.classification import predictions
from stillhouse.evaluate.flips import (
    flips,
    gain_concentration,
    gain_entropy,
    gain_similarity,
    success_rate,
    transfer_scores,
)
from stillhouse.measures.confidence import of_each, surest
from stillhouse.measures.divergences import kl
from stillhouse.parts.ema import EMA
from stillhouse.parts.ensembles import answers
from stillhouse.protocols import Classifier, Images, LabelledImages
from stillhouse.recipes import supervised
from stillhouse.recipes.several_teachers import ORDERS, several_teachers
from stillhouse.recipes.supervised import check_training, optimizer_for
from stillhouse.recipes.views import random_view
from stillhouse.run import Run, begin, frozen, set_lr
from stillhouse.run.schedules import cosine
from stillhouse.zoo.classifiers import SPECIALISTS, specialist, specialists_data

NUMBER = 155

CLAIMS = [
    Claim("in every pair the teacher is right where the student is wrong on some samples",
          lambda a: a["zoo"]["least rho_pos"]),
    Claim("supervised partitioning succeeds for more pairs than KL-Dist",
          lambda a: a["dp"]["success rate"] - a["kl"]["success rate"]),
    Claim("supervised partitioning gains accuracy over all pairs", lambda a: a["dp"]["delta"]),
    Claim("from weaker teachers it gains more than KL-Dist",
          lambda a: a["dp"]["delta, weaker teacher"] - a["kl"]["delta, weaker teacher"]),
    Claim("unsupervised partitioning gains more than KL-Dist",
          lambda a: a["dp, no labels"]["delta"] - a["kl"]["delta"]),
    Claim("supervised partitioning gains accuracy from weaker teachers", lambda a: a["dp"]["delta, weaker teacher"],
          report=True),
    Claim("supervised partitioning succeeds for more pairs than XE-KL",
          lambda a: a["dp"]["success rate"] - a["xe-kl"]["success rate"], report=True),
    Claim("unsupervised partitioning is within a point of supervised",
          lambda a: a["dp, no labels"]["delta"] - a["dp"]["delta"] + 0.01, report=True),
    Claim("slow weights forget less than XE-KL alone",
          lambda a: a["xe-kl"]["forgotten"] - a["xe-kl + mcl"]["forgotten"], report=True),
    Claim("three teachers one after another gain more than the best of the three",
          lambda a: a["three teachers"]["sequential"] - a["three teachers"]["best one"], report=True),
    Claim("one after another gains more than in parallel",
          lambda a: a["three teachers"]["sequential"] - a["three teachers"]["parallel"], report=True),
    Claim("one after another gains more than a soup",
          lambda a: a["three teachers"]["sequential"] - a["three teachers"]["soup"], report=True),
]


@dataclass(frozen=True)
class Config:
    steps: int = 20_000  # optimiser steps of everything: 20 epochs of a tenth of 1.28 million pictures at this batch
    batch: int = 128  # pictures a step
    optimizer: Literal["sgd", "adamw"] = "sgd"  # SGD with momentum 0.9, or AdamW
    lr: float = 1e-4  # learning rate of the transfer; a cosine to 0
    weight_decay: float = 1e-3  # lambda
    temperature: float = 1.0  # T
    partition: Literal["labels", "confidence", "none"] = "labels"  # m_t: supervised, unsupervised, 1 for all samples
    alpha: float = 1.0  # weight of the KL terms; cross-entropy with the labels has 1 - alpha
    slow_every: int = 0  # N, steps between two updates of the slow weights; 0: none, the fast ones are returned
    slow: float = 0.99  # tau, what the slow weights keep of themselves
    order: Literal["sequential", "parallel", "soup"] = "sequential"  # how several teachers are heard
    share: float = 0.1  # part of the pictures that is used, of every class alike where labels are read
    view: float = 0.0  # strength of the random shifts, turns and light changes; 0: the view that the data set gives
    pretrain: float = 0.0  # part of the steps in which the student is first trained on the labels alone
    pretrain_lr: float = 0.05  # its peak learning rate, after a warm-up; a cosine to 0

    def __post_init__(self) -> None:
        check_training(self.steps, self.batch, self.lr, 0.0, self.weight_decay)
        require(self.temperature > 0 and self.pretrain_lr > 0, "temperature and pretrain_lr must be above 0, not "
                f"{self.temperature} and {self.pretrain_lr}")
        require(self.partition in ("labels", "confidence", "none"), "partition is 'labels', 'confidence' or 'none', "
                f"not {self.partition!r}")
        require(self.order in ORDERS, f"order is one of {', '.join(ORDERS)}, not {self.order!r}")
        require(0 <= self.alpha <= 1, f"alpha must lie in [0, 1], not {self.alpha}")
        require(self.slow_every >= 0 and 0 <= self.slow <= 1, "slow_every is 0 or more and slow lies in [0, 1]; got "
                f"{self.slow_every} and {self.slow}")
        require(0 < self.share <= 1 and 0 <= self.pretrain <= 1, "share and pretrain are parts of the data and of the "
                f"steps; got {self.share} and {self.pretrain}")
        require(self.view >= 0, f"view must not be negative, got {self.view}")

    @property
    def reads_labels(self) -> bool:
        """Whether the transfer itself reads labels."""
        return self.partition == "labels" or self.alpha < 1


EMBEDDED = Config(steps=80, batch=64, lr=5e-3, share=0.4)


def distill(
    teachers: Sequence[Classifier],
    student: Classifier,
    labelled: LabelledImages | None = None,
    unlabelled: Images | None = None,
    config: Config = Config(),
    run: Run | None = None,
) -> nn.Module:
    """Train the student in place on what every teacher knows better, and return it.

    Where the settings read labels the transfer is on `labelled`, otherwise on the pictures of both sets.
    """
    run = begin(run)
    data = _check(run, teachers, student, labelled, unlabelled, config)
    assert isinstance(student, nn.Module)
    first = round(config.pretrain * config.steps)
    if first:
        assert labelled is not None
        with run.scope("pretraining"):
            supervised.train(student, labelled, supervised.Config(
                first, config.batch, config.optimizer, config.pretrain_lr, 0.05, config.weight_decay), run,
                _view(config, run))
    with frozen(*teachers):
        several_teachers(student, teachers, config.steps - first,
                         lambda s, each, steps: transfer(s, each, steps, data, config, run), run, config.order)
    return student


def transfer(student: nn.Module, teachers: Sequence[Classifier], steps: int, data: Any, config: Config,
             run: Run) -> None:
    """One transfer from one teacher, or from several in parallel; the student as it comes is the frozen one."""
    old = copy.deepcopy(student).eval().requires_grad_(False)
    sources = list(teachers) if config.partition == "none" else [old, *teachers]
    slow = EMA(student) if config.slow_every else None
    optimizer = optimizer_for(student.parameters(), config.optimizer, config.lr, config.weight_decay)
    view = _view(config, run)
    student.train()
    for batch in run.loop("transfer", data, batch=config.batch, steps=steps, student=student, slow=slow,
                          drop_last=len(data) >= config.batch, optimizer=optimizer):
        set_lr(optimizer, config.lr * cosine(run.progress))
        x = view(batch["image"])
        z = answers(sources, x)
        chosen = surest(z, batch["label"] if config.partition == "labels" else None)
        z_s = student(x)
        terms = {"kl": config.alpha * kl(of_each(z, chosen), z_s, config.temperature)}
        if config.alpha < 1:
            terms["ce"] = (1 - config.alpha) * F.cross_entropy(z_s, batch["label"])
        run.update(optimizer, clip=None, **terms)
        if config.partition != "none":
            run.log(taught=(chosen > 0).float().mean())
        if slow is not None and (run.k + 1) % config.slow_every == 0:
            slow.update(student, config.slow)
    if slow is not None:
        student.load_state_dict(slow.module.state_dict())


def _view(config: Config, run: Run) -> Callable[[Tensor], Tensor]:
    return lambda x: random_view(x, run, config.view) if config.view else x


def _check(run: Run, teachers: Sequence[Classifier], student: Classifier, labelled: Any, unlabelled: Any,
           config: Config) -> Any:
    """Refuse what does not fit together; return the data of the transfer."""
    require(len(teachers) >= 1, "give at least one teacher", RoleError)
    read = config.reads_labels or config.pretrain > 0
    for given in (labelled, unlabelled):
        if given is not None:
            run.check(Classifier, given, labels=read and given is labelled, teachers=list(teachers), student=student)
    require(labelled is not None or unlabelled is not None, "give labelled or unlabelled pictures", DataError)
    require(labelled is not None or not read, "partition='labels', alpha below 1 and pretrain read labels: give "
            "labelled pictures, or partition='confidence'", ConfigError)
    if config.reads_labels:
        return labelled if config.share == 1 else subset(
            labelled, balanced_indices(column(labelled, "label"), config.share, run.seed))
    whole = pictures(*((part, None) for part in (labelled, unlabelled) if part is not None))
    if config.share == 1:
        return whole
    generator = torch.Generator().manual_seed(run.seed)
    kept = max(1, round(config.share * len(whole)))
    return subset(whole, torch.randperm(len(whole), generator=generator)[:kept].sort().values)


def tiny() -> dict[str, Any]:
    torch.manual_seed(0)
    first, second, student = (nn.Sequential(nn.Flatten(), nn.Linear(16, width), nn.ReLU(), nn.Linear(width, 3))
                              for width in (5, 4, 6))
    image, label = torch.randn(24, 1, 4, 4), torch.arange(24) % 3
    return {"teachers": [first, second], "student": student, "labelled": TensorSet(image=image[:12], label=label[:12]),
            "unlabelled": TensorSet(image=image[12:]),
            "config": Config(steps=8, batch=4, lr=0.1, share=0.5, pretrain=0.25, slow_every=2, alpha=0.5, view=1.0)}


# -------------------------------------------------------------------- the embedded experiment

PAIRS = [("small convnet", "vgg"), ("small convnet", "vit"), ("convnet", "mixer"), ("vgg", "mlp"), ("mixer", "vit"),
         ("vit", "mlp"), ("convnet", "small convnet"), ("vgg", "convnet"), ("mixer", "convnet"), ("vit", "vgg"),
         ("mlp", "mixer"), ("mlp", "small convnet")]
"""Student and teacher of the twelve transfers; in the first six the teacher is the weaker one."""


def experiment(run: Run) -> dict[str, dict[str, float]]:
    """Twelve pairs of six specialists of shapes, half of them with the weaker one as teacher; every transfer on the
    same part of the pictures that they were trained on, scored on 1,200 others."""
    zoo = {name: specialist(name).to(run.device) for name in SPECIALISTS}
    data, test = specialists_data(), shape_pairs(1200, seed=2000)
    before = {name: predictions(model, test, device=run.device)[0] for name, model in zoo.items()}
    right = {name: (z.argmax(-1) == test.label).double().mean().item() for name, z in before.items()}

    def learned(student: str, teachers: Sequence[str], config: Config) -> Tensor:
        new = copy.deepcopy(zoo[student])
        with run.scope(f"{student} from {', '.join(teachers)}"):
            distill([zoo[name] for name in teachers], new, data, config=config, run=run)
        return predictions(new, test, device=run.device)[0]

    def over_pairs(**changes: Any) -> Callable[[], dict[str, float]]:
        config = dataclasses.replace(EMBEDDED, **changes)

        def measure() -> dict[str, float]:
            scores = [{**transfer_scores(before[s], learned(s, [t], config), before[t], test.label),
                       "weaker": right[t] < right[s]} for s, t in PAIRS]
            run.picture("transfers", transfers_chart(scores))
            return {**{name: _mean(row[name] for row in scores) for name in scores[0] if name != "weaker"},
                    "delta, weaker teacher": _mean(row["delta"] for row in scores if row["weaker"]),
                    "success rate": success_rate([row["delta"] for row in scores]),
                    "success rate, weaker teacher": success_rate([r["delta"] for r in scores if r["weaker"]])}

        return measure

    def three() -> dict[str, float]:
        student, teachers = "mixer", ("convnet", "vgg", "vit")

        def delta(names: Sequence[str], order: Any = "sequential") -> float:
            config = dataclasses.replace(EMBEDDED, steps=3 * EMBEDDED.steps, order=order)
            with run.scope(order):
                after = learned(student, names, config)
            return (after.argmax(-1) == test.label).double().mean().item() - right[student]

        alone = {name: delta([name]) for name in teachers}
        return {"best one": max(alone.values()), "worst one": min(alone.values()),
                **{order: delta(teachers, order) for order in ORDERS}}

    return run.arms(
        {"zoo": lambda: complements(before, test),
         "kl": over_pairs(partition="none"),
         "xe-kl": over_pairs(partition="none", alpha=0.5),
         "dp": over_pairs(),
         "dp, no labels": over_pairs(partition="confidence")},
        extended={"xe-kl + mcl": over_pairs(partition="none", alpha=0.5, slow_every=2, slow=0.95),
                  "three teachers": three})


def _mean(values: Any) -> float:
    each = list(values)
    return sum(each) / len(each)


def complements(logits: dict[str, Tensor], test: TensorSet) -> dict[str, float]:
    """Flips between all ordered pairs: how many there are, how they spread over the classes, and whether the classes
    with the most of them are alike in shape or colour."""
    found = [flips(logits[s], logits[t], test.label) for s in logits for t in logits if s != t]
    labels = torch.arange(12)
    vectors = torch.cat([F.one_hot(labels // 3, 4), F.one_hot(labels % 3, 3)], 1).double()
    return {"least rho_pos": min(f.rho_pos for f in found), "mean rho_pos": _mean(f.rho_pos for f in found),
            "largest rho_pos": max(f.rho_pos for f in found),
            "entropy of gains": _mean(gain_entropy(f.gains) for f in found),
            "gains in the top fifth": _mean(gain_concentration(f.gains) for f in found),
            "similarity of the top fifth": _mean(gain_similarity(f.gains, vectors) for f in found)}


def transfers_chart(scores: Sequence[dict[str, float]]) -> Any:
    """A figure of one bar per pair: by how many points the student's accuracy changed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 3.4))
    axes = figure.add_subplot()
    names = [f"{s} from {t}" for s, t in PAIRS]
    axes.barh(names, [100 * row["delta"] for row in scores],
              color=["tab:orange" if row["weaker"] else "tab:blue" for row in scores])
    axes.invert_yaxis()
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_xlabel("change of accuracy in points (orange: weaker teacher)")
    return figure
