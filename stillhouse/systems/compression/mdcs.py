"""MDCS: a long-tailed set is learned by experts with a class focus each, and each expert is distilled into itself.

E experts share a trunk and have a last stage and a cosine classifier of their own. With the class counts n_c, expert e
is trained on logits shifted by its own power of the counts,

    z~_e = z_e + lambda_e log n_c,    L_DL = sum_e CE(z~_e, y)  over a weak and a strong view of every picture,

so that its raw logits z_e favour frequent classes (lambda_e < 0), none (1, balanced softmax) or rare ones (> 1). The
weak view, as a constant, teaches the strong view of the same expert where it is right (confident instance sampling):

    L_CS = sum_e mean_{i: argmax z~_e(weak_i) = y_i} KL(softmax(z~_e(weak_i)) || softmax(z~_e(strong_i)))
    L = L_DL + kappa min(p / r, 1) L_CS,    p the part of the training that is done.

The answer is the mean of the raw logits z_e.

Zhao et al. 2023. Deviations: the experts are full copies of the last stage, not narrower ones, so that any classifier
can be branched; RandAugment in place of AutoAugment; kappa's ramp grows by steps instead of epochs; the counts enter as
lambda log n, without the 1e-9 that the released code adds to n^lambda.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stillhouse.data.augment import RAND_AUGMENT, RAND_AUGMENT_GREY
from stillhouse.data.sets import TensorSet
from stillhouse.data.shapes import shapes
from stillhouse.data.variants import class_counts, long_tailed
from stillhouse.errors import DataError, require
from stillhouse.evaluate.claims import Claim
from stillhouse.evaluate.long_tail import bias_variance, disagreement, shot_accuracy
from stillhouse.measures.classes import logit_adjusted, self_consistency
from stillhouse.models.convnets import SmallResNet
from stillhouse.parts.experts import Experts, branched
from stillhouse.parts.heads import feature_width
from stillhouse.protocols import Classifier, LabelledImages
from stillhouse.recipes.supervised import check_training, optimizer_for
from stillhouse.recipes.views import random_view, strong_view
from stillhouse.run import Run, begin, set_lr
from stillhouse.run.schedules import piecewise, warmup

NUMBER = 158

CLAIMS = [
    Claim("MDCS beats one network trained by cross-entropy", lambda a: a["mdcs"]["accuracy"] - a["ce"]["accuracy"]),
    Claim("MDCS beats three experts trained by cross-entropy",
          lambda a: a["mdcs"]["accuracy"] - a["experts, ce"]["accuracy"]),
    Claim("on classes with few pictures it beats one network by three points",
          lambda a: a["mdcs"]["few"] - a["ce"]["few"] - 0.03),
    Claim("experts with different exponents disagree more than equal ones",
          lambda a: a["diversity only"]["disagreement"] - a["experts, ce"]["disagreement"]),
    Claim("consistency costs at most 0.3 points",
          lambda a: a["mdcs"]["accuracy"] - a["diversity only"]["accuracy"] + 0.003),
    Claim("the head expert is at least as good as the tail expert on classes with many pictures",
          lambda a: a["mdcs"]["head expert, many"] - a["mdcs"]["tail expert, many"]),
    Claim("the tail expert is at least as good as the head expert on classes with few",
          lambda a: a["mdcs"]["tail expert, few"] - a["mdcs"]["head expert, few"]),
    Claim("MDCS beats one network with balanced softmax",
          lambda a: a["mdcs"]["accuracy"] - a["balanced softmax"]["accuracy"], report=True),
    Claim("consistency needs diverse experts: MDCS beats consistency alone",
          lambda a: a["mdcs"]["accuracy"] - a["consistency only"]["accuracy"], report=True),
    Claim("confident instance sampling helps",
          lambda a: a["mdcs"]["accuracy"] - a["all instances"]["accuracy"], report=True),
    Claim("consistency makes the answer depend less on the view",
          lambda a: a["diversity only"]["changed by view"] - a["mdcs"]["changed by view"], report=True),
    Claim("and lowers the variance over experts",
          lambda a: a["diversity only"]["variance"] - a["mdcs"]["variance"], report=True),
    Claim("in so short a training half of the published weight of the consistency serves better than all of it",
          lambda a: a["mdcs"]["accuracy"] - a["kappa 0.6"]["accuracy"], report=True),
]


@dataclass(frozen=True)
class Config:
    steps: int = 68_000  # optimiser steps: 400 epochs of CIFAR-100-LT (10,847 pictures) at this batch
    batch: int = 64  # pictures a step, each in two views
    exponents: tuple[float, ...] = (-0.5, 1.0, 2.5)  # lambda_e, one for each expert, from head to tail
    consistency: float = 0.6  # kappa, weight of L_CS; 0: without it
    ramp: float = 0.05  # r, part of the steps in which kappa grows from 0: 20 epochs
    sampling: Literal["confident", "all"] = "confident"  # weak views that teach: those that are right, or all
    split: str = ""  # path of the last shared module; empty: all but the last stage is shared
    scale: float = 30.0  # s of the cosine classifiers; 0: the linear head that the student has
    fresh: bool = True  # whether all experts but the first draw new weights; False: all start as the student is
    optimizer: Literal["sgd", "adamw"] = "sgd"  # SGD with Nesterov momentum 0.9, or AdamW
    lr: float = 0.1  # peak learning rate
    warmup: float = 0.05  # part of the steps in which it rises
    drops: tuple[float, ...] = (0.5, 0.8, 0.95)  # parts of the steps after each of which it is a tenth
    weight_decay: float = 5e-4  # lambda
    weak: float = 1.0  # strength of the weak view's random shifts, turns and light changes
    strong: float = 1.0  # strength of the strong view's RandAugment
    operations: int = 2  # operations of RandAugment a picture
    erase: float = 0.5  # side of the square erased from the strong view, as a part of the picture's
    flip: bool = True  # whether views are mirrored at random

    def __post_init__(self) -> None:
        check_training(self.steps, self.batch, self.lr, self.warmup, self.weight_decay)
        require(len(self.exponents) >= 1, "exponents needs one number for each expert; got none")
        require(self.consistency >= 0 and 0 <= self.ramp <= 1, "consistency must not be negative and ramp must be a "
                f"part of the steps; got {self.consistency} and {self.ramp}")
        require(self.sampling in ("confident", "all"), f"sampling is 'confident' or 'all', not {self.sampling!r}")
        require(self.scale >= 0, f"scale must be 0 or more, not {self.scale}")
        require(self.optimizer in ("sgd", "adamw"), f"optimizer is 'sgd' or 'adamw', not {self.optimizer!r}")
        require(all(0 < drop < 1 for drop in self.drops), f"drops are parts of the steps, not {self.drops}")
        require(min(self.weak, self.strong, self.erase, self.operations) >= 0 and self.erase <= 1, "weak, strong, erase"
                " and operations must not be negative, erase at most 1")


EMBEDDED = Config(steps=260, batch=64, consistency=0.3, ramp=0.8, scale=16.0, optimizer="adamw", lr=0.005,
                  drops=(0.6, 0.85), strong=0.3, erase=0.25)


def distill(
    student: Classifier,
    labelled: LabelledImages,
    config: Config = Config(),
    run: Run | None = None,
) -> Experts:
    """Experts grown from the student: it is their trunk and the first of them, trained in place."""
    run = begin(run)
    example = run.check(Classifier, labelled, labels=True, student=student)["image"]
    assert isinstance(student, nn.Module)
    experts = branched(student, example, len(config.exponents), config.split, config.scale, config.fresh)
    counts = counted(labelled, student, example)
    optimizer: Any = optimizer_for(experts.parameters(), config.optimizer, config.lr, config.weight_decay)
    if config.optimizer == "sgd":
        optimizer.param_groups[0]["nesterov"] = True
    experts.train()
    for batch in run.loop("mdcs", labelled, batch=config.batch, steps=config.steps, student=experts,
                          optimizer=optimizer, drop_last=len(labelled) >= config.batch):
        p, label, n = run.progress, batch["label"], len(batch["label"])
        set_lr(optimizer, config.lr * warmup(p, config.warmup) * piecewise(p, [(d, 0.1) for d in config.drops]))
        z = adjusted(experts.logits(torch.cat(two_views(batch["image"], config, run))), counts, config.exponents)
        terms: dict[str, Any] = {"diversity": diversity(z, label.repeat(2))}
        if config.consistency:
            kl, right = self_consistency(z[:, :n], z[:, n:], label)
            taught = right if config.sampling == "confident" else torch.ones_like(right)
            each = run.mean(torch.where(taught, kl, 0.0).sum(1), taught.sum(1))
            terms["consistency"] = consistency_weight(p, config) * each.sum()
        run.update(optimizer, **terms)
    return experts


def adjusted(logits: Tensor, counts: Tensor, exponents: tuple[float, ...]) -> Tensor:
    """z~ of every expert, from logits [experts, n, classes]."""
    return torch.stack([logit_adjusted(z, counts, power) for z, power in zip(logits, exponents, strict=True)])


def diversity(z: Tensor, label: Tensor) -> Tensor:
    """L_DL of shifted logits [experts, n, classes]."""
    return torch.stack([F.cross_entropy(logits, label) for logits in z]).sum()


def consistency_weight(progress: float, config: Config) -> float:
    """kappa min(p / r, 1)."""
    return config.consistency * warmup(progress, config.ramp)


def two_views(image: Tensor, config: Config, run: Run) -> tuple[Tensor, Tensor]:
    """A weak and a strong view; grey pictures go through the operations that need no colour."""
    operations = RAND_AUGMENT_GREY if image.shape[1] == 1 else RAND_AUGMENT
    return (random_view(image, run, config.weak, flip=config.flip),
            strong_view(image, run, config.strong, operations, config.operations, config.erase, flip=config.flip))


def counted(labelled: LabelledImages, student: Any, example: Tensor) -> Tensor:
    """n_c for every class of the student. Raises DataError where one has no picture."""
    counts = class_counts(labelled, feature_width(student, example))
    empty = (counts == 0).nonzero().flatten().tolist()
    require(not empty, f"classes {empty[:5]} of the student have no picture in 'labelled', so they have no prior; give "
            "some, or a student with fewer classes", DataError)
    return counts.to(example.device)


def tiny() -> dict[str, Any]:
    torch.manual_seed(0)
    student = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Conv2d(2, 3, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
                            nn.Flatten(), nn.Linear(3, 4))
    labelled = TensorSet(image=torch.rand(14, 1, 8, 8), label=torch.tensor([0] * 7 + [1] * 4 + [2] * 2 + [3]))
    return {"student": student, "labelled": labelled, "config": Config(steps=5, batch=4, exponents=(-0.5, 2.0),
                                                                       ramp=0.4)}


# -------------------------------------------------------------------- the embedded experiment

SHAPES, COLOURS = ("circle", "ring", "square", "cross", "star"), ("blue", "violet")


def drawn(n: int, seed: int) -> TensorSet:
    """Pictures of ten classes, as many of each: five shapes, two of them much alike, in blue (0 to 4) and in violet."""
    data = shapes(n, seed, 16, SHAPES, COLOURS, "texture", noise=0.1)
    return data.with_fields(label=data.colour * len(SHAPES) + data.shape)


def experiment(run: Run) -> dict[str, dict[str, float]]:
    """All arms with the same data (300 pictures of the first class to 6 of the last), views, steps and batch; rates on
    1,000 test pictures, 100 of each class."""
    labelled: Any = long_tailed(drawn(3000, 1000 + run.seed), 300, 50, run.seed)
    test, counts = drawn(1000, 1), class_counts(labelled)

    def arm(**changes: Any) -> Callable[[], dict[str, float]]:
        def trained() -> dict[str, float]:
            config = dataclasses.replace(EMBEDDED, **changes)
            run.begin()
            student = SmallResNet(channels_in=3, width=8).to(run.device)
            experts = distill(student, labelled, config, run)
            return measured(experts, test, counts, run)

        return trained

    single = {"consistency": 0.0}
    return run.arms(
        {"ce": arm(exponents=(0.0,), **single),
         "experts, ce": arm(exponents=(0.0, 0.0, 0.0), **single),
         "diversity only": arm(consistency=0.0),
         "mdcs": arm()},
        extended={"balanced softmax": arm(exponents=(1.0,), **single),
                  "consistency only": arm(exponents=(1.0, 1.0, 1.0)),
                  "all instances": arm(sampling="all"),
                  "kappa 0.6": arm(consistency=0.6)})


def measured(experts: Experts, test: TensorSet, counts: Tensor, run: Run) -> dict[str, float]:
    """Accuracy in all and on classes with more than 100, 20 to 100 and fewer than 20 pictures; of several experts also
    how they differ, what the first (head) and the last (tail) can do, and how many answers a strong view changes."""
    with run.aside("test", experts):
        image = test.image.to(run.device)
        each = experts.logits(image).cpu()
        other = experts(two_views(image, EMBEDDED, run)[1]).cpu()
    mean = each.mean(0)
    result = {"accuracy": (mean.argmax(-1) == test.label).double().mean().item(),
              **shot_accuracy(mean, test.label, counts),
              "changed by view": (mean.argmax(-1) != other.argmax(-1)).double().mean().item()}
    if len(each) > 1:
        bias, variance = bias_variance(each, test.label)
        result |= {"disagreement": disagreement(each), "bias": bias, "variance": variance}
        for name, e in (("head", 0), ("tail", -1)):
            shots = shot_accuracy(each[e], test.label, counts)
            result |= {f"{name} expert, {shot}": shots[shot] for shot in ("many", "few")}
        run.picture("weak and strong views", torch.cat(two_views(image[:16], EMBEDDED, run)), columns=16)
    return result
