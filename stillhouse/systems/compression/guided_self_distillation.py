"""Guided self-distillation: a network is distilled into fresh networks of its own kind, round after round, and the
labels keep a part of the say.

In kernel ridge regression everything is known in closed form (`stillhouse.measures.ridge`; `ridge_rounds` is the
method for a kernel problem, `ridge_limit` its end, `optimal_alpha` its weight). With y^(0) = y, round t solves

    min_f alpha/2 ||f(X) - y||^2 + (1 - alpha)/2 ||f(X) - y^(t-1)||^2 + lambda/2 ||f||^2,

    y^(t) = S (alpha y + (1 - alpha) y^(t-1)),   S = K (K + lambda I)^{-1},   y^(inf) = K (K + lambda/alpha I)^{-1} y.

alpha = 0 ends at the zero function, alpha > 0 at plain ridge with a larger lambda. Predictions are affine in alpha,
f_alpha = alpha f_y + (1 - alpha) f_d, where f_y learned from y and f_d from y^(t-1). Best on held-out (x, y) is

    alpha* = <y - f_d, f_y - f_d> / ||f_y - f_d||^2.

For networks (`distill`) the loss is the squared error between softmax(z) and alpha y + (1 - alpha) softmax(z^(t-1)),
with an l2 penalty. The first network, trained on y, is f_y; one network trained on the last round's outputs alone is
f_d; the formula on validation pictures gives alpha, with which the student of the round is trained.

Borup and Andersen 2021, "Even your Teacher Needs Guidance". Deviations: the squared error is taken to the mixed target,
which has the gradients of the two weighted errors; the released code penalises the norms of the weights, not their
squares; learning rates may fall along a cosine."""

from __future__ import annotations

import copy
import dataclasses
import functools
import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stillhouse.data.digits import digits
from stillhouse.data.sets import TensorSet
from stillhouse.data.variants import noisy_split
from stillhouse.errors import RoleError, require
from stillhouse.evaluate.claims import Claim
from stillhouse.evaluate.classification import accuracy, predictions
from stillhouse.evaluate.draws import mean_over_draws
from stillhouse.measures.ridge import (
    Rounds,
    kernel_matrix,
    optimal_alpha,
    ridge_limit,
    ridge_rounds,
    ridge_rounds_with_optimal_alpha,
    ridge_spectrum,
)
from stillhouse.models.convnets import TinyConvNet
from stillhouse.protocols import Classifier, LabelledImages, Network
from stillhouse.recipes import mixed_targets
from stillhouse.recipes.generations import generations
from stillhouse.run import Run, begin

NUMBER = 90
GRID = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
FIXED = (0.0, 0.25, 0.5)
DRAWS = 3

CLAIMS = [
    Claim("on the sinusoid, labels of weight 0.25 give less error at round 6 than none",
          lambda a: a["sinusoid, alpha 0"]["round 6"] - a["sinusoid, alpha 0.25"]["round 6"]),
    Claim("the limit in closed form is within 1 % of 40 rounds",
          lambda a: 0.01 - abs(a["sinusoid, alpha 0.25"]["limit"] / a["sinusoid, alpha 0.25"]["round 40"] - 1)),
    Claim("without labels the rounds end at the zero function",
          lambda a: 1e-9 - abs(a["sinusoid, alpha 0"]["limit"] - a["sinusoid, alpha 0"]["zero function"])),
    Claim("on digits with wrong labels, alpha* gives less error at round 2 than every fixed alpha",
          lambda a: min(a[f"kernel, alpha {x:g}"]["error, round 2"] for x in FIXED)
          - a["kernel, alpha*"]["error, round 2"]),
    Claim("and less error at round 10 than alpha = 0",
          lambda a: a["kernel, alpha 0"]["error, round 10"] - a["kernel, alpha*"]["error, round 10"]),
    Claim("and a higher accuracy than round 1",
          lambda a: a["kernel, alpha*"]["accuracy, round 10"] - a["kernel, round 1"]["accuracy, round 1"]),
    Claim("the alpha estimated from two networks is within 0.2 of the best of a grid of six",
          lambda a: 0.2 - abs(a["networks, estimate"]["alpha"] - a["networks, grid"]["alpha"]) + 1e-9),
    Claim("and is found in less than half of the grid's time",
          lambda a: a["networks, grid"]["seconds"] / 2 - a["networks, estimate"]["seconds"]),
    Claim("its student is within 5 % of the best error of the grid",
          lambda a: 1.05 * a["networks, grid"]["validation error"] - a["networks, estimate"]["validation error"],
          report=True),
    Claim("its student is more accurate than the network trained on labels",
          lambda a: a["networks, estimate"]["test accuracy"] - a["networks, labels"]["test accuracy"], report=True),
    Claim("after four rounds without labels, the fourth network is more accurate than the first",
          lambda a: a["networks, 4 rounds, alpha 0"]["test accuracy"] - a["networks, labels"]["test accuracy"],
          report=True),
    Claim("and with labels of weight 0.4",
          lambda a: a["networks, 4 rounds, alpha 0.4"]["test accuracy"] - a["networks, labels"]["test accuracy"],
          report=True),
    Claim("the estimate gives right labels more weight than wrong ones",
          lambda a: a["right labels, estimate"]["alpha"] - a["networks, estimate"]["alpha"], report=True),
]


