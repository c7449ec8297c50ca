"""DisWOT: of many student architectures the one that will learn best from a given teacher, found without training any.

Teacher and candidate, both with freshly drawn weights, see one labelled batch. With g the gradient of the cross-entropy
in a class's row of the last linear layer, F the features before pooling and N(.) bringing rows to length 1,

    M_sem = 1/(C d) sum_c || N(g_T g_T^T) - N(g_S g_S^T) ||_F^2,    M_rel = 1/B^2 || N(F_T F_T^T) - N(F_S F_S^T) ||_F^2,
    score = -(M_sem + M_rel).

Candidates evolve under a limit of parameters; the best is built and distilled from the trained teacher:

    L = ce CE + kd T^2 KL + weight L_kind,        L_kind: none, or the two metrics on trained features (SP and ICKD).

Dong, Li and Wei 2023, "DisWOT: Student Architecture Search for Distillation WithOut Training". M_rel is at most 4/B, so
that in the paper's plain sum (`combine="sum"`, the default) M_sem decides; the embedded experiment takes the mean of
their ranks and reports the sum beside it. Last layers of different widths are compared by their classes' Gram matrix
(an extension).
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stillhouse.data.digits import digits
from stillhouse.data.sets import TensorSet, fetch
from stillhouse.errors import RoleError, require
from stillhouse.evaluate.claims import Claim
from stillhouse.evaluate.classification import accuracy
from stillhouse.evaluate.cost import parameters, parameters_of
from stillhouse.evaluate.zero_cost import PROXIES
from stillhouse.hub.architectures import built_by, remember
from stillhouse.measures.zero_cost import class_distance, relation_distance, semantic_distance
from stillhouse.models.stage_net import OPERATIONS, Architecture, Space, StageNet, mutated, named, sampled
from stillhouse.parts.stages import stages_of
from stillhouse.parts.taps import taps
from stillhouse.protocols import Classifier, LabelledImages, Network
from stillhouse.recipes import knowledge, supervised
from stillhouse.recipes.architecture_choice import reinitialised
from stillhouse.recipes.evolution import Scores, evolve, rank_best, sum_best
from stillhouse.recipes.supervised import check_training
from stillhouse.recipes.views import random_view
from stillhouse.run import Run, begin
from stillhouse.run.reading import to_device
from stillhouse.run.seeds import derive, preserved, reseed
from stillhouse.zoo.cache import cached
from stillhouse.zoo.classifiers import digits_classifier

NUMBER = 35
Combine = Literal["sum", "rank", "semantic", "relation"]

CLAIMS = [
    Claim("the mean rank of both metrics orders candidates as distillation does (Kendall's tau above 0)",
          lambda a: a["study"]["tau"]),
    Claim("so does their plain sum", lambda a: a["study"]["tau of the sum"]),
    Claim("the winner of the search is at least as good as random candidates of the same budget",
          lambda a: a["winner"]["accuracy"] - a["random candidates"]["accuracy"]),
    Claim("the search takes less than a twentieth of the time that distilling its candidates would",
          lambda a: 1 / 20 - a["winner"]["search seconds"] / a["winner"]["exhaustive seconds"]),
    Claim("tau is above 0 with 90 % of the bootstrap", lambda a: a["study"]["tau, tenth percentile"], report=True),
    Claim("it ranks better than the number of parameters",
          lambda a: a["study"]["tau"] - a["study"]["tau of parameters"], report=True),
    Claim("it ranks better than synflow", lambda a: a["study"]["tau"] - a["study"]["tau of synflow"], report=True),
    Claim("it ranks better than nwot", lambda a: a["study"]["tau"] - a["study"]["tau of nwot"], report=True),
    Claim("the best candidate without a teacher is not the best with one",
          lambda a: a["study"]["another is best without a teacher"] - 0.5, report=True),
]


@dataclass(frozen=True)
class Config:
    steps: int = 187_500  # optimiser steps of the winner: 240 epochs of 50,000 pictures at this batch
    batch: int = 64  # pictures a step, and in the batch that scores
    optimizer: Literal["sgd", "adamw"] = "sgd"  # SGD with momentum 0.9, or AdamW
    lr: float = 0.05  # peak learning rate; a cosine to 0
    warmup: float = 0.0  # part of the steps in which it rises
    weight_decay: float = 5e-4  # lambda
    temperature: float = 4.0  # T
    ce: float = 0.1  # weight of the cross-entropy with the labels
    kd: float = 0.9  # weight of T^2 KL between the softened probabilities
    kind: Literal["none", "sp", "ickd", "sp+ickd"] = "none"  # the metrics as losses on trained features
    weight: float = 1.0  # their weight
    view: float = 0.0  # strength of random shifts, turns and light changes; 0: the pictures as they come
    combine: Combine = "sum"  # of M_sem and M_rel: their sum, the mean of their ranks, or one alone
    draws: int = 1  # random weights of teacher and candidate over which the metrics are averaged
    cycles: int = 1000  # candidates that are scored
    population: int = 36  # P
    tournament: int = 8  # members that compete to be mutated
    budget: float = 0.6  # most parameters of a candidate, as a part of the teacher's
    width: int = 8  # of the first stage of a candidate; each later one is twice as wide
    depths: tuple[int, ...] = (1, 2, 3)  # blocks a stage may have
    kernels: tuple[int, ...] = (1, 3)  # kernel sizes
    operations: tuple[str, ...] = OPERATIONS  # conv, depthwise, pool

    def __post_init__(self) -> None:
        check_training(self.steps, self.batch, self.lr, self.warmup, self.weight_decay)
        require(min(self.ce, self.kd, self.weight, self.view) >= 0 and self.temperature > 0, "ce, kd, weight and view "
                "must not be negative, and temperature above 0")
        require(self.combine in ("sum", "rank", "semantic", "relation"), "combine is 'sum', 'rank', 'semantic' or "
                f"'relation', not {self.combine!r}")
        require(self.kind in ("none", "sp", "ickd", "sp+ickd"), "kind is 'none', 'sp', 'ickd' or 'sp+ickd', not "
                f"{self.kind!r}")
        require(self.draws >= 1 and 1 <= self.tournament <= self.population <= self.cycles, "draws must be 1 or more, "
                "and 1 <= tournament <= population <= cycles")
        require(self.budget > 0 and bool(self.depths and self.kernels and self.operations), "budget must be above 0, "
                "and depths, kernels and operations not empty")

    @property
    def space(self) -> Space:
        """What the stages of a candidate may be made of."""
        return Space(self.operations, self.kernels, self.depths)


EMBEDDED = Config(steps=200, optimizer="adamw", lr=0.01, warmup=0.05, weight_decay=1e-4, cycles=150,
                  combine="rank", draws=5)


def distill(
    teacher: Classifier,
    labelled: LabelledImages,
    candidates: list[Network] | None = None,
    config: Config = Config(),
    run: Run | None = None,
) -> nn.Module:
    """Search a student for the teacher and distil it; the student is returned.

    `candidates` are factories to choose from; without them, `StageNet`s evolve within the budget. Only the trained
    teacher's answers are learned from; the search reads its architecture alone. The search's history is kept in the
    run's picture and log.
    """
    run = begin(run)
    run.check(Classifier, labelled, labels=True, teacher=teacher)
    assert isinstance(teacher, nn.Module)
    batch = to_device(fetch(labelled, range(min(config.batch, len(labelled)))), run.device)
    score = scorer(teacher, batch, config, run.seed)
    if candidates:
        scores = run.once("rank", lambda: [list(score(make)) for make in candidates])
        chosen = candidates[best_of(config)([tuple(s) for s in scores])]
    else:
        found = run.once("search", lambda: [[named(a), *s] for a, s in search(teacher, batch, score, config, run)])
        ranked = {row[0]: tuple(row[1:]) for row in found}
        names = list(ranked)
        chosen = stage_net(names[best_of(config)([ranked[n] for n in names])], batch, teacher, config)
        run.picture("search", chart([s for _, *s in found], config))
    student = built_by(chosen).to(run.device)
    name = getattr(student, "stages", type(student).__name__)
    run.say(f"the student is {name} with {parameters(student)} parameters")
    learning = knowledge.Config(config.steps, config.batch, config.optimizer, config.lr, config.warmup,
                                config.weight_decay, config.temperature, config.ce, config.kd, config.kind,
                                config.weight)
    view = (lambda x: random_view(x, run, config.view)) if config.view else None
    return knowledge.distill(teacher, student, labelled, learning, run, view)


def scorer(teacher: nn.Module, batch: dict[str, Tensor], config: Config, seed: int) -> Callable[[Network], Scores]:
    """(-M_sem, -M_rel) of a candidate, or the one that `config.combine` asks for, averaged over `config.draws` random
    weights of both."""
    seeds = [derive("diswot", seed, i) for i in range(config.draws)]
    of_teacher = [evidence(reinitialised(teacher, s), batch, config) for s in seeds]

    def score(make: Network) -> Scores:
        each = []
        for (g_t, f_t), s in zip(of_teacher, seeds, strict=True):
            with preserved():
                reseed(s)
                g_s, f_s = evidence(make().to(batch["image"].device), batch, config)
            semantic = semantic_distance if g_t is None or g_s is None or g_t.shape == g_s.shape else class_distance
            each.append(tuple(-float(distance(t, s)) for distance, t, s in (
                (semantic, g_t, g_s), (relation_distance, f_t, f_s)) if t is not None and s is not None))
        return tuple(sum(part) / len(part) for part in zip(*each, strict=True))

    return score


def evidence(model: nn.Module, batch: dict[str, Tensor], config: Config) -> tuple[Tensor | None, Tensor | None]:
    """The gradient of the last linear layer and the features of the deepest stage, flattened; None for what is not
    asked for. In train mode, as an untrained BatchNorm has no statistics yet."""
    linears = [m for m in model.modules() if isinstance(m, nn.Linear)]
    require(bool(linears), f"{type(model).__name__} has no linear layer to take the gradient of", RoleError)
    stages = list(stages_of(model, batch["image"]))
    require(bool(stages), f"no stage was found in {type(model).__name__}", RoleError)
    model.train()
    with taps(model, stages[-1:]) as features:
        loss = F.cross_entropy(model(batch["image"]), batch["label"])
    gradient = None
    if config.combine != "relation":
        (gradient,) = torch.autograd.grad(loss, linears[-1].weight)
    return gradient, None if config.combine == "semantic" else features[stages[-1]].detach().flatten(1)


def best_of(config: Config) -> Callable[[Sequence[Scores]], int]:
    return rank_best if config.combine == "rank" else sum_best


def stage_net(name: str, batch: dict[str, Tensor], teacher: nn.Module, config: Config) -> Network:
    """The factory of a candidate, with as many channels and classes as the batch and the teacher have."""
    with torch.no_grad():
        classes = getattr(teacher, "classes", None) or reinitialised(teacher).eval()(batch["image"][:1]).shape[1]
    options = f"stages={name},channels_in={batch['image'].shape[1]},classes={classes},width={config.width}"

    def make() -> nn.Module:
        return remember(StageNet(name, batch["image"].shape[1], classes, config.width), f"stage-net:{options}")

    return make


def search(teacher: nn.Module, batch: dict[str, Tensor], score: Callable[[Network], Scores], config: Config, run: Run
           ) -> list[tuple[Architecture, Scores]]:
    """Aging evolution; a mutation changes one thing of one stage."""
    most = config.budget * parameters(teacher)

    def network(architecture: Architecture) -> Network:
        return stage_net(named(architecture), batch, teacher, config)

    return evolve(lambda draw: sampled(draw, config.space), lambda a, draw: mutated(a, draw, config.space),
                  lambda a: score(network(a)), cycles=config.cycles, population=config.population,
                  tournament=config.tournament, seed=derive("evolve", run.seed), best=best_of(config),
                  allowed=lambda a: parameters_of(network(a)) <= most, track=lambda x: run.track(x, "search"))


def chart(history: list[list[float]], config: Config) -> Any:
    """Scores in the order of the search."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axis = figure.subplots()
    axis.plot([sum(s) for s in history], ".", markersize=3)
    axis.axvline(config.population, color="#8a9099", linewidth=0.8)
    axis.set(xlabel="candidate, in the order of the search", ylabel="score (higher is better)")
    return figure


