"""Trainee-Mentor: a deep network without residual connections is trained with the help of any teacher.

The student is a residual network whose shortcuts are taken away, with nothing else changed: every block
y = relu(F(x) + shortcut(x)) becomes y = relu(F(x)); a block that changes the resolution does so by the stride of F.
It learns from labels and from a teacher of the same task (Hinton's loss),

    L = alpha tau^2 KL(softmax(z_t / tau) || softmax(z_s / tau)) + (1 - alpha) CE(y, z_s).

The teacher may be the residual twin, a deeper one, a plain one, or one that is worse than the student (a mentor): what
counts is how hard the student is to train, not how much better its teacher is. The trained plain network is returned;
it keeps no block's input until the block's end. Diagnostics are in `stillhouse.evaluate.landscape`: the roughness of
the loss along filter-normalised directions, |F(x)| / |shortcut(x)| of each block, CKA of neighbouring blocks.

Jha, Saini and Mittal 2020, "On the Demystification of Knowledge Distillation: A Residual Network Perspective". The
paper's hyperparameters could not be confirmed; alpha, tau and the schedule are the customary ones.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from statistics import mean
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stillhouse.data.digits import digits
from stillhouse.data.sets import TensorSet
from stillhouse.errors import require
from stillhouse.evaluate.claims import Claim
from stillhouse.evaluate.classification import accuracy
from stillhouse.evaluate.cost import parameters
from stillhouse.evaluate.landscape import (
    block_alignment,
    feature_reuse,
    gradient_flow,
    loss_plane,
    plane_figure,
    roughness,
)
from stillhouse.measures.divergences import kl
from stillhouse.models.convnets import SmallResNet
from stillhouse.parts.shortcuts import Block, PlainNetwork, remove_shortcuts, residual_blocks
from stillhouse.protocols import Classifier, LabelledImages
from stillhouse.recipes.supervised import check_training, optimizer_for
from stillhouse.run import Run, begin, frozen, set_lr
from stillhouse.run.schedules import warmup_cosine
from stillhouse.zoo.classifiers import digits_classifier

NUMBER = 148

Arm = Callable[[], dict[str, float]]

SHALLOW, MIDDLE, DEEP = 8, 14, 26
"""Depths: a stem, three stages of n blocks of two convolutions, a linear layer; 6 n + 2 layers."""


def _gain(a: Any, arm: str, of: str, *depths: int) -> float:
    """Mean over depths of the accuracy of one arm less that of another."""
    return sum(a[f"{d}, {arm}"]["accuracy"] - a[f"{d}, {of}"]["accuracy"] for d in depths) / len(depths)


CLAIMS = [
    Claim("8 layers: distilled from the residual twin, the plain network beats itself on the labels alone",
          lambda a: _gain(a, "plain, kd", "plain", SHALLOW)),
    Claim("8 layers: and is at most half a point below the residual network on the labels",
          lambda a: _gain(a, "plain, kd", "residual", SHALLOW) + 0.005),
    Claim("8 and 14 layers: on the mean it beats the plain network on the labels",
          lambda a: _gain(a, "plain, kd", "plain", SHALLOW, MIDDLE)),
    Claim("26 layers: without shortcuts the network learns less",
          lambda a: _gain(a, "residual", "plain", DEEP)),
    Claim("26 layers: and distillation does not make up for all of it",
          lambda a: _gain(a, "residual", "plain, kd", DEEP)),
    Claim("26 layers: distillation makes up for some of it",
          lambda a: _gain(a, "plain, kd", "plain", DEEP), report=True),
    Claim("26 layers: and so it does in three times as many steps",
          lambda a: _gain(a, "long plain, kd", "long plain", DEEP), report=True),
    Claim("8 layers: a mentor that is no better than the residual network helps too",
          lambda a: _gain(a, "plain, mentor", "plain", SHALLOW), report=True),
    Claim("8 layers: a plain teacher, trained like the student itself, helps too",
          lambda a: _gain(a, "plain, plain teacher", "plain", SHALLOW), report=True),
    Claim("14 layers: a mentor that is no better than the residual network helps too",
          lambda a: _gain(a, "plain, mentor", "plain", MIDDLE), report=True),
    Claim("8 layers: the residual network gains less from distillation than the plain one",
          lambda a: _gain(a, "plain, kd", "plain", SHALLOW) - _gain(a, "residual, kd", "residual", SHALLOW),
          report=True),
    Claim("14 layers: the loss around the plain network is smoother after distillation",
          lambda a: a[f"{MIDDLE}, plain"]["roughness"] - a[f"{MIDDLE}, plain, kd"]["roughness"], report=True),
    Claim("14 layers: and rougher than around the residual network",
          lambda a: a[f"{MIDDLE}, plain"]["roughness"] - a[f"{MIDDLE}, residual"]["roughness"], report=True),
    Claim("14 layers: neighbouring plain blocks are more alike after distillation",
          lambda a: a[f"{MIDDLE}, plain, kd"]["alignment"] - a[f"{MIDDLE}, plain"]["alignment"], report=True),
]


@dataclass(frozen=True)
class Config:
    steps: int = 78_200  # optimiser steps: 200 epochs of 50,000 pictures at this batch
    batch: int = 128  # pictures a step
    optimizer: Literal["sgd", "adamw"] = "sgd"  # SGD with momentum 0.9, or AdamW
    lr: float = 0.1  # peak learning rate; a cosine to 0
    warmup: float = 0.05  # part of the steps in which the learning rate rises
    weight_decay: float = 5e-4  # lambda
    clip: float | None = None  # largest norm of the gradient; None: any
    alpha: float = 0.9  # weight of the teacher's term; the labels have 1 - alpha. 0: the teacher is not asked
    tau: float = 4.0  # temperature of both models
    shortcuts: Literal["removed", "kept"] = "removed"  # of the student; kept: plain KD into a residual network

    def __post_init__(self) -> None:
        check_training(self.steps, self.batch, self.lr, self.warmup, self.weight_decay)
        require(self.clip is None or self.clip > 0, f"clip must be above 0, or None, not {self.clip}")
        require(0 <= self.alpha <= 1, f"alpha must lie in [0, 1], not {self.alpha}")
        require(self.tau > 0, f"tau must be above 0, not {self.tau}")
        require(self.shortcuts in ("removed", "kept"), f"shortcuts is 'removed' or 'kept', not {self.shortcuts!r}")


EMBEDDED = Config(steps=160, batch=50, lr=0.05, warmup=0.2)


def distill(
    teacher: Classifier,
    student: Classifier,
    labelled: LabelledImages,
    config: Config = Config(),
    run: Run | None = None,
) -> PlainNetwork:
    """Take the shortcuts out of the residual `student`, train it in place and return it with the names of its plain
    blocks. The teacher may be of any kind and any accuracy."""
    run = begin(run)
    run.check(Classifier, labelled, labels=True, teacher=teacher, student=student)
    assert isinstance(student, nn.Module)
    plain = PlainNetwork(student, remove_shortcuts(student) if config.shortcuts == "removed" else [])
    optimizer = optimizer_for(student.parameters(), config.optimizer, config.lr, config.weight_decay)
    student.train()
    with frozen(teacher):
        for batch in run.loop("train", labelled, batch=config.batch, steps=config.steps, student=student,
                              drop_last=len(labelled) >= config.batch, optimizer=optimizer):
            set_lr(optimizer, config.lr * warmup_cosine(run.progress, config.warmup))
            logits = student(batch["image"])
            terms = {}
            if config.alpha < 1:
                terms["ce"] = (1 - config.alpha) * F.cross_entropy(logits, batch["label"])
            if config.alpha > 0:
                with torch.no_grad():
                    target = teacher(batch["image"])
                terms["kd"] = config.alpha * kl(target, logits, config.tau)
            run.update(optimizer, clip=config.clip, **terms)
    return plain


def tiny() -> dict[str, Any]:
    torch.manual_seed(0)
    teacher = nn.Sequential(nn.Flatten(), nn.Linear(64, 4))
    data = TensorSet(image=torch.rand(12, 1, 8, 8), label=torch.arange(12) % 4)
    return {"teacher": teacher, "student": SmallResNet(1, 4, 2, (1, 1), norm="group"), "labelled": data,
            "config": Config(steps=3, batch=6, lr=0.1)}


# -------------------------------------------------------------------- the embedded experiment


def network(depth: int, width: int = 8) -> SmallResNet:
    """A residual network for digits with three stages of (depth - 2) / 6 blocks, widths `width` times 1, 2 and 4."""
    return SmallResNet(width=width, blocks=[(depth - 2) // 6] * 3)


def ground() -> dict[str, Any]:
    """200 labelled digits of 8 pixels and 597 to test. The teachers saw 1,000 other digits: the residual twin of each
    depth, and a mentor of 8 narrow layers, trained briefly, that is no better than a residual network on the 200."""
    teachers = {f"twin {depth}": digits_classifier("resnet", 8, 200, 1200, steps=400, width=8,
                                                   blocks=[(depth - 2) // 6] * 3) for depth in (SHALLOW, MIDDLE, DEEP)}
    teachers["mentor"] = digits_classifier("resnet", 8, 200, 1200, steps=80, width=4, blocks=[1, 1, 1])
    return {"labelled": digits(8, "labelled"), "test": digits(8, "test"), **teachers}


def experiment(run: Run) -> dict[str, dict[str, float]]:
    """Per depth, with the same schedule: the residual and the plain network on the labels alone, and distilled from
    several teachers; accuracy on the 597 test pictures, beside the teacher's own."""
    g = ground()
    labelled, test = g["labelled"], g["test"]

    def trained(depth: int, teacher: Any, **changes: Any) -> nn.Module:
        run.begin()
        student = network(depth).to(run.device)
        distill(teacher, student, labelled, dataclasses.replace(EMBEDDED, **changes), run)
        return student

    def labels(depth: int, shortcuts: str = "removed", **changes: Any) -> dict[str, float]:
        student = trained(depth, g["mentor"].to(run.device), shortcuts=shortcuts, alpha=0.0, **changes)
        return measured(run, student, test, meters=depth == MIDDLE)

    def kd(depth: int, teacher: str, shortcuts: str = "removed", **changes: Any) -> dict[str, float]:
        student = trained(depth, g[teacher].to(run.device), shortcuts=shortcuts, **changes)
        return {**measured(run, student, test, meters=depth == MIDDLE),
                "teacher accuracy": accuracy(g[teacher], test, device=run.device)}

    def from_plain(depth: int) -> dict[str, float]:
        with run.scope("teacher"):
            teacher = trained(depth, g["mentor"].to(run.device), alpha=0.0)
        return {**measured(run, trained(depth, teacher), test),
                "teacher accuracy": accuracy(teacher, test, device=run.device)}

    core: dict[str, Arm] = {}
    extended: dict[str, Arm] = {}
    for depth in (SHALLOW, MIDDLE, DEEP):
        core[f"{depth}, residual"] = partial(labels, depth, "kept")
        core[f"{depth}, plain"] = partial(labels, depth)
        core[f"{depth}, plain, kd"] = partial(kd, depth, f"twin {depth}")
        extended[f"{depth}, plain, mentor"] = partial(kd, depth, "mentor")
    for depth in (SHALLOW, MIDDLE):
        extended[f"{depth}, residual, kd"] = partial(kd, depth, f"twin {depth}", "kept")
    extended[f"{SHALLOW}, plain, deeper teacher"] = partial(kd, SHALLOW, f"twin {DEEP}")
    extended[f"{SHALLOW}, plain, plain teacher"] = partial(from_plain, SHALLOW)
    long = 3 * EMBEDDED.steps
    extended[f"{DEEP}, long plain"] = partial(labels, DEEP, steps=long)
    extended[f"{DEEP}, long plain, kd"] = partial(kd, DEEP, f"twin {DEEP}", steps=long)
    results = run.arms(core, extended)
    run.picture("depth and mentors", overview(results))
    return results