@dataclass(frozen=True)
class Config:
    steps: int = 2_109_375  # optimiser steps in all, shared evenly: 9 networks of 75 epochs of 50,000 pictures
    batch: int = 16  # pictures a step
    rounds: int = 5  # networks in a row, the first on labels alone
    alpha: tuple[float, ...] | None = None  # weights of the labels from round 2 on (the last goes on); None: estimated
    optimizer: Literal["adam", "sgd", "adamw"] = "adam"  # with lambda/2 ||theta||^2 in the loss; AdamW decays instead
    lr: float = 1e-4  # learning rate
    schedule: Literal["cosine", "constant"] = "constant"  # of the learning rate
    warmup: float = 0.0  # part of a round in which it rises
    weight_decay: float = 1e-4  # lambda
    loss: Literal["ce", "squared"] = "squared"  # cross-entropy, or the squared error of probabilities

    def __post_init__(self) -> None:
        mixed_targets.Config(**{f.name: getattr(self, f.name) for f in dataclasses.fields(mixed_targets.Config)})
        require(self.rounds >= 1, f"rounds must be 1 or more, not {self.rounds}")
        require(self.alpha is None or (len(self.alpha) >= 1 and all(map(math.isfinite, self.alpha))),
                f"alpha is None or at least one finite number, not {self.alpha}")

    @property
    def networks(self) -> int:
        """How many networks are trained in all."""
        return 1 + (self.rounds - 1) * (2 if self.alpha is None else 1)


EMBEDDED = Config(steps=900, batch=64, rounds=2, lr=0.01, schedule="cosine", warmup=0.05, weight_decay=1e-4)



def distill(
    network: Network,
    labelled: LabelledImages,
    validation: LabelledImages | None = None,
    config: Config = Config(),
    run: Run | None = None,
) -> nn.Module:
    """The network of the last round, fresh in every round; `validation` is needed where alpha is estimated.

    Its attribute `alphas` holds the weights of the labels that the rounds had.
    """
    run = begin(run)
    estimated = config.alpha is None and config.rounds > 1
    require(validation is not None or not estimated, "alpha is estimated on validation pictures with labels; give "
            "validation, or alpha (a number for each round from the second)", RoleError)
    check_roles(network, labelled, validation, run)
    first: list[nn.Module] = []
    alphas: list[float] = []
    training = shares(config)

    def lesson(student: nn.Module, before: nn.Module | None, k: int) -> nn.Module:
        if before is None:
            first.append(mixed_targets.train("train", student, labelled, None, 0.0, next(training), run))
            return student
        if config.alpha is None:
            alphas.append(estimate(first[0], before, network, labelled, validation, next(training), run))
        else:
            alphas.append(config.alpha[min(k, len(config.alpha)) - 1])
        run.say(f"round {k + 1}: the labels have the weight alpha = {alphas[-1]:.3g}")
        return mixed_targets.train("train", student, labelled, before, 1 - alphas[-1], next(training), run)

    student = generations(network, lesson, config.rounds - 1, run)[-1]
    student.__dict__["alphas"] = tuple(alphas)
    return student


