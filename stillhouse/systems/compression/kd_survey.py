"""The survey of knowledge distillation as what a survey is for: one working representative of every category, a
selector that says which of them fit a teacher, a student and data, and one table in which all stand on one ground.

The categories: knowledge (response, feature, relation), scheme (offline, online, self) and algorithm (adversarial,
multi-teacher, cross-modal, graph, attention, data-free, quantized, lifelong, NAS). The base of most is

    L = (1 - alpha) CE(y, z_s) + alpha T^2 KL(softmax(z_t / T) || softmax(z_s / T)) + weight L_kind,

with the kind's own loss beside the response knowledge. `leaf="best"` trains every leaf that fits for a part of the
steps on the labelled pictures, and the one that is most accurate on the validation pictures in full.

Gou, Yu, Maybank and Tao 2021, "Knowledge Distillation: A Survey". It proposes no method: the representatives are those
of `stillhouse.recipes.leaves`, each with its source; weights of the kinds are this library's.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from stillhouse.data.digits import digits
from stillhouse.data.sets import TensorSet
from stillhouse.data.shapes import edges
from stillhouse.errors import DataError, require
from stillhouse.evaluate.claims import Claim
from stillhouse.evaluate.classification import accuracy, predictions
from stillhouse.evaluate.cost import parameters
from stillhouse.models.convnets import ConvNet, SmallResNet, SmallVGG, TinyConvNet
from stillhouse.parts.packed import QuantizedModel
from stillhouse.protocols import AnyImages, Classifier, LabelledImages, Network
from stillhouse.recipes import lifelong, supervised
from stillhouse.recipes.leaves import LEAVES, Settings, find, select, there_is
from stillhouse.recipes.leaves import train as train_leaf
from stillhouse.recipes.supervised import check_training
from stillhouse.recipes.views import random_view
from stillhouse.run import Run, begin
from stillhouse.run.check import first_batch
from stillhouse.store import write_text
from stillhouse.zoo.classifiers import digits_classifier, digits_teacher

NUMBER = 91

OFFLINE = ("response", "hint", "attention", "nst", "fsp", "rkd", "sp", "graph", "several", "adversarial", "quantized",
           "searched")
"""The offline leaves whose student sees what the plain one sees."""
KINDS = ("hint", "attention", "nst", "fsp", "rkd", "sp", "graph")


def _worst(a: Mapping[str, Mapping[str, float]]) -> float:
    plain = min(a[leaf]["accuracy"] - a["labels"]["accuracy"] for leaf in OFFLINE)
    return min(plain, a["cross-modal"]["accuracy"] - a["labels, second modality"]["accuracy"])


CLAIMS = [
    Claim("response knowledge beats the labels alone",
          lambda a: a["response"]["accuracy"] - a["labels"]["accuracy"]),
    Claim("the best of feature and relation knowledge with response loses at most half a point to response alone",
          lambda a: max(a[k]["accuracy"] for k in KINDS) - a["response"]["accuracy"] + 0.005),
    Claim("without any data: more than 40 points above chance",
          lambda a: a["data-free"]["accuracy"] - 0.1 - 0.4),
    Claim("learning without forgetting keeps 10 points more of the old classes than fine-tuning",
          lambda a: a["lifelong"]["old classes"] - a["fine-tuned"]["old classes"] - 0.1),
    Claim("no offline leaf loses more than a point to the labels alone", lambda a: _worst(a) + 0.01),
    Claim("online and self schemes beat the labels alone",
          lambda a: min(a[k]["accuracy"] for k in ("mutual", "exits")) - a["labels"]["accuracy"], report=True),
    Claim("feature and relation knowledge on average add to response",
          lambda a: sum(a[k]["accuracy"] for k in KINDS) / len(KINDS) - a["response"]["accuracy"], report=True),
]


@dataclass(frozen=True)
class Config:
    leaf: str = "best"  # a name of `stillhouse.recipes.leaves.LEAVES`, or "best": tried on the validation pictures
    trial: float = 0.1  # part of the steps that each trial of "best" takes
    gives: Literal["everything", "probabilities", "labels"] = "everything"  # what the teacher answers with
    steps: int = 93_600  # optimiser steps of the leaf: 240 epochs of 50,000 pictures at batch 128
    batch: int = 128  # pictures a step
    optimizer: Literal["sgd", "adamw"] = "sgd"  # SGD with momentum 0.9, or AdamW
    lr: float = 0.05  # peak learning rate; a cosine to 0
    warmup: float = 0.05  # part of the steps in which it rises
    weight_decay: float = 5e-4  # lambda
    temperature: float = 4.0  # T
    alpha: float = 0.9  # weight of the teacher's answers; the labels have 1 - alpha
    bits: int = 4  # of the weights of "quantized"
    generator: int = 128  # channels of the generator of "data-free"
    view: float = 0.0  # strength of the random shifts, turns and light changes; 0: the pictures as they come
    old: tuple[int, ...] = ()  # the classes that the student knows already, for "lifelong"

    def __post_init__(self) -> None:
        check_training(self.steps, self.batch, self.lr, self.warmup, self.weight_decay)
        if self.leaf != "best":
            find(self.leaf)
        require(0 < self.trial <= 1, f"trial is a part of the steps in (0, 1], not {self.trial}")
        require(self.gives in ("everything", "probabilities", "labels"), "gives is 'everything', 'probabilities' or "
                f"'labels', not {self.gives!r}")
        require(0 <= self.alpha <= 1 and self.temperature > 0, "alpha must lie in [0, 1] and temperature above 0; got "
                f"{self.alpha} and {self.temperature}")
        require(self.view >= 0, f"view must not be negative, not {self.view}")
        require(1 <= self.bits <= 16, f"bits must lie between 1 and 16, not {self.bits}")

    def settings(self, part: float = 1.0) -> Settings:
        """What the leaves are trained with, for a part of the steps."""
        return Settings(round(part * self.steps), self.batch, self.optimizer, self.lr, self.warmup, self.weight_decay,
                        self.temperature, self.alpha, self.bits, self.generator, self.old)


EMBEDDED = Config(steps=300, batch=64, optimizer="adamw", lr=0.01, weight_decay=1e-4, generator=48)


def distill(
    student: Classifier,
    labelled: AnyImages,
    teacher: Classifier | None = None,
    teachers: list[Classifier] | None = None,
    network: Network | None = None,
    candidates: list[Network] | None = None,
    validation: LabelledImages | None = None,
    config: Config = Config(),
    run: Run | None = None,
) -> nn.Module | QuantizedModel:
    """Train the student by one leaf of the survey, or by the best of all that fit; what comes out of it.

    `labelled` may have no labels where the leaf needs none, and carries `other` for "cross-modal". With "best",
    `validation` decides; the table of all leaves stands in the run's folder as `leaves.json`, with what the others
    lack. Raises RoleError where the leaf that is named lacks something, saying what.
    """
    run = begin(run)
    first_batch(labelled, ("image",))
    run.check(Classifier, labelled, student=student, teacher=None if "other" in _fields(labelled) else teacher)
    assert isinstance(student, nn.Module)
    roles: dict[str, Any] = {"student": student, "labelled": labelled, "teacher": teacher, "teachers": teachers,
                             "network": network, "candidates": candidates, "view": None}
    if config.view:
        roles["view"] = lambda x: random_view(x, run, config.view)
    fitting, refused = select(there_is(roles, config.gives, config.old))
    if config.leaf != "best":
        require(config.leaf in fitting, f"'{config.leaf}' does not fit: {refused.get(config.leaf)}. What fits: "
                f"{', '.join(fitting) or 'nothing'}")
        return train_leaf(config.leaf, roles, config.settings(), run)
    require(validation is not None, "leaf='best' chooses by validation pictures with labels; give them, or name a leaf",
            DataError)
    run.check(Classifier, validation, labels=True, student=student)
    table: dict[str, dict[str, Any]] = {}
    for leaf in fitting:
        with run.scope(f"trial {leaf}"):
            made = train_leaf(leaf, {**roles, "student": copy.deepcopy(student)}, config.settings(config.trial), run)
            model = made.model if isinstance(made, QuantizedModel) else made
            table[leaf] = {**axes(leaf), "accuracy": accuracy(model, validation, device=run.device)}
    best = max(table, key=lambda leaf: table[leaf]["accuracy"])
    run.say("\n".join(lines(table, refused)) + f"\ntraining '{best}' in full")
    if run.folder is not None:
        write_text(run.folder / "leaves.json", json.dumps({"tried": table, "lacking": refused, "best": best}, indent=1))
    return train_leaf(best, roles, config.settings(), run)


def axes(leaf: str) -> dict[str, Any]:
    """Where a leaf lies in the survey's map, and what a step of it costs."""
    found = find(leaf)
    return {"knowledge": list(found.knowledge), "scheme": found.scheme, "algorithms": list(found.algorithms),
            "source": found.source, "passes": found.passes}