def tiny() -> dict[str, Any]:
    torch.manual_seed(0)
    return {"teacher": StageNet("conv3x1/conv3x2", 1, 4, width=4),
            "labelled": TensorSet(image=torch.rand(12, 1, 8, 8), label=torch.arange(12) % 4),
            "config": Config(steps=3, batch=6, lr=0.01, cycles=4, population=3, tournament=2, width=2, budget=20.0,
                             depths=(1, 2), kind="sp+ickd")}


# -------------------------------------------------------------------- the embedded experiment

COUNT = 20
"""Random candidates of the study."""


def ground() -> dict[str, Any]:
    """Digits of 16 pixels: 200 to distil with, 597 to test; a ResNet of three blocks a stage as teacher."""
    return {"teacher": digits_classifier("resnet", 16, width=8, blocks=(3, 3, 3)),
            "labelled": digits(16, "labelled"), "test": digits(16, "test")}


def trained(name: str, teacher: Any, g: dict[str, Any], run: Run) -> nn.Module:
    """One candidate, distilled as the winner is, or without a teacher on the labels alone."""
    run.begin()
    student = StageNet(name, width=EMBEDDED.width).to(run.device)
    c = EMBEDDED
    if teacher is None:
        plain = supervised.Config(c.steps, c.batch, c.optimizer, c.lr, c.warmup, c.weight_decay)
        return supervised.train(student, g["labelled"], plain, run)
    learning = knowledge.Config(c.steps, c.batch, c.optimizer, c.lr, c.warmup, c.weight_decay, c.temperature, c.ce,
                                c.kd, "none")
    return knowledge.distill(teacher, student, g["labelled"], learning, run)