def measured(run: Run, student: nn.Module, test: TensorSet, meters: bool = False) -> dict[str, float]:
    """Accuracy and size; with `meters` the roughness of the loss around the student, the share of gradient that reaches
    its first layer, how alike neighbouring blocks are, and |F(x)| / |shortcut(x)| where there are shortcuts."""
    found = {"accuracy": accuracy(student, test, device=run.device), "parameters": float(parameters(student))}
    if not meters:
        return found
    image, label = (x[:200].to(run.device) for x in (test.image, test.label))

    def loss() -> Tensor:
        return F.cross_entropy(student(image), label)

    with run.aside("meters", student, grad=True):
        plane = loss_plane(loss, list(student.parameters()))
        flow = list(gradient_flow(loss, student).values())
    run.picture("loss along two random directions", plane_figure({"loss": plane}))
    found |= {"roughness": roughness(plane), "first over last gradient": flow[0] / flow[-1],
              "alignment": mean(block_alignment(student, test, device=run.device).values())}
    if any(not isinstance(block, Block) for block in residual_blocks(student).values()):
        found["new over kept"] = mean(feature_reuse(student, test, device=run.device).values())
    return found


def trainee_and_mentor(results: dict[str, dict[str, float]]) -> list[tuple[str, float, float]]:
    """Of every distilled arm: its name, the teacher's lead over the same network on labels, and the gain over that."""
    rows = []
    for arm, found in results.items():
        alone = results.get(", ".join(arm.split(", ")[:2]), {})
        if "teacher accuracy" in found and alone:
            rows.append((arm, found["teacher accuracy"] - alone["accuracy"], found["accuracy"] - alone["accuracy"]))
    return rows


def overview(results: dict[str, dict[str, float]]) -> Any:
    """A figure: accuracy of each way of training over the depth; gain by distillation over the teacher's lead."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3))
    left, right = figure.subplots(1, 2)
    for way in ("residual", "plain", "plain, kd", "plain, mentor"):
        depths = [d for d in (SHALLOW, MIDDLE, DEEP) if results.get(f"{d}, {way}")]
        left.plot(depths, [results[f"{d}, {way}"]["accuracy"] for d in depths], marker="o", label=way)
    left.set(xlabel="layers", ylabel="accuracy")
    left.legend()
    for arm, lead, gain in trainee_and_mentor(results):
        right.scatter(lead, gain)
        right.annotate(arm, (lead, gain), fontsize=6)
    right.axhline(0, color="grey", linewidth=0.5)
    right.axvline(0, color="grey", linewidth=0.5)
    right.set(xlabel="teacher's lead over the student on labels", ylabel="gain by distillation")
    figure.tight_layout()
    return figure