def lines(table: Mapping[str, Mapping[str, Any]], refused: Mapping[str, str]) -> list[str]:
    """The survey's table as text: method, knowledge, scheme, algorithm, accuracy, gain over the labels; then what does
    not fit, and why."""
    plain = table.get("labels", {}).get("accuracy")
    rows = [("method", "knowledge", "scheme", "algorithm", "accuracy", "gain")]
    for leaf, row in sorted(table.items(), key=lambda item: -item[1]["accuracy"]):
        gain = "" if plain is None else f"{100 * (row['accuracy'] - plain):+.1f}"
        rows.append((leaf, "+".join(row["knowledge"]), row["scheme"], " ".join(row["algorithms"]),
                     f"{100 * row['accuracy']:.1f}", gain))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    shown = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return [*shown, *(f"{leaf}: {reason}" for leaf, reason in refused.items())]


def _fields(data: Any) -> tuple[str, ...]:
    return tuple(getattr(data, "fields", ())) or tuple(data[0])


def tiny() -> dict[str, Any]:
    torch.manual_seed(0)

    def network() -> nn.Module:
        return TinyConvNet(classes=4, norm="none", width=2)

    return {"student": network(), "teacher": SmallResNet(classes=4, width=2), "network": network,
            "labelled": TensorSet(image=torch.randn(12, 1, 8, 8), label=torch.arange(12) % 4),
            "validation": TensorSet(image=torch.randn(8, 1, 8, 8), label=torch.arange(8) % 4),
            "config": Config(trial=0.5, steps=2, batch=4, lr=0.01)}


