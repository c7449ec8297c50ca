"""Distillation in data pruning: a student learns from a small part of the data, with the soft labels of a teacher that
has seen all of it.

A pruning score keeps the part f of the labelled set D (`prune`): at random, the hardest by EL2N, GraNd or forgetting
counts, coverage of the hardness (CCS), the moderate ones, or coverage of the features. The teacher was trained on D;
where none is given, a copy of the student with new weights is (self-distillation). On (x, y) in D_f

    L = (1 - alpha) CE(y, p_s) + alpha tau^2 KL(softmax(z_t / tau) || softmax(z_s / tau)),

    alpha(f) = alpha_small + (alpha_large - alpha_small) f                                        (alpha = None)

or the best of `search` on `validation`. The less is kept, the less its labels are to be trusted: what is hardest to
learn is often labelled wrongly, and a few pictures say little beyond their labels' noise. In ridge regression, with A_f
and S_f = X_f^T X_f of the kept samples (as rows) and A_T of the teacher's (`bias_and_noise`),

    theta_s = A_f^{-1} X_f^T (alpha X_f theta_T + (1 - alpha) y_f),   A = S + lambda I,
    E theta_s - theta* = - lambda A_f^{-1} (I + alpha S_f A_T^{-1}) theta*,

so that the bias falls with what the teacher has seen, and the noise of the student's labels with alpha.

Ben-Baruch et al. 2024, "Distilling the Knowledge in Data Pruning". The paper tunes alpha for every f and shows that the
best falls as f rises, without a formula; the straight line is ours, as are the built-in end points.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from stillhouse.data.digits import digits
from stillhouse.data.pruning import Kept
from stillhouse.data.sets import TensorSet, column, fetch
from stillhouse.data.shapes import shape_pairs
from stillhouse.data.variants import noisy_labels
from stillhouse.errors import ConfigError, DataError, require
from stillhouse.evaluate.claims import Arms, Claim
from stillhouse.evaluate.classification import accuracy
from stillhouse.measures.divergences import kl
from stillhouse.measures.ridge import ridge_student_errors
from stillhouse.models.convnets import TinyConvNet
from stillhouse.protocols import Classifier, LabelledImages, Network
from stillhouse.recipes import pruning, supervised
from stillhouse.recipes.supervised import check_training, optimizer_for
from stillhouse.recipes.views import random_view
from stillhouse.run import Run, begin, frozen, set_lr
from stillhouse.run.schedules import warmup_cosine

NUMBER = 50

FRACTIONS = (0.05, 0.1, 0.3)
PRUNERS: tuple[pruning.Way, ...] = ("random", "el2n", "moderate")
OTHERS: tuple[pruning.Way, ...] = ("forgetting", "grand", "ccs", "kcenter")


def _gain(f: float, way: str) -> Callable[[Arms], float]:
    return lambda a: a[f"{f:.0%}, kd"][way] - a[f"{f:.0%}"][way]


CLAIMS = [
    *(Claim(f"keeping {f:.0%} by {way}, the teacher's labels (alpha = 1) beat the given ones", _gain(f, way))
      for f in FRACTIONS for way in PRUNERS),
    Claim("keeping 10%, a random part with the teacher beats every way of pruning without",
          lambda a: a["10%, kd"]["random"] - max(a["10%"].values())),
    Claim("a random 30% with the teacher is as good as training on all with the given labels",
          lambda a: a["30%, kd"]["random"] - a["all"]["accuracy"]),
    Claim("keeping 5% without the teacher, the hardest are at least 20 points worse than a random part",
          lambda a: a["5%"]["random"] - a["5%"]["el2n"] - 0.2),
    Claim("a random 30% with the teacher is as good as the teacher, which was trained on all and longer",
          lambda a: a["30%, kd"]["random"] - a["all"]["teacher"], report=True),
    Claim("the teacher adds least to the easiest 5%", lambda a: min(
        a["5%, kd"][way] - a["5%"][way] for way in PRUNERS) - (
        a["other ways, kd"]["easiest"] - a["other ways"]["easiest"]), report=True),
    Claim("with right labels and a middling teacher the best alpha falls as more is kept",
          lambda a: a["right labels"]["best alpha, 5%"] - a["right labels"]["best alpha, 50%"], report=True),
    Claim("keeping 5%, a teacher smaller than the student is better than a larger one",
          lambda a: a["teachers"]["width 8, 5%"] - a["teachers"]["width 24, 5%"], report=True),
    Claim("alpha(f) is at most a point below alpha = 1 with wrong labels", lambda a: min(
        a[f"{f:.0%}, alpha(f)"]["random"] - a[f"{f:.0%}, kd"]["random"] for f in FRACTIONS) + 0.01, report=True),
    Claim("on the shapes, a random 10% with the teacher beats every way of pruning without",
          lambda a: a["shapes, kd"]["random"] - max(a["shapes"][way] for way in PRUNERS), report=True),
    Claim("in ridge regression the student's bias falls as the teacher sees more",
          lambda a: min(a["ridge"]["bias, teacher of 10%"] - a["ridge"]["bias, teacher of 30%"],
                        a["ridge"]["bias, teacher of 30%"] - a["ridge"]["bias, teacher of all"]), report=True),
]


@dataclass(frozen=True)
class Config:
    steps: int = 70_400  # optimiser steps of everything that is trained: 180 epochs of CIFAR at this batch
    batch: int = 128  # pictures a step
    prune: pruning.Way = "random"  # what decides which pictures are kept
    fraction: float = 0.1  # f, the part that is kept
    balanced: bool = False  # whether it is taken of every class alike
    keep: Literal["hardest", "easiest"] = "hardest"  # which end of el2n, grand and forgetting
    repeats: int = 10  # networks that a score is averaged over
    scoring: float = 0.1  # part of the steps in which networks are trained for a score, where it needs any
    hardest: float = 0.1  # beta of ccs: the part with the highest scores that is left out
    bins: int = 50  # strata of ccs
    teaching: float = 0.5  # part of the steps in which a teacher is trained, where none is given and alpha > 0
    alpha: float | None = None  # weight of the teacher's term, the labels have 1 - alpha; None: alpha(f)
    alpha_small: float = 1.0  # alpha(0)
    alpha_large: float = 0.5  # alpha(1)
    search: tuple[float, ...] = ()  # values of alpha of which the best on `validation` is taken; they share the steps
    temperature: float = 4.0  # tau
    cache: bool = False  # the teacher answers once for every kept picture, for sets that give the same view every time
    optimizer: Literal["sgd", "adamw"] = "sgd"  # SGD with momentum 0.9, or AdamW
    lr: float = 0.1  # peak learning rate; a cosine to 0
    warmup: float = 0.0  # part of the steps in which the learning rate rises
    weight_decay: float = 5e-4  # lambda
    view: float = 0.0  # strength of the random shifts, turns and light changes; 0: the view that the data set gives

    def __post_init__(self) -> None:
        check_training(self.steps, self.batch, self.lr, self.warmup, self.weight_decay)
        self.pruned(0)
        for name in ("alpha", "alpha_small", "alpha_large"):
            value = getattr(self, name)
            require(value is None or 0 <= value <= 1, f"{name} must lie in [0, 1], not {value}")
        require(all(0 <= a <= 1 for a in self.search), f"search is a list of alphas in [0, 1], not {self.search}")
        require(self.alpha_small >= self.alpha_large, "alpha falls as more is kept: alpha_small must not be below "
                f"alpha_large, got {self.alpha_small} and {self.alpha_large}")
        require(self.temperature > 0 and self.view >= 0, "temperature must be above 0 and view not negative, got "
                f"{self.temperature} and {self.view}")
        require(0 < self.scoring < 1 and 0 < self.teaching < 1, "scoring and teaching are parts of the steps, above 0 "
                f"and below 1, not {self.scoring} and {self.teaching}")
        require(not (self.cache and self.view), "answers are kept of one view alone: set view to 0, or cache to false")

    def pruned(self, steps: int) -> pruning.Config:
        """Settings of the choice, for which networks are trained `steps` in all."""
        return pruning.Config(self.prune, self.fraction, self.balanced, self.keep, self.repeats, steps, self.batch,
                              self.optimizer, self.lr, self.warmup, self.weight_decay, self.hardest, self.bins)


EMBEDDED = Config(steps=250, batch=32, repeats=2, scoring=0.3, optimizer="adamw", lr=0.01, warmup=0.05,
                  weight_decay=1e-4, view=1.0)


def alpha_of(fraction: float, small: float = 1.0, large: float = 0.5) -> float:
    """alpha(f) on the straight line from `small` where nothing is kept to `large` where all is."""
    return small + (large - small) * fraction


def distill(
    student: Classifier,
    labelled: LabelledImages,
    teacher: Classifier | None = None,
    network: Network | None = None,
    validation: LabelledImages | None = None,
    config: Config = Config(),
    run: Run | None = None,
) -> nn.Module:
    """Train the student in place on the part of `labelled` that is kept, with a teacher of all of it.

    `network` makes the networks that scores are averaged over (without it: copies of the student with new weights).
    With `search`, `validation` (labelled) decides which alpha is best.
    """
    run = begin(run)
    _check(student, labelled, teacher, network, validation, config, run)
    assert isinstance(student, nn.Module)
    alphas = config.search or (alpha_of(config.fraction, config.alpha_small, config.alpha_large)
                               if config.alpha is None else config.alpha,)
    make = network or pruning.fresh_copies(student)
    needed = max(alphas) > 0 or config.prune in pruning.FEATURES
    scoring = round(config.scoring * config.steps) if config.prune in pruning.TRAINED else 0
    teaching = round(config.teaching * config.steps) if teacher is None and needed else 0

    def view(x: Tensor) -> Tensor:
        return random_view(x, run, config.view) if config.view else x

    if teaching:
        teacher = taught_on_all(pruning.fresh_copies(student), labelled, teaching, config, run, view)
    kept = Kept(labelled, pruning.kept(labelled, make, teacher, config.pruned(scoring), run, view))
    left = config.steps - scoring - teaching
    start, best, kept_best = copy.deepcopy(student.state_dict()), -1.0, None
    for i, alpha in enumerate(alphas):
        with run.scope(f"alpha {i}") if config.search else run.scope("student"):
            student.load_state_dict(start)
            steps = left * (i + 1) // len(alphas) - left * i // len(alphas)
            train(student, kept, teacher, alpha, steps, config, run, view)
        if config.search:
            score = run.once(f"score of alpha {i}", lambda: accuracy(student, validation, device=run.device))
            run.say(f"alpha = {alpha:g}: {score:.2%} on the validation pictures")
            if score > best:
                best, kept_best = score, copy.deepcopy(student.state_dict())
    if kept_best is not None:
        student.load_state_dict(kept_best)
    return student


def train(student: nn.Module, kept: Kept, teacher: Any, alpha: float, steps: int, config: Config, run: Run,
          view: Callable[[Tensor], Tensor]) -> nn.Module:
    """The student's loss on what is kept. A term of weight 0 is not computed: alpha = 1 never reads a label and
    alpha = 0 never asks the teacher."""
    optimizer = optimizer_for(student.parameters(), config.optimizer, config.lr, config.weight_decay)
    student.train()
    with frozen(teacher):
        known = answers_on(kept, teacher, run) if config.cache and alpha > 0 else None
        for batch in run.loop("train", kept, batch=config.batch, steps=steps, student=student, optimizer=optimizer,
                              drop_last=len(kept) >= config.batch):
            set_lr(optimizer, config.lr * warmup_cosine(run.progress, config.warmup))
            x = view(batch["image"])
            logits, terms = student(x), {}
            if alpha > 0:
                with torch.no_grad():
                    target = teacher(x) if known is None else known[batch["index"]]
                terms["kd"] = alpha * kl(target, logits, config.temperature)
            if alpha < 1:
                terms["ce"] = (1 - alpha) * F.cross_entropy(logits, batch["label"])
            run.update(optimizer, clip=None, **terms)
    return student


def answers_on(kept: Kept, teacher: Any, run: Run) -> Float[Tensor, "n classes"]:
    """The teacher's logits for every kept picture, in a table by the index in the whole set."""

    def ask() -> Tensor:
        parts = [kept.positions[i : i + 256] for i in range(0, len(kept), 256)]
        with torch.no_grad():
            said = torch.cat([teacher(fetch(kept.data_set, part.tolist())["image"].to(run.device)) for part in parts])
        return torch.zeros(len(kept.data_set), said.shape[1], device=said.device).index_copy(
            0, kept.positions.to(said.device), said)

    return run.once("answers", ask)