def check_roles(network: Network, labelled: LabelledImages, validation: LabelledImages | None, run: Run) -> None:
    """Refuse pictures that the networks cannot read, and labels that they have no class for."""
    fresh = network().to(run.device)
    for given in (labelled, validation):
        if given is not None:
            run.check(Classifier, given, labels=True, network=fresh)


def shares(config: Config) -> Iterator[mixed_targets.Config]:
    """How each network is trained: an even share of the steps."""
    names = ("batch", "optimizer", "lr", "schedule", "warmup", "weight_decay", "loss")
    same = {name: getattr(config, name) for name in names}
    ends = [config.steps * i // config.networks for i in range(config.networks + 1)]
    return (mixed_targets.Config(high - low, **same) for low, high in itertools.pairwise(ends))


def estimate(f_y: nn.Module, before: nn.Module, network: Network, labelled: LabelledImages, validation: Any,
             training: mixed_targets.Config, run: Run) -> float:
    """alpha of the round after `before`: a fresh network f_d learns from its outputs alone, and alpha* is that of f_y
    and f_d on validation pictures, the outputs taken as affine in alpha."""
    fresh = network().to(run.device)
    f_d = mixed_targets.train("without labels", fresh, labelled, before, 1.0, training, run)
    (p_y, target), (p_d, _) = (probabilities(f, validation, run) for f in (f_y, f_d))
    alpha = float(optimal_alpha(target, p_y, p_d))
    run.log(alpha=alpha)
    return alpha


def probabilities(model: nn.Module, data: Any, run: Run) -> tuple[Tensor, Tensor]:
    """softmax(z) and the one-hot labels of a set."""
    logits, label = predictions(model, data, device=run.device)
    return logits.softmax(-1), F.one_hot(label, logits.shape[-1]).to(logits.dtype)


def grid_search(
    network: Network, labelled: LabelledImages, validation: LabelledImages, config: Config = Config(),
    run: Run | None = None, grid: Sequence[float] = GRID,
) -> tuple[nn.Module, dict[float, float]]:
    """What the estimate spares: a student of the second round for every alpha of the grid, all with the same first
    network, initial weights and batches. The best of them, and each one's squared error on validation pictures.

    `config.steps` are shared among the first network and the students; rounds and alpha are not read.
    """
    run = begin(run)
    require(len(grid) >= 1, "the grid has no alpha")
    check_roles(network, labelled, validation, run)
    config = dataclasses.replace(config, rounds=len(grid) + 1, alpha=(1.0,))
    training = list(shares(config))
    with run.scope("generation 0"):
        first = mixed_targets.train("train", network().to(run.device), labelled, None, 0.0, training[0], run)
    with run.scope("generation 1"):
        student = network().to(run.device)
        students = {alpha: copy.deepcopy(student) for alpha in grid}
        mixed_targets.train_together("train", list(students.values()), labelled, first, [1 - a for a in grid],
                                     training[-1], run)
    errors = {alpha: squared_error(student, validation, run) for alpha, student in students.items()}
    return students[min(errors, key=errors.__getitem__)], errors


def squared_error(model: nn.Module, data: Any, run: Run) -> float:
    """||softmax(z) - onehot||^2, mean over pictures."""
    p, target = probabilities(model, data, run)
    return float((p - target).square().sum(1).mean())


def tiny() -> dict[str, Any]:
    torch.manual_seed(0)
    data = TensorSet(image=torch.randn(20, 1, 4, 4), label=torch.arange(20) % 3)
    return {"network": lambda: nn.Sequential(nn.Flatten(), nn.Linear(16, 4), nn.ReLU(), nn.Linear(4, 3)),
            "labelled": data, "validation": data.select(range(8)),
            "config": Config(steps=10, batch=8, rounds=3, lr=0.01)}


# -------------------------------------------------------------------- the embedded experiment


def sinusoid(run: Run, alpha: float | None, draws: int = 200) -> dict[str, float]:
    """Eleven noisy points of a sinusoid, `draws` times; the squared error to the true curve, mean over the draws. alpha
    None: the best one for each round and draw on 50 further noisy points."""
    generator = torch.Generator().manual_seed(run.seed)
    x, grid = torch.linspace(0, 1, 11).double()[:, None], torch.linspace(0, 1, 101).double()[:, None]
    held_out = torch.rand(50, 1, generator=generator, dtype=torch.float64)
    y, held_out_y = ((2 * math.pi * p).sin() + 0.5 * torch.randn(len(p), draws, generator=generator).double()
                     for p in (x, held_out))
    kernel, cross, between = (kernel_matrix(p, x, gamma=80.0) for p in (x, grid, held_out))
    curve = (2 * math.pi * grid).sin()
    if alpha is None:
        each = [ridge_rounds_with_optimal_alpha(kernel, y[:, [i]], 0.2, 40, between, held_out_y[:, [i]])[0]
                for i in range(draws)]
        rounds = Rounds(*(torch.cat(parts, 2) for parts in zip(*each, strict=True)))
    else:
        rounds = ridge_rounds(kernel, y, 0.2, [alpha] * 39)

    def error(coefficients: Tensor) -> float:
        return float((cross @ coefficients - curve).square().mean())

    found = {f"round {t}": error(rounds.coefficients[t - 1]) for t in (*range(1, 7), 40)}
    if alpha is not None:
        found["limit"] = error(ridge_limit(kernel, y, 0.2, alpha).coefficients[0])
        found["zero function"] = float(curve.square().mean())
        run.picture("shrinkage of the eigenvectors", spectra(torch.linalg.eigvalsh(kernel), [alpha] * 5))
    run.picture("fits", fits(grid[:, 0], curve[:, 0], x[:, 0], y[:, 0], cross @ rounds.coefficients[:6, :, 0].T))
    return found


def kernel_digits(run: Run, alpha: float | None, rounds: int = 10, kernel: str = "rbf", **options: float
                  ) -> dict[str, float]:
    """Kernel ridge on 300 digits, 30 % of their labels wrong; alpha None: the best one for each round on 200 clean
    pictures. Squared error of the centred one-hot targets and accuracy on the 597 test pictures."""
    train, validation, test = noisy_digits(run.seed, 300, 0.3)
    x = [(part.image.flatten(1).double() + 1) / 2 for part in (train, validation, test)]
    targets = [F.one_hot(part.label, 10).double() - 0.1 for part in (train, validation, test)]
    own, between, cross = (kernel_matrix(part, x[0], kernel, **options) for part in x)
    if alpha is None:
        result, _ = ridge_rounds_with_optimal_alpha(own, targets[0], 0.1, rounds, between, targets[1])
    else:
        result = ridge_rounds(own, targets[0], 0.1, [alpha] * (rounds - 1))
    found = {}
    for t in sorted({1, min(2, rounds), rounds}):
        said = cross @ result.coefficients[t - 1]
        found[f"error, round {t}"] = float((said - targets[2]).square().sum(1).mean())
        found[f"accuracy, round {t}"] = float((said.argmax(1) == test.label).double().mean())
    return found


def noisy_digits(seed: int, n: int, noise: float) -> tuple[TensorSet, TensorSet, TensorSet]:
    """`n` digits of 8 pixels with wrong labels to train on, 200 clean ones to validate, 597 to test."""
    return *noisy_split(digits(8, "train"), n, 200, noise, seed), digits(8, "test")


def experiment(run: Run) -> dict[str, dict[str, float]]:
    """Kernel ridge on a sinusoid and on digits, and small networks on 600 digits with half of the labels wrong, each of
    the latter with three draws of the data and the noise."""

    part = functools.partial
    network = part(TinyConvNet, norm="group")

    def over_draws(measure: Callable[[Any, Any, Any], dict[str, float]], noise: float = 0.5) -> dict[str, float]:
        return mean_over_draws(lambda seed: measure(*noisy_digits(seed, 600, noise)), DRAWS, run)

    def searched(labelled: Any, validation: Any, test: Any) -> dict[str, float]:
        start = time.process_time()
        config = dataclasses.replace(EMBEDDED, steps=each * (len(GRID) + 1))
        student, errors = grid_search(network, labelled, validation, config, run)
        return {"seconds": time.process_time() - start, "test accuracy": accuracy(student, test, device=run.device),
                **{f"error, alpha {a:g}": e for a, e in errors.items()}}

    def grid() -> dict[str, float]:
        found = over_draws(searched)
        errors = {a: found[f"error, alpha {a:g}"] for a in GRID}
        run.picture("error by alpha", curve_of(errors))
        return {"alpha": min(errors, key=errors.__getitem__), "validation error": min(errors.values()), **found}

    def guided(labelled: Any, validation: Any, test: Any, config: Config) -> dict[str, float]:
        student: Any = distill(network, labelled, validation, config, run)
        return {"alpha": student.alphas[-1] if student.alphas else 1.0,
                "test accuracy": accuracy(student, test, device=run.device),
                "validation error": squared_error(student, validation, run)}

    def estimated(labelled: Any, validation: Any, test: Any) -> dict[str, float]:
        """The time of two networks and the formula, and what `distill` makes of the alpha they give."""
        start = time.process_time()
        training = next(shares(EMBEDDED))
        with run.scope("estimate"):
            first = mixed_targets.train("train", network().to(run.device), labelled, None, 0.0, training, run)
            alpha = estimate(first, first, network, labelled, validation, training, run)
        seconds = time.process_time() - start
        config = dataclasses.replace(EMBEDDED, steps=2 * each, alpha=(alpha,))
        return {"seconds": seconds, **guided(labelled, validation, test, config)}

    def networks(noise: float = 0.5, **changes: Any) -> Callable[[], dict[str, float]]:
        return part(over_draws, part(guided, config=dataclasses.replace(EMBEDDED, **changes)), noise)

    each = EMBEDDED.steps // EMBEDDED.networks
    return run.arms(
        {**{f"sinusoid, alpha {a:g}": part(sinusoid, run, a) for a in FIXED[:2]},
         "sinusoid, alpha*": lambda: sinusoid(run, None),
         "kernel, round 1": lambda: kernel_digits(run, 1.0, rounds=1, gamma=0.2),
         **{f"kernel, alpha {a:g}": part(kernel_digits, run, a, gamma=0.2) for a in FIXED},
         "kernel, alpha*": lambda: kernel_digits(run, None, gamma=0.2),
         "networks, grid": grid,
         "networks, estimate": part(over_draws, estimated)},
        extended={"laplacian kernel, alpha 0": lambda: kernel_digits(run, 0.0, kernel="laplacian", gamma=0.05),
                  "laplacian kernel, alpha*": lambda: kernel_digits(run, None, kernel="laplacian", gamma=0.05),
                  "networks, labels": networks(steps=each, rounds=1),
                  "networks, 4 rounds, alpha 0": networks(steps=4 * each, rounds=4, alpha=(0.0,)),
                  "networks, 4 rounds, alpha 0.4": networks(steps=4 * each, rounds=4, alpha=(0.4,)),
                  "right labels, estimate": networks(noise=0.0)})


def fits(grid: Tensor, curve: Tensor, x: Tensor, y: Tensor, rounds: Tensor) -> Any:
    """A figure of the fits of some rounds, [points, rounds], beside the data and the true curve."""
    figure, axes = _figure()
    axes.plot(grid.tolist(), curve.tolist(), "k--", label="true curve")
    axes.plot(x.tolist(), y.tolist(), "kx")
    for t, fit in enumerate(rounds.T, 1):
        axes.plot(grid.tolist(), fit.tolist(), color=(0.1, 0.9 * t / len(rounds.T), 0.6), label=f"round {t}")
    axes.legend(fontsize=7)
    return figure


def spectra(eigenvalues: Tensor, alphas: Sequence[float]) -> Any:
    """A figure of the diagonals b of the rounds, large eigenvalues first."""
    figure, axes = _figure()
    for t, b in enumerate(ridge_spectrum(eigenvalues.flip(0), 0.2, alphas), 1):
        axes.plot(range(1, len(b) + 1), b.tolist(), marker="o", markersize=3, label=f"round {t}")
    axes.set(xlabel="eigenvector", ylabel="b", ylim=(0, 1))
    axes.legend(fontsize=7)
    return figure


def curve_of(errors: dict[float, float]) -> Any:
    """A figure of the validation error by alpha."""
    figure, axes = _figure()
    axes.plot(list(errors), list(errors.values()), marker="o")
    axes.set(xlabel="alpha, the weight of the labels", ylabel="squared error")
    return figure


def _figure() -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 3.5))
    return figure, figure.add_subplot()