# -------------------------------------------------------------------- the embedded experiment


def experiment(run: Run) -> dict[str, dict[str, float]]:
    """All leaves on one ground: 100 labelled digits of 16 pixels (their edges as the second modality), a ResNet and a
    ViT as teachers, the same small network, 300 steps; accuracy on 597 test pictures."""
    labelled, test = digits(16, "train").select(range(LABELLED)), digits(16, "test")
    pair = TensorSet(image=edges(labelled.image), label=labelled.label, other=labelled.image)
    seen = {False: (labelled, test), True: (pair, test.with_fields(image=edges(test.image)))}

    def roles(second: bool = False) -> dict[str, Any]:
        run.begin()
        teacher = digits_teacher(16).to(run.device)
        return {"student": student(run), "labelled": seen[second][0], "teacher": teacher,
                "teachers": [teacher, digits_classifier("vit", 16, steps=1500).to(run.device)],
                "network": lambda: student(run), "candidates": [lambda make=make: make().to(run.device)
                                                                for make in CANDIDATES]}

    def leaf(name: str, second: bool = False, **changes: Any) -> Callable[[], dict[str, float]]:
        def measure() -> dict[str, float]:
            given = roles(second)
            config = Config(**{**EMBEDDED.__dict__, "leaf": name, **changes})
            made = distill(**given, config=config, run=run)
            model = made.model if isinstance(made, QuantizedModel) else made
            return {"accuracy": accuracy(model, seen[second][1], device=run.device),
                    "teacher": accuracy(given["teacher"], test, device=run.device),
                    "parameters": float(parameters(model)), "passes": find(name).passes}

        return measure

    arms = {name: leaf(name, second=name == "cross-modal") for name in LEAVES if name != "lifelong"}
    found = run.arms({
        **arms,
        "labels, second modality": leaf("labels", second=True),
        "lifelong": lambda: two_tasks(run, lifelong.Config().weight),
        "fine-tuned": lambda: two_tasks(run, 0.0)})
    shown = {name: {**axes(name), "accuracy": found[name]["accuracy"]} for name in arms if found[name]}
    run.say("\n".join(lines(shown, {})))
    if shown:
        run.picture("gain over the labels", chart(shown))
    return found