def study(run: Run, g: dict[str, Any]) -> dict[str, float]:
    """Kendall's tau of the scores of `COUNT` random candidates with their accuracy after distillation, which is the
    same for all seeds."""
    from scipy.stats import kendalltau, spearmanr

    draw = random.Random(0)
    names = [named(sampled(draw, EMBEDDED.space)) for _ in range(COUNT)]
    kept = ("steps", "batch", "optimizer", "lr", "warmup", "weight_decay", "temperature", "ce", "kd", "width")
    recipe = {"what": "candidates of diswot", "names": names, "version": 2,
              **{field: getattr(EMBEDDED, field) for field in kept}}

    def truth() -> list[list[float]]:
        with Run(seed=1000, quiet=True) as own:
            own.say(f"distilling {COUNT} candidates (kept for later runs) …")
            found = []
            for name in names:
                for teacher in (g["teacher"], None):
                    with own.scope(f"{name} {teacher is None}"):
                        found.append(accuracy(trained(name, teacher, g, own), g["test"]))
            return [found[0::2], found[1::2]]

    distilled, alone = cached("diswot-candidates", recipe, truth)
    batch = fetch(g["labelled"], torch.randperm(200, generator=torch.Generator().manual_seed(run.seed))[:64].tolist())

    def tau(values: Sequence[float]) -> float:
        return float(kendalltau(values, distilled).statistic)

    result: dict[str, float] = {}
    both = [scorer(g["teacher"], batch, EMBEDDED, run.seed)(stage_net(n, batch, g["teacher"], EMBEDDED)) for n in names]
    total = [sum(s) for s in both]
    ranks = [float(sum(sorted(part).index(s[i]) for i, part in enumerate(zip(*both, strict=True)))) for s in both]
    generator = torch.Generator().manual_seed(run.seed)
    resampled = [torch.randint(COUNT, (COUNT,), generator=generator).tolist() for _ in range(500)]
    spread = sorted(float(kendalltau([ranks[i] for i in r], [distilled[i] for i in r]).statistic) for r in resampled)
    result = {"tau": tau(ranks), "tau, tenth percentile": spread[50], "spearman": float(spearmanr(ranks, distilled)[0]),
              "tau of the sum": tau(total), "tau of M_sem": tau([s[0] for s in both]),
              "tau of M_rel": tau([s[1] for s in both]), "tau of the accuracy alone": tau(alone),
              "another is best without a teacher": float(distilled.index(max(distilled)) != alone.index(max(alone))),
              "lowest accuracy": min(distilled), "highest accuracy": max(distilled)}
    for proxy, of in PROXIES.items():
        with preserved():
            reseed(derive("proxy", run.seed))
            result[f"tau of {proxy}"] = tau([of(StageNet(n, width=EMBEDDED.width), batch["image"], batch["label"])
                                             for n in names])
    run.picture("mean rank and accuracy", scatter(ranks, distilled))
    return result


