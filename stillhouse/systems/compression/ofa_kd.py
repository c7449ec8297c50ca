"""OFA-KD: a classifier teaches another one of any architecture, stage by stage, in the space of logits.

Features of a convolutional network, a transformer and a mixer cannot be compared, so every stage of the student gets an
exit branch of its own that ends in class logits, and these are compared with the teacher's final logits. With
p = softmax(z_t / T), q = softmax(z_s / T), the label y and an exponent eps that stresses it,

    w_c   = (p_c + 1[c = y])^eps - 1[c = y]
    L_OFA = - sum_c w_c log q_c                                              (mean over the batch)
    L     = g CE(y, z_s) + k L_OFA(z_s) + o sum_i L_OFA(exit_i(stage_i))

CE and L_OFA together put (1 + p_y)^eps on -log q_y, the paper's form. At eps = 1, w = p. The branches follow the form
of the stage's features: maps go through separable convolutions that halve them, tokens through patch merging and
transformer blocks (`stillhouse.parts.exits`). They are thrown away; the student is returned as it was built.

Hao et al. 2023, "One-for-All". Under mixup, cutmix or label smoothing y is the class of the largest share. Where the
paper leaves room, its release is followed: w is fixed (the teacher has no gradient), L_OFA has no factor T^2.
Deviations: a network with fewer than four stages gets fewer branches; the learning rate falls to 0, not to a fiftieth
of the peak; of the recipe for transformers, RandAugment is replaced by random shifts, turns and light changes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stillhouse.data.digits import digits
from stillhouse.data.sets import TensorSet
from stillhouse.errors import RoleError, require
from stillhouse.evaluate.claims import Claim
from stillhouse.evaluate.classification import accuracy
from stillhouse.evaluate.similarity import heat_map, layer_similarity
from stillhouse.measures.classes import enhanced_cross_entropy
from stillhouse.models.convnets import ConvNet
from stillhouse.models.vit import SmallMixer, SmallViT
from stillhouse.parts.exits import GRID, exit_branches, stage_width
from stillhouse.parts.heads import feature_width
from stillhouse.parts.stages import stages_of
from stillhouse.parts.taps import taps
from stillhouse.protocols import Classifier, LabelledImages
from stillhouse.recipes import crd, kd, knowledge, supervised
from stillhouse.recipes.supervised import check_training, optimizer_for
from stillhouse.recipes.views import mixed, random_view
from stillhouse.run import Run, begin, frozen, set_lr
from stillhouse.run.schedules import warmup_cosine
from stillhouse.zoo.classifiers import digits_classifier

NUMBER = 87

CLAIMS = [
    Claim("a convolutional student learns more from a transformer through OFA than from the labels alone",
          lambda a: a["ofa"]["accuracy"] - a["labels"]["accuracy"]),
    Claim("and at least as much as through hints between features",
          lambda a: a["ofa"]["accuracy"] - a["hint"]["accuracy"]),
    Claim("and so does a mixer from a convolutional network, against the labels alone",
          lambda a: a["mixer, ofa"]["accuracy"] - a["mixer, labels"]["accuracy"]),
    Claim("middle features of the convolutional student are less like a transformer's than a ResNet's (linear CKA)",
          lambda a: a["labels"]["cka same family"] - a["labels"]["cka other family"]),
    Claim("and those of the mixer student less like a ResNet's than a mixer's",
          lambda a: a["mixer, labels"]["cka same family"] - a["mixer, labels"]["cka other family"], report=True),
    Claim("OFA beats Hinton's KD", lambda a: a["ofa"]["accuracy"] - a["kd"]["accuracy"], report=True),
    Claim("the exit branches add to the logits alone", lambda a: a["ofa"]["accuracy"] - a["no exits"]["accuracy"],
          report=True),
    Claim("stressing the label helps", lambda a: a["eps 1.2"]["accuracy"] - a["ofa"]["accuracy"], report=True),
    Claim("a mixer learns more through OFA than through Hinton's KD",
          lambda a: a["mixer, ofa"]["accuracy"] - a["mixer, kd"]["accuracy"], report=True),
    Claim("and more than through hints", lambda a: a["mixer, ofa"]["accuracy"] - a["mixer, hint"]["accuracy"],
          report=True),
    Claim("OFA beats every loss on features (hint, RKD, CKA, CRD)",
          lambda a: a["ofa"]["accuracy"] - max(a[arm]["accuracy"] for arm in ("hint", "rkd", "cka", "crd")),
          report=True),
    Claim("within one family OFA stays competitive: at most half a point below Hinton's KD",
          lambda a: a["same family, ofa"]["accuracy"] - a["same family, kd"]["accuracy"] + 0.005, report=True),
]


@dataclass(frozen=True)
class Config:
    steps: int = 117_300  # optimiser steps: 300 epochs of 50,000 pictures at this batch
    batch: int = 128  # pictures a step
    optimizer: Literal["sgd", "adamw"] = "sgd"  # SGD with momentum 0.9, or AdamW
    lr: float = 0.05  # peak learning rate; a cosine to 0
    warmup: float = 0.01  # part of the steps in which the learning rate rises
    weight_decay: float = 2e-3  # lambda
    clip: float | None = None  # largest norm of the student's and branches' gradient; None: any
    gt: float = 1.0  # g, weight of the cross-entropy with the labels
    kd: float = 1.0  # k, weight of L_OFA of the student's own logits
    ofa: float = 1.0  # o, weight of L_OFA of each exit branch; 0: there are none
    eps: tuple[float, ...] = (1.0,)  # eps: one for all, or one for each branch and then one for the student's logits
    temperature: float = 1.0  # T
    grid: int = GRID  # side of the grid down to which the branches of a token stage merge patches
    student_taps: tuple[str, ...] = ()  # module paths of the stages, shallow to deep; empty: those that are found
    view: float = 0.0  # strength of the random shifts, turns and light changes, the same for both models
    mixup: float = 0.0  # of the Beta distribution; 0: no mixup
    cutmix: float = 0.0  # likewise; with both, each in half of the steps
    smoothing: float = 0.1  # part of a label that is spread over the classes

    def __post_init__(self) -> None:
        check_training(self.steps, self.batch, self.lr, self.warmup, self.weight_decay)
        require(self.clip is None or self.clip > 0, f"clip must be above 0, or None, not {self.clip}")
        require(min(self.gt, self.kd, self.ofa) >= 0 and self.gt + self.kd > 0, "gt, kd and ofa must not be negative, "
                f"and the student's own logits need gt or kd; got {self.gt}, {self.kd} and {self.ofa}")
        require(len(self.eps) >= 1 and min(self.eps) > 0, f"eps is one exponent or more, above 0; got {self.eps}")
        require(self.temperature > 0 and self.grid >= 1, "temperature must be above 0 and grid 1 or more; got "
                f"{self.temperature} and {self.grid}")
        require(min(self.view, self.mixup, self.cutmix) >= 0 and 0 <= self.smoothing < 1, "view, mixup and cutmix must "
                f"be 0 or more and smoothing in [0, 1); got {self.view}, {self.mixup}, {self.cutmix} and "
                f"{self.smoothing}")


EMBEDDED = Config(steps=300, batch=64, optimizer="adamw", lr=0.01, warmup=0.05, weight_decay=1e-4, smoothing=0.0,
                  kd=4.0, ofa=1.0, eps=(1.0,), temperature=4.0)


def distill(
    teacher: Classifier,
    student: Classifier,
    labelled: LabelledImages,
    config: Config = Config(),
    run: Run | None = None,
) -> nn.Module:
    """Train the student in place. Its stages must give maps or tokens; the teacher may be anything with its classes."""
    run = begin(run)
    example = run.check(Classifier, labelled, labels=True, teacher=teacher, student=student)["image"]
    assert isinstance(student, nn.Module)
    classes = feature_width(student, example)
    stages, exits = exits_of(teacher, student, example, classes, config)
    exits.to(run.device)
    *stage_eps, eps = config.eps if len(config.eps) > 1 else config.eps * (len(exits) + 1)
    optimizer = optimizer_for([*student.parameters(), *exits.parameters()], config.optimizer, config.lr,
                              config.weight_decay)
    student.train()
    with frozen(teacher), taps(student, stages) as features:
        for batch in run.loop("ofa", labelled, batch=config.batch, steps=config.steps, student=student, exits=exits,
                              optimizer=optimizer, drop_last=len(labelled) >= config.batch):
            set_lr(optimizer, config.lr * warmup_cosine(run.progress, config.warmup))
            x = random_view(batch["image"], run, config.view) if config.view else batch["image"]
            x, soft = mixed(x, batch["label"], classes, run, config.mixup, config.cutmix, config.smoothing)
            with torch.no_grad():
                z_t = teacher(x)
            z_s = student(x)
            ofa = partial(enhanced_cross_entropy, z_t, label=soft.argmax(1), temperature=config.temperature)
            terms = {"ce": config.gt * F.cross_entropy(z_s, soft), "logits": config.kd * ofa(z_s, eps=eps)}
            if stages:
                each = [ofa(branch(features[stage]), eps=e)
                        for stage, branch, e in zip(stages, exits, stage_eps, strict=True)]
                terms["exits"] = config.ofa * torch.stack(each).sum()
            run.update(optimizer, clip=config.clip, **terms)
    return student


def exits_of(teacher: Any, student: nn.Module, image: Tensor, classes: int, config: Config
             ) -> tuple[list[str], nn.ModuleList]:
    """Module paths of the student's stages, and an exit branch for each; none where `ofa` is 0.

    Raises RoleError where no stage is found, ConfigError where eps does not fit their number.
    """
    stages, branches = {}, nn.ModuleList()
    if config.ofa:
        stages = stages_of(student, image, config.student_taps)
        require(bool(stages), f"no stages were found in the student ({type(student).__name__}); name them with "
                "student_taps (`still taps MODEL` lists what can be read), or set ofa to 0", RoleError)
        of_teacher = list(stages_of(teacher, image).values()) if isinstance(teacher, nn.Module) else []
        width = stage_width(of_teacher[-1]) if of_teacher else 0
        branches = exit_branches(stages, classes, width, config.grid)
    require(len(config.eps) in (1, len(branches) + 1), f"eps is one exponent, or one for each of {len(branches)} exit "
            f"branches and one for the logits; got {len(config.eps)}")
    return list(stages), branches


def tiny() -> dict[str, Any]:
    torch.manual_seed(0)
    teacher = SmallViT(classes=4, image_size=8, width=8, depth=1, heads=2)
    student = nn.Sequential(nn.Conv2d(1, 3, 3, padding=1), nn.Conv2d(3, 4, 3, 2, 1), nn.ReLU(), nn.Flatten(),
                            nn.Linear(64, 4))
    data = TensorSet(image=torch.rand(12, 1, 8, 8), label=torch.arange(12) % 4)
    return {"teacher": teacher, "student": student, "labelled": data,
            "config": Config(steps=4, batch=6, lr=0.1, eps=(1.5, 1.2, 1.0), view=1.0, mixup=0.8, cutmix=1.0, clip=1.0)}


# -------------------------------------------------------------------- the embedded experiment


def ground() -> dict[str, Any]:
    """100 labelled digits of 16 pixels and 597 to test; a transformer, a ResNet and a mixer as teachers, trained on
    1,000 other digits."""
    return {"labelled": digits(16, "train").select(range(100)), "test": digits(16, "test"),
            "vit": digits_classifier("vit", 16, 200, 1200, steps=1200, width=48),
            "resnet": digits_classifier("resnet", 16, 200, 1200), "mixer": digits_classifier("mixer", 16, 200, 1200)}


NEW: dict[str, Callable[[], nn.Module]] = {
    "conv": lambda: ConvNet(1, 10, width=8, depth=4, image_size=16, norm="batch"),
    "mixer": lambda: SmallMixer(width=24, depth=4, hidden=48),
}
"""The students: four convolutional stages, and four blocks of a mixer."""


def experiment(run: Run) -> dict[str, dict[str, float]]:
    """All arms of one student with the same steps, batch and learning rate; accuracy on the 597 test pictures."""
    g = ground()
    labelled, test = g["labelled"], g["test"]
    teachers = {name: g[name].to(run.device) for name in ("vit", "resnet", "mixer")}
    other, same = {"conv": "vit", "mixer": "resnet"}, {"conv": "resnet", "mixer": "mixer"}
    configs = {"conv": EMBEDDED, "mixer": dataclasses.replace(EMBEDDED, **OF_MIXER)}

    def new(kind: str) -> nn.Module:
        run.begin()
        return NEW[kind]().to(run.device)

    def right(student: nn.Module) -> dict[str, float]:
        return {"accuracy": accuracy(student, test, device=run.device)}

    def view(kind: str) -> Callable[[Tensor], Tensor] | None:
        strength = configs[kind].view
        return (lambda x: random_view(x, run, strength)) if strength else None

    def shared(kind: str) -> dict[str, Any]:
        return {name: getattr(configs[kind], name)
                for name in ("steps", "batch", "optimizer", "lr", "warmup", "weight_decay")}

    def labels(kind: str = "conv") -> dict[str, float]:
        student = supervised.train(new(kind), labelled, supervised.Config(**shared(kind)), run, view(kind))
        alike = {"same": similar(run, teachers[same[kind]], student, test),
                 "other": similar(run, teachers[other[kind]], student, test)}
        for name, (values, rows, columns) in alike.items():
            run.picture(f"linear CKA, {name} family", heat_map(values, rows, columns, "teacher", "student"))
        return {**right(student), **{f"cka {name} family": middle(values) for name, (values, *_) in alike.items()}}

    def ofa(kind: str = "conv", teacher: str = "", **changes: Any) -> dict[str, float]:
        config = dataclasses.replace(configs[kind], **changes)
        return right(distill(teachers[teacher or other[kind]], new(kind), labelled, config, run))

    def hinton(kind: str = "conv", teacher: str = "") -> dict[str, float]:
        config = kd.Config(**shared(kind), temperature=OF_KD[kind], alpha=0.5)
        return right(kd.distill(teachers[teacher or other[kind]], new(kind), labelled, config, run, view(kind)))

    def known(what: Any, weight: float, kind: str = "conv") -> dict[str, float]:
        config = knowledge.Config(**shared(kind), kind=what, weight=weight)
        return right(knowledge.distill(teachers[other[kind]], new(kind), labelled, config, run, view(kind)))

    def contrast() -> dict[str, float]:
        config = crd.Config(**shared("conv"), negatives=128)
        return right(crd.distill(teachers["vit"], new("conv"), labelled, config, run))

    return run.arms(
        {"labels": labels, "kd": hinton, "hint": lambda: known("hint", 0.1), "ofa": ofa,
         "mixer, labels": lambda: labels("mixer"), "mixer, kd": lambda: hinton("mixer"),
         "mixer, ofa": lambda: ofa("mixer")},
        extended={
            "eps 1.2": lambda: ofa(eps=(1.2,)), "no exits": lambda: ofa(ofa=0.0),
            "rkd": lambda: known("rkd", 1.0), "cka": lambda: known("cka", 1.0), "crd": contrast,
            "dkd": lambda: known("dkd", 1.0), "dist": lambda: known("dist", 1.0),
            "mixer, hint": lambda: known("hint", 1.0, "mixer"),
            "same family, kd": lambda: hinton(teacher="resnet"), "same family, ofa": lambda: ofa(teacher="resnet")})


OF_MIXER: dict[str, Any] = {"lr": 6e-3, "view": 1.0, "temperature": 2.0}
"""What the arms of the mixer change: it needs random views to learn from so few pictures."""

OF_KD = {"conv": 2.0, "mixer": 8.0}
"""T of Hinton's KD, the best of 1, 2, 4 and 8 for each student, as 0.5 is of the weights 0.5, 0.9 and 1."""


def similar(run: Run, teacher: nn.Module, student: nn.Module, data: Any) -> tuple[Tensor, list[str], list[str]]:
    """Linear CKA between the stages of two models on held-out pictures, with the stages' names."""
    image = data.image[:2].to(run.device)
    rows, columns = (list(stages_of(model, image)) for model in (teacher, student))
    return layer_similarity(teacher, student, data, rows, columns, device=run.device), rows, columns


def middle(values: Tensor) -> float:
    """The mean over the middle stages of both models: all but the first and the last, or all of fewer than three."""
    kept = [slice(1, -1) if n > 2 else slice(None) for n in values.shape]
    return float(values[kept[0], kept[1]].mean())