def taught_on_all(make: Callable[[], nn.Module], labelled: Any, steps: int, config: Config, run: Run,
                  view: Callable[[Tensor], Tensor]) -> nn.Module:
    """A teacher of the student's architecture, trained on all the labels."""
    with run.scope("teacher"):
        settings = supervised.Config(steps, config.batch, config.optimizer, config.lr, config.warmup,
                                     config.weight_decay)
        return supervised.train(make().to(run.device), labelled, settings, run, view)


def _check(student: Any, labelled: Any, teacher: Any, network: Any, validation: Any, config: Config, run: Run) -> None:
    run.check(Classifier, labelled, labels=True, teacher=teacher, student=student,
              network=network() if network else None)
    require(round(config.fraction * len(labelled)) >= 1, f"a fraction of {config.fraction} keeps none of "
            f"{len(labelled)} pictures; raise it", DataError)
    require(len(labelled) == len(column(labelled, "label")), "every picture needs a label", DataError)
    require(validation is not None or not config.search, "search compares the alphas on labelled pictures: give "
            "validation", ConfigError)
    if validation is not None:
        run.check(Classifier, validation, labels=True, student=student)


def tiny() -> dict[str, Any]:
    torch.manual_seed(0)

    def network() -> nn.Module:
        return nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(108, 4))

    labelled = TensorSet(image=torch.rand(20, 1, 8, 8), label=torch.arange(20) % 4)
    validation = TensorSet(image=torch.rand(6, 1, 8, 8), label=torch.arange(6) % 4)
    config = Config(steps=12, batch=6, prune="forgetting", fraction=0.5, repeats=2, scoring=0.3, teaching=0.2,
                    search=(0.5, 1.0), view=1.0)
    return {"student": network(), "labelled": labelled, "network": network, "validation": validation, "config": config}


