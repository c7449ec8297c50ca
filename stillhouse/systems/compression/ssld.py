"""SSLD: an off-the-shelf classifier is copied into a small backbone through its class probabilities alone.

Student and frozen teacher see the same view x; with p = softmax(z_t), q = softmax(z_s), m = (p + q) / 2 the loss is

    L = 1/2 KL(p || m) + 1/2 KL(q || m),

averaged over the batch: no label, no temperature. Since no label enters, an unlabelled pool joins the training
pictures: near-duplicates of the validation set are removed, the teacher scores what is left, and each class keeps its
`per_class` best. A last stage trains on the original pictures alone, with a small learning rate.

Cui et al. 2021, "Beyond Self-Supervision". Deviation: near-duplicates are found by normalised correlation under small
shifts in place of SIFT matching (`stillhouse.data.mining.near_duplicates`, whose descriptor can be replaced).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from stillhouse.data.digits import corrupted_digits, digits
from stillhouse.data.mining import near_duplicates, pictures, score_pool, top_k_per_class
from stillhouse.data.sets import TensorSet, concatenate
from stillhouse.errors import require
from stillhouse.evaluate.claims import Claim
from stillhouse.evaluate.classification import accuracy
from stillhouse.evaluate.cost import latency, macs, parameters
from stillhouse.measures.divergences import js, kl, soft_cross_entropy
from stillhouse.models.convnets import TinyConvNet
from stillhouse.parts.heads import replace_head
from stillhouse.protocols import Classifier, Images
from stillhouse.recipes import kd, supervised
from stillhouse.recipes.supervised import check_training, optimizer_for
from stillhouse.recipes.views import random_view
from stillhouse.run import Run, begin, frozen, set_lr
from stillhouse.run.check import first_batch
from stillhouse.run.schedules import warmup_cosine
from stillhouse.zoo.classifiers import digits_teacher

NUMBER = 41

CLAIMS = [
    Claim("distilled with the mined pool beats training on the 200 labels",
          lambda a: a["pool"]["accuracy"] - a["labels"]["accuracy"]),
    Claim("the mined pool beats the 200 pictures alone",
          lambda a: a["pool"]["accuracy"] - a["no pool"]["accuracy"]),
    Claim("the last stage on the original pictures costs at most half a point",
          lambda a: a["two stages"]["accuracy"] - a["pool"]["accuracy"] + 0.005),
    Claim("mining beats the pool as it is",
          lambda a: a["pool"]["accuracy"] - a["unmined"]["accuracy"], report=True),
    Claim("without labels it beats Hinton's KD on the 200 labelled pictures",
          lambda a: a["pool"]["accuracy"] - a["kd"]["accuracy"], report=True),
]

LOSSES = {"js": js, "kl": kl, "ce": soft_cross_entropy}


@dataclass(frozen=True)
class Config:
    steps: int = 450_000  # optimiser steps of both stages: 360 epochs of 1.28 million pictures at this batch
    batch: int = 1024  # pictures a step
    loss: Literal["js", "ce", "kl"] = "js"  # L between the probabilities of teacher and student
    per_class: int | None = 4000  # k pictures of the pool per class by the teacher's score; None: no mining, all join
    duplicate: float = 0.95  # correlation with a validation picture from which a pool picture is left out
    last_stage: float = 1 / 13  # part of the steps on the original pictures alone: 30 epochs after 360; 0: none
    last_lr: float = 0.01  # learning rate of the last stage, as a part of lr
    optimizer: Literal["sgd", "adamw"] = "sgd"  # SGD with momentum 0.9, or AdamW
    lr: float = 0.4  # peak learning rate; a cosine to 0 in each stage
    warmup: float = 5 / 360  # part of a stage in which the learning rate rises
    weight_decay: float = 1e-5  # lambda
    view: float = 0.0  # strength of the random shifts, turns and light changes; 0: the view that the data set gives
    teacher_mean: tuple[float, ...] = ()  # per channel, taken off the shared view for the teacher
    teacher_std: tuple[float, ...] = ()  # per channel, divides it
    student_mean: tuple[float, ...] = ()  # per channel, taken off the shared view for the student
    student_std: tuple[float, ...] = ()  # per channel, divides it

    def __post_init__(self) -> None:
        check_training(self.steps, self.batch, self.lr, self.warmup, self.weight_decay)
        require(self.loss in LOSSES, f"loss is one of {', '.join(LOSSES)}, not {self.loss!r}")
        require(self.per_class is None or self.per_class >= 1, f"per_class must be 1 or more, not {self.per_class}")
        require(self.duplicate > 0, f"duplicate is a correlation above 0, not {self.duplicate}")
        require(0 <= self.last_stage <= 1, f"last_stage is a fraction of the steps, not {self.last_stage}")
        require(self.last_lr > 0 and self.view >= 0, "last_lr must be above 0 and view not negative")
        for who in ("teacher", "student"):
            mean, std = getattr(self, f"{who}_mean"), getattr(self, f"{who}_std")
            require(len(mean) == len(std) and all(s > 0 for s in std),
                    f"{who}_mean and {who}_std need one number a channel each, std above 0; got {mean} and {std}")


EMBEDDED = Config(steps=500, batch=64, per_class=105, duplicate=0.99, last_lr=0.02, optimizer="adamw", lr=0.02,
                  warmup=0.05, weight_decay=1e-4, view=1.0)


def distill(
    teacher: Classifier,
    student: Classifier,
    data: Images,
    unlabelled: Images | None = None,
    validation: Images | None = None,
    config: Config = Config(),
    run: Run | None = None,
) -> nn.Module:
    """Train the student in place on the teacher's probabilities; labels are never read.

    `unlabelled` is the pool that is mined; what repeats a picture of `validation` is left out of it.
    """
    run = begin(run)
    for given in (data, unlabelled):
        if given is not None:
            run.check(Classifier, given, teacher=teacher, student=student)
    if validation is not None:
        first_batch(validation, ("image",))
    assert isinstance(student, nn.Module)
    student.train()
    with frozen(teacher):
        mixed = data
        if unlabelled is not None:
            mined = run.once("mine", lambda: {"chosen": mine(teacher, unlabelled, validation, config, run)})
            mixed = pictures((data, None), (unlabelled, mined["chosen"].cpu()))
        last = round(config.last_stage * config.steps)
        stages = [("mixed", mixed, config.steps - last, config.lr), ("last", data, last, config.lr * config.last_lr)]
        for name, stage_data, steps, lr in stages:
            optimizer = optimizer_for(student.parameters(), config.optimizer, lr, config.weight_decay)
            for batch in run.loop(name, stage_data, batch=config.batch, steps=steps, student=student,
                                  drop_last=len(stage_data) >= config.batch, optimizer=optimizer):
                set_lr(optimizer, lr * warmup_cosine(run.progress, config.warmup))
                x = random_view(batch["image"], run, config.view) if config.view else batch["image"]
                with torch.no_grad():
                    target = teacher(normalised(x, config.teacher_mean, config.teacher_std))
                logits = student(normalised(x, config.student_mean, config.student_std))
                run.update(optimizer, distance=LOSSES[config.loss](target, logits))
    return student


def mine(teacher: Classifier, pool: Images, validation: Images | None, config: Config, run: Run) -> Tensor:
    """Positions in the pool of the pictures to learn from, in ascending order."""
    if config.per_class is None:
        return torch.arange(len(pool))

    def scorer(x: Tensor) -> Tensor:
        return teacher(normalised(x, config.teacher_mean, config.teacher_std))

    labels, scores = score_pool(scorer, pool, device=run.device)
    repeated = torch.zeros(len(pool), dtype=torch.bool)
    if validation is not None:
        repeated = near_duplicates(pool, validation, config.duplicate)
    chosen = top_k_per_class(labels, scores, config.per_class, ~repeated)
    run.say(f"mined {len(chosen)} of {len(pool)} pictures; {int(repeated.sum())} repeat a validation picture")
    return chosen


def normalised(x: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """(x - mean) / std per channel; x itself where none is given."""
    if not mean:
        return x
    return (x - x.new_tensor(mean)[:, None, None]) / x.new_tensor(std)[:, None, None]


def tiny() -> dict[str, Any]:
    torch.manual_seed(0)
    teacher, student = (nn.Sequential(nn.Conv2d(1, width, 3), nn.ReLU(), nn.Flatten(), nn.Linear(width * 36, 4))
                        for width in (4, 2))
    image = torch.rand(40, 1, 8, 8)
    return {"teacher": teacher, "student": student, "data": TensorSet(image=image[:12]),
            "unlabelled": TensorSet(image=image[4:34]), "validation": TensorSet(image=image[30:]),
            "config": Config(steps=6, batch=4, per_class=4, last_stage=0.5, last_lr=0.5, lr=0.1, view=1.0)}


# -------------------------------------------------------------------- the embedded experiment


def ground() -> dict[str, Any]:
    """Digits of 16 pixels: 200 labelled, a pool of 1,000 unlabelled ones and 250 pictures that are no digit, 597 to
    test; a ResNet as teacher."""
    pool = concatenate(digits(16, "unlabelled").without("label"), corrupted_digits(250, 16).without("kind"))
    return {"labelled": digits(16, "labelled"), "pool": pool, "test": digits(16, "test"), "teacher": digits_teacher(16)}


def experiment(run: Run) -> dict[str, dict[str, float]]:
    """All arms with the same student, steps, batch and views; accuracy on the 597 test pictures."""
    g = ground()
    labelled, test = g["labelled"], g["test"]
    plain = supervised.Config(**_training(EMBEDDED))
    hinton = kd.Config(**_training(EMBEDDED))

    def measured(student: nn.Module) -> dict[str, float]:
        return {"accuracy": accuracy(student, test, device=run.device)}

    def new() -> nn.Module:
        run.begin()
        return TinyConvNet().to(run.device)

    def ssld(pool: Any = g["pool"], teacher: Callable[[], nn.Module] = lambda: g["teacher"], last_stage: float = 0.0,
             **changes: Any) -> Callable[[], dict[str, float]]:
        config = dataclasses.replace(EMBEDDED, last_stage=last_stage, **changes)
        data = labelled.without("label")
        return lambda: measured(distill(teacher().to(run.device), new(), data, pool, test, config, run))

    def view(x: Tensor) -> Tensor:
        return random_view(x, run, EMBEDDED.view)

    half = g["pool"].select(range(0, len(g["pool"]), 2))
    return run.arms(
        {"labels": lambda: measured(supervised.train(new(), labelled, plain, run, view)),
         "kd": lambda: measured(kd.distill(g["teacher"].to(run.device), new(), labelled, hinton, run, view)),
         "no pool": ssld(pool=None),
         "pool": ssld(),
         "two stages": ssld(last_stage=EMBEDDED.last_stage),
         "unmined": ssld(per_class=None)},
        extended={"kl": ssld(loss="kl"),
                  "ce": ssld(loss="ce"),
                  "half of the pool": ssld(pool=half, per_class=52),
                  "half of the steps": ssld(steps=EMBEDDED.steps // 2),
                  "worse teacher": ssld(teacher=lambda: digits_teacher(16, steps=150, noise=0.4)),
                  "as a backbone": lambda: downstream(run, g)})


def _training(config: Config) -> dict[str, Any]:
    return {name: getattr(config, name) for name in ("steps", "batch", "optimizer", "lr", "warmup", "weight_decay")}


def downstream(run: Run, g: dict[str, Any]) -> dict[str, float]:
    """The student as backbone of another task: digits somewhere in clutter, learned from 100 pictures.

    Three backbones (fresh, trained on the 200 labels, distilled), each fine-tuned and linearly evaluated alike.
    """
    backbones: dict[str, nn.Module] = {}
    for name in ("fresh", "labels", "distilled"):
        with run.scope(f"backbone {name}"):
            run.begin()
            backbones[name] = student = TinyConvNet().to(run.device)
            if name == "labels":
                supervised.train(student, g["labelled"], supervised.Config(**_training(EMBEDDED)), run,
                                 lambda x: random_view(x, run, EMBEDDED.view))
            if name == "distilled":
                distill(g["teacher"].to(run.device), student, g["labelled"].without("label"), g["pool"], g["test"],
                        EMBEDDED, run)
    train: Any = cluttered(g["labelled"].select(range(100)), seed=0)
    test = cluttered(g["test"], seed=1)
    config = supervised.Config(steps=150, batch=50, optimizer="adamw", lr=0.01)
    result = {}
    for name, backbone in backbones.items():
        for way, rate in (("linear", 0.0), ("fine-tuned", 0.3)):
            with run.scope(f"{way} {name}"):
                run.begin()
                network, head = replace_head(backbone, classes=10)
                supervised.fine_tune(network, train, head, config, run, backbone_lr=rate)
                result[f"{name}, {way}"] = accuracy(network, test, device=run.device)
    return result


def cluttered(data: TensorSet, seed: int) -> TensorSet:
    """Each digit somewhere on a canvas of 24 pixels, with four pieces of 5 pixels cut out of others around it."""
    generator = torch.Generator().manual_seed(seed)
    n = len(data)

    def place(high: int) -> list[list[int]]:
        return torch.randint(high, (n, 2), generator=generator).tolist()

    canvas = torch.full((n, 1, 24, 24), -1.0)
    for _ in range(4):
        others = torch.randint(n, (n,), generator=generator).tolist()
        for i, (other, (y, x), (v, u)) in enumerate(zip(others, place(20), place(12), strict=True)):
            canvas[i, :, y : y + 5, x : x + 5] = data.image[other][:, v : v + 5, u : u + 5][..., : 24 - y, : 24 - x]
    for i, (y, x) in enumerate(place(9)):
        window = canvas[i, :, y : y + 16, x : x + 16]
        torch.maximum(window, data.image[i], out=window)
    return TensorSet(image=canvas, label=data.label)


def main_job(run: Run) -> dict[str, dict[str, float]]:
    """A big model and unlabelled pictures in, a small model out: the teacher, the small network trained on 50 labels,
    and the same network distilled on 1,000 digits without any label; what they cost and how right they are."""
    g = ground()
    pool: Any = digits(16, "unlabelled").without("label")
    test = g["test"]
    few = g["labelled"].select(range(50))

    def measured(model: nn.Module) -> dict[str, float]:
        example = test.image[:1].to(run.device)
        return {"accuracy": accuracy(model, test, device=run.device), "parameters": parameters(model),
                "macs": macs(model, example), "latency_ms": 1000 * latency(model, example)}

    def small() -> nn.Module:
        run.begin()
        return TinyConvNet().to(run.device)

    config = dataclasses.replace(EMBEDDED, last_stage=0.0)
    return run.arms({
        "teacher": lambda: measured(g["teacher"]),
        "small, 50 labels": lambda: measured(supervised.train(
            small(), few, supervised.Config(**_training(config)), run, lambda x: random_view(x, run, config.view))),
        "small, distilled": lambda: measured(distill(g["teacher"], small(), pool, config=config, run=run)),
    })