def scatter(scores: Sequence[float], found: Sequence[float]) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.5, 3.5), layout="constrained")
    axis = figure.subplots()
    axis.plot(scores, found, "o")
    axis.set(xlabel="mean rank of both metrics, without training", ylabel="accuracy after distillation")
    return figure


def experiment(run: Run) -> dict[str, dict[str, float]]:
    """The study, the search with its winner distilled, and three random candidates of the same budget distilled alike;
    accuracy on 597 test digits."""
    import time

    g = ground()
    g["teacher"] = g["teacher"].to(run.device)

    def measured(student: nn.Module) -> dict[str, float]:
        return {"accuracy": accuracy(student, g["test"], device=run.device), "parameters": float(parameters(student))}

    def found(**changes: Any) -> Callable[[], dict[str, float]]:
        def measure() -> dict[str, float]:
            start = time.monotonic()
            student = distill(g["teacher"], g["labelled"], None,
                              dataclasses.replace(EMBEDDED, steps=0, **changes), run)
            searched = time.monotonic() - start
            start = time.monotonic()
            with run.scope("distil"):
                name = getattr(student, "stages", "")
                result = measured(trained(name, g["teacher"], g, run))
            each = time.monotonic() - start
            return {**result, "search seconds": searched, "exhaustive seconds": each * EMBEDDED.cycles}

        return measure

    def metrics_as_losses() -> dict[str, float]:
        config = dataclasses.replace(EMBEDDED, kind="sp+ickd", weight=30.0)
        return measured(distill(g["teacher"], g["labelled"], None, config, run))

    def chance() -> dict[str, float]:
        draw, most = random.Random(run.seed), EMBEDDED.budget * parameters(g["teacher"])
        names: list[str] = []
        while len(names) < 3:
            name = named(sampled(draw, EMBEDDED.space))
            if parameters_of(partial(StageNet, name, width=EMBEDDED.width)) <= most:
                names.append(name)
        each = []
        for i, name in enumerate(names):
            with run.scope(f"candidate {i}"):
                each.append(measured(trained(name, g["teacher"], g, run)))
        return {metric: sum(e[metric] for e in each) / len(each) for metric in each[0]}

    return run.arms({"study": lambda: study(run, g), "winner": found(), "random candidates": chance},
                    extended={"by M_sem alone": found(combine="semantic"), "by M_rel alone": found(combine="relation"),
                              "by the sum": found(combine="sum"), "one draw": found(draws=1),
                              "metrics as losses": metrics_as_losses,
                              "largest": lambda: measured(trained("conv3x2/conv3x2/conv3x1", g["teacher"], g, run))})
