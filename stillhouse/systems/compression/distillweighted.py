"""DistillNearest and DistillWeighted: models made for other tasks are distilled into a small one for this task,
weighted by how alike the tasks are.

Few labelled and many unlabelled pictures of the target task; source models s on a shelf, each with classes of its own.
On the labelled pictures each source gets a similarity e_s (PARC by default) and with it a weight

    alpha_s = max(e_s, 0)^p / sum_k max(e_k, 0)^p;        p -> infinity is DistillNearest: the most similar one alone.

The small network g has the target's head h_0 and one linear head h_s for every source in use, thrown away afterwards:

    L = lambda CE(y, h_0(g(x)))  +  (1 - lambda) sum_s alpha_s L_s,
    L_s = mean over labelled and unlabelled x of  - sum softmax(source_s(x) / T) log softmax(h_s(g(x)) / T).

Source data are never needed. Borup, Phoo and Hariharan 2023, "Distilling from Similar Tasks for Transfer Learning on a
Budget". p, lambda and T are not confirmed by released code; L_s carries T squared, as everywhere here. Scores that are
log-likelihoods (LEEP, NCE, LogME) enter alpha as exp(e_s).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stillhouse.data.sets import TensorSet, column
from stillhouse.data.shapes import SHAPES, shapes
from stillhouse.data.variants import balanced
from stillhouse.errors import RoleError, require
from stillhouse.evaluate.claims import Claim
from stillhouse.evaluate.classification import accuracy, predictions
from stillhouse.evaluate.task_similarity import (
    LOG_LIKELIHOODS,
    Similarity,
    power_weights,
    source_outputs,
    task_similarity,
)
from stillhouse.measures.divergences import soft_cross_entropy
from stillhouse.models.convnets import TinyConvNet
from stillhouse.parts.heads import replace_head
from stillhouse.parts.multi_head import MultiHead
from stillhouse.protocols import Classifier, Images, LabelledImages
from stillhouse.recipes import fixmatch, supervised
from stillhouse.recipes.supervised import check_training, optimizer_for
from stillhouse.recipes.views import random_view
from stillhouse.run import Run, begin, frozen, set_lr
from stillhouse.run.schedules import warmup_cosine
from stillhouse.zoo.classifiers import shelf

NUMBER = 65

CLAIMS = [
    Claim("DistillWeighted beats fine-tuning on the labels",
          lambda a: a["weighted"]["accuracy"] - a["labels"]["accuracy"]),
    Claim("the nearest source teaches better than the farthest",
          lambda a: a["nearest"]["accuracy"] - a["farthest"]["accuracy"]),
    Claim("weights by similarity beat uniform weights",
          lambda a: a["weighted"]["accuracy"] - a["uniform"]["accuracy"]),
    Claim("PARC ranks the source of the same shapes above a network with random weights",
          lambda a: a["weighted"]["shape"] - a["weighted"]["random"]),
    Claim("DistillWeighted beats FixMatch",
          lambda a: a["weighted"]["accuracy"] - a["fixmatch"]["accuracy"], report=True),
    Claim("several sources, p = 2, beat the nearest alone",
          lambda a: a["p = 2"]["accuracy"] - a["nearest"]["accuracy"], report=True),
    Claim("the unlabelled pictures help",
          lambda a: a["weighted"]["accuracy"] - a["labelled pictures alone"]["accuracy"], report=True),
]


@dataclass(frozen=True)
class Config:
    steps: int = 10_000  # optimiser steps
    batch: int = 128  # labelled pictures a step
    unlabelled_batch: int = 128  # unlabelled pictures a step
    labels: float = 0.8  # lambda: weight of the labels; the sources have 1 - lambda
    temperature: float = 1.0  # T
    power: float = 12.0  # p; 0: all sources of positive similarity alike, inf: DistillNearest
    least: float = 1e-3  # sources of a smaller weight are left out, to save their passes; 0: none
    similarity: Similarity = "parc"  # e_s
    components: int | None = 32  # dimensions that features are reduced to before; None: as they are
    subsets: int = 1  # random class-balanced samples that e_s is the mean over
    per_class: int | None = None  # pictures of each class in a sample; None: all labelled pictures, once
    taps: tuple[str, ...] = ()  # each source's feature by module path; empty: what goes into its last linear layer
    student_tap: str = "penultimate"  # the student's feature that the heads of the sources read
    optimizer: Literal["sgd", "adamw"] = "sgd"  # SGD with momentum 0.9, or AdamW
    lr: float = 0.01  # peak learning rate; a cosine to 0
    warmup: float = 0.0  # part of the steps in which the learning rate rises
    weight_decay: float = 5e-4  # of all parameters
    view: float = 1.0  # strength of the weak augmentation; 0: the pictures as they are
    flip: bool = True  # mirror half of the pictures

    def __post_init__(self) -> None:
        check_training(self.steps, self.batch, self.lr, self.warmup, self.weight_decay)
        require(self.unlabelled_batch >= 1, f"unlabelled_batch must be 1 or more, not {self.unlabelled_batch}")
        require(0 <= self.labels <= 1, f"labels is a weight in [0, 1], not {self.labels}")
        require(0 <= self.least <= 0.1, f"least is a weight in [0, 0.1], not {self.least}")
        require(self.temperature > 0 and self.power >= 0 and self.view >= 0, "temperature must be above 0, power and "
                f"view 0 or more; got {self.temperature}, {self.power} and {self.view}")
        require(self.similarity in get_args(Similarity), f"similarity is one of {', '.join(get_args(Similarity))}, not "
                f"{self.similarity!r}")
        require(self.subsets >= 1 and (self.per_class is None or self.per_class >= 1)
                and (self.components is None or self.components >= 1), "subsets, per_class and components must be 1 or "
                f"more; got {self.subsets}, {self.per_class} and {self.components}")


EMBEDDED = Config(steps=400, batch=32, unlabelled_batch=64, labels=0.3, subsets=5, per_class=3, lr=0.1, flip=False)


def distill(
    teachers: Sequence[Classifier],
    student: Classifier,
    labelled: LabelledImages,
    unlabelled: Images,
    config: Config = Config(),
    run: Run | None = None,
) -> nn.Module:
    """Train the student in place for the task of `labelled`; `teachers` are models of any tasks, with any classes."""
    run = begin(run)
    example = checked(teachers, student, labelled, unlabelled, config, run)
    found = run.once("similarity", lambda: similarities(teachers, labelled, config, run))
    alpha = source_weights(found["e"], config)
    used = [(teacher, a, n) for teacher, a, n in zip(teachers, alpha.tolist(), found["classes"].tolist(), strict=True)
            if a > 0 and a >= config.least]
    tell(found["e"], alpha, run)
    assert isinstance(student, nn.Module)
    network = MultiHead(student, [n for _, _, n in used], example, config.student_tap)
    optimizer = optimizer_for(network.parameters(), config.optimizer, config.lr, config.weight_decay)
    data, sizes = {"labelled": labelled}, {"labelled": config.batch}
    if config.labels < 1:
        data, sizes = {**data, "unlabelled": unlabelled}, {**sizes, "unlabelled": config.unlabelled_batch}
    network.train()
    with frozen(*teachers):
        for batch in run.loop("distil", data, batch=sizes, steps=config.steps, student=student, heads=network.heads,
                              optimizer=optimizer):
            set_lr(optimizer, config.lr * warmup_cosine(run.progress, config.warmup))
            label = batch["labelled"]["label"]
            x = torch.cat([random_view(part["image"], run, config.view, flip=config.flip) for part in batch.values()])
            logits, by_source = network(x)
            terms: dict[str, Any] = {"ce": config.labels * F.cross_entropy(logits[: len(label)], label)}
            if config.labels < 1:
                with torch.no_grad():
                    targets = [teacher(x) for teacher, _, _ in used]
                each = [a * soft_cross_entropy(target, z_s, config.temperature)
                        for (_, a, _), target, z_s in zip(used, targets, by_source, strict=True)]
                terms["sources"] = (1 - config.labels) * torch.stack(each).sum()
            run.update(optimizer, **terms)
    return student


def checked(teachers: Sequence[Classifier], student: Classifier, labelled: Any, unlabelled: Any, config: Config,
            run: Run) -> Tensor:
    """Every role sees a batch of both kinds of data; returns a few pictures."""
    require(len(teachers) >= 1, "give at least one source model", RoleError)
    require(len(config.taps) in (0, len(teachers)), f"taps names one module path for each source: {len(teachers)} "
            f"sources, got {config.taps}")
    few = run.check(Classifier, labelled, labels=True, student=student)
    run.check(Classifier, unlabelled, student=student)
    for i, teacher in enumerate(teachers):
        role: dict[str, Any] = {f"teachers[{i}]": teacher}
        for data in (labelled, unlabelled):
            run.check(Classifier, data, **role)
    return few["image"]


def similarities(teachers: Sequence[Any], labelled: Any, config: Config, run: Run) -> dict[str, Tensor]:
    """e_s of every source on the labelled pictures, and how many classes it has."""
    label = column(labelled, "label")
    scores, classes = [], []
    for i, teacher in enumerate(teachers):
        where = config.taps[i] if config.taps else "penultimate"
        features, logits = source_outputs(teacher, labelled, where, device=run.device)
        scores.append(task_similarity(features, logits, label, config.similarity, config.components, config.subsets,
                                      config.per_class, run.seed))
        classes.append(logits.shape[1])
    return {"e": torch.tensor(scores, dtype=torch.float64), "classes": torch.tensor(classes)}


def source_weights(e: Tensor, config: Config) -> Tensor:
    """alpha; of equal highest scores the first alone counts at p = infinity."""
    scores = e.exp() if config.similarity in LOG_LIKELIHOODS else e
    if math.isinf(config.power):
        return F.one_hot(scores.argmax(), len(scores)).to(scores)
    return power_weights(scores, config.power)


def tell(e: Tensor, alpha: Tensor, run: Run) -> None:
    """Similarity and weight of every source, for the log and the person watching."""
    pairs = list(zip(e.tolist(), alpha.tolist(), strict=True))
    run.log(**{f"{name} {i}": value for i, pair in enumerate(pairs)
               for name, value in zip(("similarity", "weight"), pair, strict=True)})
    run.say("the sources: " + "; ".join(f"{i}: similarity {e_s:.3f}, weight {a:.3f}"
                                        for i, (e_s, a) in enumerate(pairs)))


def tiny() -> dict[str, Any]:
    torch.manual_seed(0)
    teachers = [nn.Sequential(nn.Flatten(), nn.Linear(64, 6), nn.ReLU(), nn.Linear(6, n)) for n in (3, 5)]
    student = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(72, 4))
    label = torch.arange(16) % 4
    image = torch.rand(4, 1, 8, 8)[label] + 0.3 * torch.rand(16, 1, 8, 8)
    return {"teachers": teachers, "student": student, "labelled": TensorSet(image=image, label=label),
            "unlabelled": TensorSet(image=torch.rand(20, 1, 8, 8)),
            "config": Config(steps=5, batch=4, unlabelled_batch=6, power=1.0, subsets=2, per_class=3, lr=0.1)}


# -------------------------------------------------------------------- the embedded experiment

SIZE, KINDS = 16, SHAPES[:4]


def target_task(n: int, seed: int) -> TensorSet:
    """Noisy shapes in turned colours on gradients; the class is the shape and whether it is large: eight classes."""
    drawn = shapes(n, seed, SIZE, KINDS, background="gradient", hue=40, noise=0.05)
    return TensorSet(image=drawn.image, label=2 * drawn.shape + (drawn.scale > 0.27).long())


def ground(seed: int) -> dict[str, Any]:
    """Four labels a class, 1,500 pictures without, 1,000 to test; on the shelf models for shapes in another domain,
    colours, textures and digits, and one with random weights; a small network that was trained on coloured digits."""
    torch.manual_seed(seed)
    sources: dict[str, nn.Module] = {"shape": shelf("shape", SIZE, steps=1200)}
    sources |= {task: shelf(task, SIZE) for task in ("colour", "texture", "digit")}
    sources["random"] = TinyConvNet(3, 10, width=24).eval()
    return {"sources": sources, "start": shelf("digit", SIZE, width=10),
            "labelled": balanced(target_task(600, 7000 + 3 * seed), 4, seed),
            "unlabelled": target_task(1500, 7001 + 3 * seed).without("label"),
            "test": target_task(1000, 7002 + 3 * seed)}


def experiment(run: Run) -> dict[str, dict[str, float]]:
    """All arms with the same student, labels, steps, weak views and, but for the first, unlabelled pictures; accuracy
    on 1,000 test pictures; where sources are weighed, the similarity of each."""
    g = ground(run.seed)
    sources = {name: source.to(run.device) for name, source in g["sources"].items()}
    shared: dict[str, Any] = {name: getattr(EMBEDDED, name) for name in ("steps", "batch", "optimizer", "weight_decay")}
    shared["lr"] = 0.03  # better for the labels alone than the 0.1 that is best with the sources

    def new() -> nn.Module:
        run.begin()
        return replace_head(g["start"], classes=2 * len(KINDS))[0].to(run.device)

    def right(student: nn.Module) -> dict[str, float]:
        logits, label = predictions(student, g["test"], device=run.device)
        of_shape = (logits.argmax(1) // 2 == label // 2).double().mean().item()
        return {"accuracy": accuracy(student, g["test"], device=run.device), "right shape": of_shape}

    def weighted(chosen: Sequence[str] = tuple(sources), unlabelled: Any = g["unlabelled"], **changes: Any
                 ) -> Callable[[], dict[str, float]]:
        config = dataclasses.replace(EMBEDDED, **changes)

        def measured() -> dict[str, float]:
            given = [sources[name] for name in chosen]
            e = similarities(given, g["labelled"], config, run)["e"].tolist()
            student = distill(given, new(), g["labelled"], unlabelled, config, run)
            return {**right(student), **dict(zip(chosen, e, strict=True))}

        return measured

    def farthest() -> dict[str, float]:
        e = similarities(list(sources.values()), g["labelled"], EMBEDDED, run)["e"]
        return weighted([list(sources)[int(e.argmin())]])()

    def fine_tuned() -> nn.Module:
        return supervised.train(new(), g["labelled"], supervised.Config(**shared, warmup=EMBEDDED.warmup), run,
                                lambda x: random_view(x, run, EMBEDDED.view))

    def by_fixmatch() -> nn.Module:
        config = fixmatch.Config(**shared, ratio=EMBEDDED.unlabelled_batch // EMBEDDED.batch, strong=0.5, erase=0.25,
                                 flip=False)
        return fixmatch.train(new(), g["labelled"], g["unlabelled"], config, run)

    run.picture("the eight classes of the target task", g["test"].image[g["test"].label.argsort(stable=True)[::25]])
    return run.arms(
        {"labels": lambda: right(fine_tuned()),
         "fixmatch": lambda: right(by_fixmatch()),
         "farthest": farthest,
         "uniform": weighted(power=0.0),
         "nearest": weighted(power=math.inf),
         "weighted": weighted()},
        extended={
            "labelled pictures alone": weighted(unlabelled=g["labelled"].without("label")),
            "p = 2": weighted(power=2.0),
            "lambda = 0.8": weighted(labels=0.8),
            "by leep": weighted(similarity="leep"),
            "rankings": lambda: rankings(sources, g["labelled"], run)})


def rankings(sources: dict[str, nn.Module], labelled: TensorSet, run: Run) -> dict[str, float]:
    """Every score of every source."""
    found: dict[str, float] = {}
    for kind in get_args(Similarity):
        e = similarities(list(sources.values()), labelled, dataclasses.replace(EMBEDDED, similarity=kind), run)["e"]
        found |= {f"{kind}, {name}": score for name, score in zip(sources, e.tolist(), strict=True)}
    return found