# -------------------------------------------------------------------- the embedded experiment


WRONG = 0.1
TEACHER = supervised.Config(steps=600, batch=64, optimizer="adamw", lr=0.01, weight_decay=1e-4)


def ground() -> dict[str, Any]:
    """1,200 digits of 16 pixels and 1,200 shapes in 12 classes, a tenth of them wrongly labelled; 597 and 600 to test.
    """
    clean, shapes = digits(16, "train"), shape_pairs(1800)
    return {"digits": noisy_labels(clean, WRONG), "digits, right": clean, "digits, test": digits(16, "test"),
            "shapes": noisy_labels(shapes.select(range(1200)), WRONG), "shapes, test": shapes.select(range(1200, 1800))}


def experiment(run: Run) -> dict[str, dict[str, float]]:
    """Accuracy on the test pictures, which are labelled rightly; every student of the same architecture, initial
    weights, steps (those of networks for a score not counted), batch and views."""
    g = ground()
    taught: dict[tuple[str, int, int], nn.Module] = {}

    def network(data: str, width: int = 16) -> nn.Module:
        options: dict[str, Any] = {"channels_in": 3, "classes": 12} if data.startswith("shapes") else {}
        return TinyConvNet(width=width, **options).to(run.device)

    def view(x: Tensor) -> Tensor:
        return random_view(x, run, EMBEDDED.view)

    def teacher(data: str = "digits", width: int = 16, steps: int = TEACHER.steps) -> nn.Module:
        """A network trained once on all of the data, with the labels as they are."""
        key = data, width, steps
        if key not in taught:
            with run.scope(f"teacher {data} {width} {steps}"):
                taught[key] = supervised.train(network(data, width), g[data], dataclasses.replace(TEACHER, steps=steps),
                                               run, view)
        return taught[key]

    def scored(model: nn.Module, data: str = "digits") -> float:
        return accuracy(model, g[f"{data.partition(',')[0]}, test"], device=run.device)

    def student(f: float, alpha: float | None, way: pruning.Way = "random", data: str = "digits",
                by: Callable[[], nn.Module] | None = None, scope: str = "", **changes: Any) -> float:
        whole = EMBEDDED.steps / (1 - EMBEDDED.scoring) if way in pruning.TRAINED else EMBEDDED.steps
        config = dataclasses.replace(EMBEDDED, steps=round(whole), prune=way, fraction=f, alpha=alpha, **changes)
        guide = by() if by else teacher(data)
        run.begin()
        learner = network(data)
        with run.scope(scope or way):
            return scored(distill(learner, g[data], guide, lambda: network(data), config=config, run=run), data)

    def ways(f: float, alpha: float | None, data: str = "digits", among: tuple[pruning.Way, ...] = PRUNERS
             ) -> Callable[[], dict[str, float]]:
        return lambda: {way: student(f, alpha, way, data) for way in among}

    def by_schedule(f: float) -> dict[str, float]:
        return {"random": student(f, None)}

    def others(alpha: float) -> dict[str, float]:
        found: dict[str, float] = {way: student(0.05, alpha, way) for way in OTHERS}
        return {**found, "easiest": student(0.05, alpha, "el2n", keep="easiest"),
                "random of every class": student(0.05, alpha, balanced=True)}

    def right_labels() -> dict[str, float]:
        """Which alpha is best under right labels and a teacher that was trained a sixth as long."""
        found: dict[str, float] = {}
        for f in (0.05, 0.5):
            by = {alpha: student(f, alpha, data="digits, right", scope=f"{f} {alpha}",
                                 by=lambda: teacher("digits, right", steps=TEACHER.steps // 6))
                  for alpha in (0.0, 0.5, 1.0)}
            found |= {f"alpha {alpha:g}, {f:.0%}": score for alpha, score in by.items()}
            found[f"best alpha, {f:.0%}"] = max(by, key=by.__getitem__)
        return found

    def teachers() -> dict[str, float]:
        found: dict[str, float] = {}
        for width in (8, 24):
            found[f"width {width}"] = scored(teacher(width=width))
            for f in (0.05, 0.3):
                found[f"width {width}, {f:.0%}"] = student(f, 1.0, by=partial(teacher, width=width),
                                                           scope=f"width {width} {f}")
        return found

    def shown() -> dict[str, float]:
        """The hardest digits by EL2N, and the accuracy of their labels."""
        scores = pruning.trained_score(g["digits"], lambda: network("digits"), EMBEDDED.pruned(107), run, view)
        hardest = scores.argsort(descending=True)[:60]
        run.picture("the hardest twentieth of the training digits", g["digits"].image[hardest], columns=12)
        right = g["digits"].label == g["digits"].clean
        return {"labels right": right[hardest].double().mean().item()}

    return run.arms(
        {"all": lambda: {"accuracy": student(1.0, 0.0), "teacher": scored(teacher())},
         **{f"{f:.0%}": ways(f, 0.0) for f in FRACTIONS},
         **{f"{f:.0%}, kd": ways(f, 1.0) for f in FRACTIONS}},
        extended={
            **{f"{f:.0%}, alpha(f)": partial(by_schedule, f) for f in FRACTIONS},
            "other ways": lambda: others(0.0), "other ways, kd": lambda: others(1.0),
            "right labels": right_labels, "teachers": teachers, "hardest": shown,
            "shapes": ways(0.1, 0.0, "shapes"), "shapes, kd": ways(0.1, 1.0, "shapes", PRUNERS[:1]), "ridge": ridge})


def ridge() -> dict[str, float]:
    """Ridge regression on 64 pixels: bias and noise of a student of a tenth of the digits, by what its teacher saw."""
    x = digits(8, "train").image.flatten(1).double()
    x = x - x.mean(0)
    theta = torch.randn(64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    kept = torch.arange(0, 1200, 10)
    found = {}
    for name, seen in (("10%", kept), ("30%", torch.arange(1200)[torch.arange(1200) % 10 < 3]),
                       ("all", torch.arange(1200))):
        found[f"bias, teacher of {name}"], _ = ridge_student_errors(x, kept, seen, theta, 10.0, 1.0, noise=1.0)
    for alpha in (0.0, 0.5, 1.0):
        _, found[f"noise, alpha = {alpha:g}"] = ridge_student_errors(x, kept, seen, theta, 10.0, alpha, noise=1.0)
    return found