LABELLED = 100
CANDIDATES: tuple[Callable[[], nn.Module], ...] = (
    TinyConvNet, lambda: SmallResNet(width=3), lambda: SmallVGG(width=5, image_size=16),
    lambda: ConvNet(1, 10, 10, depth=3, image_size=16))
"""Students of about the same size among which "searched" chooses."""


def student(run: Run) -> nn.Module:
    return TinyConvNet().to(run.device)


def two_tasks(run: Run, weight: float) -> dict[str, float]:
    """Of 300 labelled digits, 0 to 4 are learned first, then 5 to 9 with `weight` on what was known; accuracy within
    each task."""
    run.begin()
    data, test = digits(16, "train").select(range(3 * LABELLED)), digits(16, "test")
    network = student(run)
    training: dict[str, Any] = {name: getattr(EMBEDDED, name) for name in ("batch", "optimizer", "weight_decay")}
    parts: list[Any] = [[d.select((d.label // 5 == half).nonzero().flatten()) for half in (0, 1)] for d in (data, test)]
    supervised.train(network, parts[0][0], supervised.Config(steps=EMBEDDED.steps // 2, lr=EMBEDDED.lr, **training),
                     run)
    config = lifelong.Config(steps=EMBEDDED.steps, lr=EMBEDDED.lr, old=tuple(range(5)), weight=weight, **training)
    lifelong.train(network, parts[0][1], config, run)
    found = {}
    for half, name in enumerate(("old classes", "new classes")):
        logits, label = predictions(network, parts[1][half], device=run.device)
        own = logits[:, 5 * half : 5 * half + 5].argmax(1) + 5 * half
        found[name] = (own == label).double().mean().item()
    return found


def chart(table: Mapping[str, Mapping[str, Any]]) -> Any:
    """Bars of the gain over the labels, coloured by the main kind of knowledge."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    colours = {"response": "#1d66bd", "feature": "#2f9e63", "relation": "#c2571a"}
    plain = table["labels"]["accuracy"]
    order = sorted((leaf for leaf in table if leaf != "labels"), key=lambda leaf: table[leaf]["accuracy"])
    figure = Figure(figsize=(7, 0.3 * len(order) + 1.2), layout="constrained")
    axis = figure.subplots()
    axis.barh(order, [100 * (table[leaf]["accuracy"] - plain) for leaf in order],
              color=[colours[table[leaf]["knowledge"][0]] for leaf in order])
    axis.axvline(0, color="#5d6b7a", linewidth=0.8)
    axis.set_xlabel("points above training on the labels alone")
    axis.legend(handles=[Patch(color=c, label=k) for k, c in colours.items()], loc="lower right", fontsize=8)
    return figure
