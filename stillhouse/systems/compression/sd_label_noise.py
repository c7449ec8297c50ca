"""Self-distillation under label noise: a network trained on wrong labels is distilled into one of its own kind, which
is pulled towards the teacher and, with xi above 1, pushed away from the labels.

    L = xi l(teacher's prediction, student's) + (1 - xi) l(given label, student's) + the teacher's own l2 penalty,

any real xi. For cross-entropy this is one loss, -sum_c (xi p_T,c + (1 - xi) y_c) log p_S,c, whose target adds up to 1
and has negative entries where xi > 1; its gradient in the logits is p_S - target for every xi.

For ridge regression (`stillhouse.measures.ridge`) the student is theta_S = theta_T - xi lambda A^{-1} theta_T. With
the singular values s_i of X, a_i = v_i . theta*, c_i = lambda / (s_i^2 + lambda), r_i = 1 - c_i and
v_i = gamma^2 s_i^2 / (s_i^2 + lambda)^2, gamma^2 being the variance of the noise, E||theta_S - theta*||^2 is least at

    xi* = sum_i c_i (v_i - r_i c_i a_i^2) / sum_i c_i^2 (v_i + r_i^2 a_i^2),

which is not above 0 without noise and exceeds 1 in much noise (`optimal_xi`, `noise_of_anti_learning`).

`distill` trains the teacher, a student for every xi, and returns the student that is best on validation pictures:
whole networks, or (trained="head") softmax regression on the features of a pretrained network, solved to its optimum.

Das and Sanghavi 2023, "Understanding Self-Distillation in the Presence of Label Noise". Deviation: biases of a head are
not penalised.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from stillhouse.data.digits import digits
from stillhouse.data.sets import TensorSet, column
from stillhouse.data.variants import noisy_labels, noisy_split
from stillhouse.errors import RoleError, require
from stillhouse.evaluate.claims import Claim
from stillhouse.evaluate.classification import accuracy
from stillhouse.evaluate.draws import mean_over_draws
from stillhouse.evaluate.probes import extract
from stillhouse.measures.ridge import (
    best_ridge,
    best_self_distillation,
    expected_error,
    noise_of_anti_learning,
    optimal_xi,
    ridge_problem,
    ridge_teacher,
    self_distilled,
)
from stillhouse.models.convnets import TinyConvNet
from stillhouse.parts.heads import last_linear, replace_head
from stillhouse.protocols import Classifier, LabelledImages, Network
from stillhouse.recipes import mixed_targets
from stillhouse.recipes.softmax_regression import Solution, softmax_regression
from stillhouse.run import Run, begin

NUMBER = 138
FLIPS = (0.1, 0.2, 0.3, 0.4, 0.45)
ABOVE = (1.25, 1.5, 2.0)


def _order(what: str, high: str, low: str) -> Callable[[Any], float]:
    return lambda a: a[f"{what}, {high}"]["accuracy"] - a[f"{what}, {low}"]["accuracy"]


def _near(arm: str) -> Callable[[Any], float]:
    return lambda a: 0.1 - abs(a[arm]["best xi simulated"] - a[arm]["xi*"])


def _corrected(arm: str) -> Callable[[Any], float]:
    return lambda a: a[arm]["student, training"] - a[arm]["teacher, training"]


CLAIMS = [
    *(Claim(f"ridge, {noise} noise: the best xi of the simulation is within 0.1 of xi*", _near(f"ridge, {noise} noise"))
      for noise in ("low", "middle", "high")),
    Claim("ridge, high noise: xi* is above 1", lambda a: a["ridge, high noise"]["xi*"] - 1),
    Claim("ridge, high noise: the error at xi* is below that at 1, and that below the teacher's",
          lambda a: min(a["ridge, high noise"][f"error, xi {high}"] - a["ridge, high noise"][f"error, xi {low}"]
                        for high, low in (("1", "*"), ("0", "1")))),
    *(Claim(f"{share} % wrong labels: {high} beats {low}", _order(f"{share} % wrong", high, low))
      for share in (50, 30) for high, low in (("xi above 1", "xi 1"), ("xi 1", "xi 0"))),
    *(Claim(f"binary, {p:.0%} flipped: the student is right more often than its teacher", _corrected(f"flipped {p:g}"))
      for p in FLIPS[1:]),
    Claim("binary, 10 % flipped: it is not",
          lambda a: 0.005 - _corrected("flipped 0.1")(a)),
    Claim("where theta* lies in strong directions, self-distillation with its best lambda beats ridge with its own",
          lambda a: a["ridge, strong directions"]["error, best lambda"]
          - 1.001 * a["ridge, strong directions"]["error, best lambda and xi"], report=True),
    Claim("a teacher with ten times the l2 penalty leaves xi above 1 less to gain",
          lambda a: _order("50 % wrong", "xi above 1", "xi 0")(a)
          - _order("50 % wrong, l2 0.01", "xi above 1", "xi 0")(a), report=True),
    Claim("with that penalty xi above 1 beats xi = 1", _order("50 % wrong, l2 0.01", "xi above 1", "xi 1"),
          report=True),
    Claim("30 % of the labels confused with a similar digit: xi above 1 beats xi = 1",
          _order("30 % confused", "xi above 1", "xi 1"), report=True),
    Claim("with right labels xi above 1 beats xi = 0", _order("right labels", "xi above 1", "xi 0"), report=True),
    Claim("small networks, 50 % wrong labels: xi above 1 beats xi = 1",
          _order("networks, 50 % wrong", "xi above 1", "xi 1"), report=True),
]


@dataclass(frozen=True)
class Config:
    steps: int = 4000  # in all, shared evenly by teacher and students: optimiser steps, or iterations for heads
    batch: int = 128  # pictures a step; heads take all pictures at once
    xi: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5)  # weights of the teacher; the best is chosen
    trained: Literal["all", "head"] = "all"  # whole networks; the paper: the last linear layer on fixed features
    weight_decay: float = 1e-3  # lambda: the penalty is lambda/2 ||W||^2 (AdamW: decay)
    optimizer: Literal["adam", "sgd", "adamw"] = "sgd"  # of whole networks
    lr: float = 0.01  # peak learning rate of whole networks
    schedule: Literal["cosine", "constant"] = "cosine"  # of it
    warmup: float = 0.05  # part of a training in which it rises
    early_stopping: bool = False  # keep each whole network's weights of the highest validation accuracy

    def __post_init__(self) -> None:
        self.training(0)
        require(len(self.xi) >= 1 and all(map(math.isfinite, self.xi)), f"xi is at least one finite number, not "
                f"{self.xi}")
        require(len(set(self.xi)) == len(self.xi), f"xi names a weight twice: {self.xi}")
        require(self.trained in ("all", "head"), f"trained is 'all' or 'head', not {self.trained!r}")
        require(self.weight_decay > 0 or (self.trained == "all" and max(self.xi) <= 1), "with xi above 1 the loss has "
                "no lower bound, and a head may have its optimum at infinity: give a weight_decay above 0")

    @property
    def share(self) -> int:
        """The steps of each of the teacher and the students."""
        return self.steps // (1 + len(self.xi))

    def training(self, steps: int) -> mixed_targets.Config:
        return mixed_targets.Config(steps, self.batch, self.optimizer, self.lr, self.schedule, self.warmup,
                                    self.weight_decay)


EMBEDDED = Config(steps=4000, batch=64, xi=ABOVE, trained="head", optimizer="adamw", lr=0.02)


def distill(
    network: Network,
    labelled: LabelledImages,
    validation: LabelledImages | None = None,
    config: Config = Config(),
    run: Run | None = None,
) -> nn.Module:
    """The student whose xi is best on `validation`, which one xi alone does not need.

    Its attributes: `xi`, `scores` (validation accuracy by xi) and `teacher`. With trained="head" `network` gives a
    network with pretrained features, the same at every call, whose last linear layer is fitted.
    """
    run = begin(run)
    require(validation is not None or (len(config.xi) == 1 and not config.early_stopping), "the choice among several "
            "xi, and early stopping, need validation pictures with labels; give validation, or one xi", RoleError)
    check_roles(network, labelled, validation, config, run)
    train = heads if config.trained == "head" else networks
    teacher, students = train(network, labelled, validation, config, run)
    scores = {}
    if validation is not None:
        scores = {xi: accuracy(student, validation, device=run.device) for xi, student in students.items()}
        run.say("validation accuracy by xi: " + ", ".join(f"{xi:g}: {score:.3f}" for xi, score in scores.items()))
    xi = max(scores, key=scores.__getitem__) if scores else config.xi[0]
    run.log(xi=xi)
    students[xi].__dict__.update(xi=xi, scores=scores, teacher=teacher)
    return students[xi]


Trained = tuple[nn.Module, dict[float, nn.Module]]


def networks(network: Network, labelled: Any, validation: Any, config: Config, run: Run) -> Trained:
    """Whole networks: a teacher on the labels, then from another start a student for every xi, all on the same
    batches."""
    training, held = config.training(config.share), validation if config.early_stopping else None
    with run.scope("teacher"):
        teacher = mixed_targets.train("train", network().to(run.device), labelled, None, 0.0, training, run,
                                      validation=held)
    with run.scope("students"):
        fresh = network().to(run.device)
        students = [copy.deepcopy(fresh) for _ in config.xi]
        mixed_targets.train_together("train", students, labelled, teacher, config.xi, training, run, validation=held)
    return teacher, dict(zip(config.xi, students, strict=True))


def heads(network: Network, labelled: Any, validation: Any, config: Config, run: Run) -> Trained:
    """Softmax regression on the features before the last linear layer, which are computed once."""
    model = network().to(run.device)
    encoder, _ = replace_head(model)
    classes = last_linear(model)[1].out_features

    def fit() -> list[dict[str, Tensor]]:
        features, label = extract(encoder, labelled, device=run.device).double(), column(labelled, "label").cpu()

        def solve(logits: Tensor | None, xi: float, start: Solution | None) -> Solution:
            target = mixed_targets.mixed_target(label, logits, xi, classes)
            return softmax_regression(features, target, config.weight_decay, max(1, config.share), start)

        teacher = solve(None, 0.0, None)
        logits = teacher.logits(features)
        found = [teacher, *(solve(logits, xi, teacher) for xi in config.xi)]
        return [{"weight": one.weight, "bias": one.bias} for one in found]

    made = []
    for solution in run.once("heads", fit):
        made.append(copy.deepcopy(model))
        with torch.no_grad():
            for name, value in last_linear(made[-1])[1].named_parameters():
                value.copy_(solution[name])
    return made[0], dict(zip(config.xi, made[1:], strict=True))


def check_roles(network: Network, labelled: LabelledImages, validation: LabelledImages | None, config: Config,
                run: Run) -> None:
    """Refuse pictures that the networks cannot read, labels that they have no class for, and heads that are none."""
    fresh = network().to(run.device)
    image = run.check(Classifier, labelled, labels=True, network=fresh)["image"]
    if validation is not None:
        run.check(Classifier, validation, labels=True, network=fresh)
    if config.trained == "head":
        _, head = last_linear(fresh)
        encoder, _ = replace_head(fresh)
        with torch.no_grad():
            same = head(encoder.eval()(image).flatten(1)), fresh.eval()(image)
        require(head.bias is not None and torch.allclose(*same, atol=1e-4), f"the last linear layer of "
                f"{type(fresh).__name__} does not give its logits; train whole networks with trained='all'", RoleError)


def tiny() -> dict[str, Any]:
    torch.manual_seed(0)
    data = TensorSet(image=torch.randn(20, 1, 4, 4), label=torch.arange(20) % 3)
    return {"network": lambda: nn.Sequential(nn.Flatten(), nn.Linear(16, 4), nn.ReLU(), nn.Linear(4, 3)),
            "labelled": data, "validation": data.select(range(8)),
            "config": Config(steps=15, batch=8, xi=(0.5, 1.5), trained="all", early_stopping=True)}


# -------------------------------------------------------------------- the embedded experiment


def ridge(run: Run, times: float, draws: int = 2000, lam: float = 20.0, strong: bool = False) -> dict[str, float]:
    """Ridge with d = 20 and n = 60, `draws` draws of the noise, whose variance is `times` that at which xi* is 1: the
    best xi of a grid, xi*, and the errors of tuned ridge and of tuned self-distillation. `strong`: theta* lies in the
    directions in which X is large."""
    generator = torch.Generator().manual_seed(run.seed)
    x = torch.randn(60, 20, generator=generator).double()
    theta = torch.randn(20, generator=generator).double() * torch.linspace(2, 0.2, 20).double()
    if strong:
        x, theta = x * torch.linspace(2, 0.2, 20).double(), theta * (torch.arange(20) < 6)
    problem = ridge_problem(x, theta)
    noise = times * noise_of_anti_learning(problem, lam)
    y = (x @ theta)[:, None] + noise**0.5 * torch.randn(60, draws, generator=generator).double()
    teachers = ridge_teacher(x, y, lam)
    grid = torch.arange(-80, 121) / 20
    simulated = torch.stack([(self_distilled(x, teachers, lam, float(xi)) - theta[:, None]).square().sum(0).mean()
                             for xi in grid])
    best = float(optimal_xi(problem, lam, noise))
    lambdas = torch.logspace(-2, 5, 1401, dtype=torch.float64)
    tuned, both = best_ridge(problem, noise, lambdas), best_self_distillation(problem, noise, lambdas)
    run.picture("error by xi", curve(grid, simulated, expected_error(problem, lam, noise, grid), best))
    return {"xi*": best, "best xi simulated": float(grid[simulated.argmin()]),
            **{f"error, xi {name}": float(simulated[(grid - xi).abs().argmin()])
               for name, xi in (("0", 0.0), ("1", 1.0), ("*", best))},
            "error, best lambda": tuned.error, "error, best lambda and xi": both.error}


def linear_network(classes: int = 10) -> nn.Module:
    """Pixels and a linear layer."""
    return nn.Sequential(nn.Flatten(), nn.Linear(64, classes))


def over_draws(measure: Callable[..., dict[str, float]], run: Run, draws: int, *given: Any, **options: Any
               ) -> dict[str, float]:
    return mean_over_draws(lambda seed: measure(run, seed, *given, **options), draws, run)


def splits(seed: int, noise: float, into: tuple[int, ...] | None = None) -> tuple[TensorSet, TensorSet, TensorSet]:
    """600 digits of 8 pixels in [0, 1] with wrong labels, 200 clean ones to validate, 597 to test."""
    pool, test = (part.with_fields(image=(part.image + 1) / 2) for part in (digits(8, "train"), digits(8, "test")))
    return *noisy_split(pool, 600, 200, noise, seed, into), test


CONFUSED = (6, 7, 3, 8, 9, 3, 0, 1, 3, 4)
"""For each digit one that it is easily taken for: structured noise."""


def softmax_digits(run: Run, seed: int, noise: float, xi: tuple[float, ...], l2: float = 1e-3,
                   into: tuple[int, ...] | None = None) -> dict[str, float]:
    """Softmax regression on pixels; test accuracy of the student, of its teacher and the xi that was chosen."""
    labelled, validation, test = splits(seed, noise, into)
    config = dataclasses.replace(EMBEDDED, xi=xi, weight_decay=l2, steps=500 * (1 + len(xi)))
    student: Any = distill(linear_network, labelled, validation, config, run)
    return {"accuracy": accuracy(student, test), "teacher": accuracy(student.teacher, test), "xi": student.xi}


def flipped(run: Run, seed: int, share: float, l2: float = 0.02) -> dict[str, float]:
    """Threes against eights, a share of the labels flipped: accuracy of teacher and student (xi = 1) on the training
    pictures with their true labels, and on test pictures. l2/2 ||W||^2 on the two rows of W is l2/4 ||w||^2 on their
    difference."""
    whole, test = (binary(part) for part in (digits(8, "train"), digits(8, "test")))
    labelled = noisy_labels(whole, share, seed)
    config = dataclasses.replace(EMBEDDED, xi=(1.0,), weight_decay=l2, steps=1000)
    student: Any = distill(lambda: linear_network(2), labelled, None, config, run)
    return {f"{name}, {where}": accuracy(model, part) for name, model in (("student", student),
                                                                          ("teacher", student.teacher))
            for where, part in (("training", whole), ("test", test))}


def binary(data: TensorSet, first: int = 3, second: int = 8) -> TensorSet:
    """The pictures of two classes, in [0, 1]; the label says whether it is the second."""
    part = data.select(((data.label == first) | (data.label == second)).nonzero().flatten())
    return part.with_fields(image=(part.image + 1) / 2, label=(part.label == second).long())


def whole_networks(run: Run, seed: int, noise: float, xi: tuple[float, ...]) -> dict[str, float]:
    """Small convolutional networks under the same noise."""
    labelled, validation, test = splits(seed, noise)
    config = dataclasses.replace(EMBEDDED, trained="all", xi=xi, steps=250 * (1 + len(xi)))
    student: Any = distill(TinyConvNet, labelled, validation, config, run)
    return {"accuracy": accuracy(student, test, device=run.device),
            "teacher": accuracy(student.teacher, test, device=run.device), "xi": student.xi}


def experiment(run: Run) -> dict[str, dict[str, float]]:
    """Simulated ridge; softmax regression on digits, to convergence; logistic regression with flipped labels."""

    part = functools.partial

    def row(what: str, draws: int, measure: Callable[..., dict[str, float]], noise: float, **options: Any
            ) -> dict[str, Callable[[], dict[str, float]]]:
        names = {"xi 0": (0.0,), "xi 1": (1.0,), "xi above 1": ABOVE}
        return {f"{what}, {name}": part(over_draws, measure, run, draws, noise, xi, **options)
                for name, xi in names.items()}

    return run.arms(
        {**{f"ridge, {name} noise": part(ridge, run, times)
            for name, times in (("low", 0.1), ("middle", 0.5), ("high", 4.0))},
         **row("50 % wrong", 3, softmax_digits, 0.5), **row("30 % wrong", 3, softmax_digits, 0.3),
         **{f"flipped {p:g}": part(over_draws, flipped, run, 6, p) for p in FLIPS}},
        extended={"ridge, strong directions": part(ridge, run, 0.5, strong=True),
                  "50 % wrong, xi 0.5": part(over_draws, softmax_digits, run, 3, 0.5, (0.5,)),
                  **row("50 % wrong, l2 0.01", 1, softmax_digits, 0.5, l2=1e-2),
                  **row("30 % confused", 1, softmax_digits, 0.3, into=CONFUSED),
                  **row("right labels", 1, softmax_digits, 0.0),
                  **row("networks, 50 % wrong", 1, whole_networks, 0.5)})


def curve(grid: Tensor, simulated: Tensor, expected: Tensor, best: float) -> Any:
    """A figure of the simulated and the expected error by xi, with xi*."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 3.5))
    axes = figure.add_subplot()
    axes.plot(grid.tolist(), simulated.tolist(), label="simulated")
    axes.plot(grid.tolist(), expected.tolist(), "k--", label="closed form")
    axes.axvline(best, color="0.5", label="xi*")
    axes.set(xlabel="xi, the weight of the teacher", ylabel="error of theta")
    axes.legend()
    return figure
