"""RAD: a large classifier labels the few pictures that teach a small one most, even if it errs on the worst of them.

A student is trained on labelled pictures A. On the pool of n pictures without labels its uncertainty gives the gains
g_i in (0, 1], here 1 - (p_(1) - p_(2)). The teacher errs on m of them, known from its error on held-out pictures. The
sampling distribution q is the solution of a game, in closed form and without a parameter (g_1 >= g_2 >= ...):

    max_q min_{|M| = m} sum_{i not in M} q_i g_i,      H_k = 1 / sum_{i<=k} 1/g_i,
    k* = argmax_{k>m} (k - m) H_k,      q_i = H_{k*} / g_i for i <= k*, 0 elsewhere.

Within its support q falls with g: all q_i g_i are equal, so it does not matter which pictures the teacher gets wrong.
`penalised` counts a wrong label as a loss of g_i: the same rule with 2 m. Then b pictures are drawn, the teacher is
asked, and the student is trained on A and on its answers; round after round, with the gains of the new student.

Baykal et al. 2023, "Robust Active Distillation". Deviations: other rules than "minimax" are the paper's rivals;
"clustering-margin" clusters its candidates instead of the pool, "unixkd" mixes linearly by rank. Which of the two
objectives is the published default is not known: plain here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from stillhouse.data.clusters import average_linkage
from stillhouse.data.digits import digits
from stillhouse.data.sets import TensorSet, column, subset
from stillhouse.data.variants import degraded
from stillhouse.errors import DataError, RoleError, require
from stillhouse.evaluate.claims import Claim
from stillhouse.evaluate.classification import accuracy
from stillhouse.evaluate.probes import extract
from stillhouse.measures.acquisition import (
    SCORES,
    Score,
    draw,
    farthest_first,
    gains,
    in_turns,
    minimax,
    top,
    worst_case,
)
from stillhouse.models.convnets import TinyConvNet
from stillhouse.parts.black_box import Answer, BlackBox
from stillhouse.parts.heads import feature_width, replace_head
from stillhouse.protocols import Classifier, Images, LabelledImages
from stillhouse.recipes.active import Acquired, Query, ask, learn_in_rounds, read
from stillhouse.recipes.supervised import check_training
from stillhouse.recipes.views import random_view
from stillhouse.run import Run, begin, frozen
from stillhouse.zoo.classifiers import digits_teacher

NUMBER = 130

CLAIMS = [
    Claim("it is told fewer wrong labels than margin sampling",
          lambda a: a["margin"]["wrong labels"] - a["rad"]["wrong labels"]),
    Claim("it is told fewer wrong labels than entropy sampling",
          lambda a: a["entropy"]["wrong labels"] - a["rad"]["wrong labels"]),
    Claim("the penalised rule ends higher than margin sampling",
          lambda a: a["penalised"]["accuracy"] - a["margin"]["accuracy"]),
    Claim("under the worst mistakes it guarantees more gain than every other rule",
          lambda a: a["game"]["rad"] - max(v for n, v in a["game"].items() if n != "rad")),
    Claim("it ends higher than margin sampling",
          lambda a: a["rad"]["accuracy"] - a["margin"]["accuracy"], report=True),
    Claim("it ends higher than uniform sampling",
          lambda a: a["rad"]["accuracy"] - a["uniform"]["accuracy"], report=True),
    Claim("the penalised rule ends higher than uniform sampling",
          lambda a: a["penalised"]["accuracy"] - a["uniform"]["accuracy"], report=True),
    Claim("the teacher's mistakes count: it ends higher than with none expected",
          lambda a: a["rad"]["accuracy"] - a["no mistakes expected"]["accuracy"], report=True),
    Claim("it ends higher than k-centre", lambda a: a["rad"]["accuracy"] - a["k-center"]["accuracy"], report=True),
    Claim("it ends higher than clustering-margin",
          lambda a: a["rad"]["accuracy"] - a["clustering-margin"]["accuracy"], report=True),
    Claim("it ends higher than UNIXKD", lambda a: a["rad"]["accuracy"] - a["unixkd"]["accuracy"], report=True),
    Claim("on clean pictures with soft labels it ends higher than margin sampling",
          lambda a: a["rad, clean and soft"]["accuracy"] - a["margin, clean and soft"]["accuracy"], report=True),
    Claim("where as many mistakes are spread over more pictures the penalised rule ends higher than margin sampling",
          lambda a: a["penalised, spread"]["accuracy"] - a["margin, spread"]["accuracy"], report=True),
    Claim("with a convolutional student the penalised rule ends higher than margin sampling",
          lambda a: a["penalised, convnet"]["accuracy"] - a["margin, convnet"]["accuracy"], report=True),
]

Rule = Literal["minimax", "top", "uniform", "k-center", "clustering-margin", "unixkd"]
RULES = ("minimax", "top", "uniform", "k-center", "clustering-margin", "unixkd")


@dataclass(frozen=True)
class Config:
    steps: int = 40_000  # optimiser steps of all trainings together, shared out evenly
    batch: int = 128  # pictures a step, labelled and answered ones alike
    rounds: int = 3  # how often the teacher is asked
    queries: int = 5000  # b pictures a round
    rule: Rule = "minimax"  # how they are chosen
    score: Score = "margin"  # g: the student's uncertainty, "margin", "entropy" or (least) "confidence"
    mistakes: float | None = None  # m / n; None: the teacher's error on `validation`
    penalised: bool = False  # a wrong label costs g_i instead of nothing: 2 m in place of m
    answer: Answer = "probabilities"  # what is seen of the teacher: its "probabilities" (or "logits"), or a "label"
    restart: bool = True  # every training begins from the weights that the student came with
    optimizer: Literal["sgd", "adamw"] = "adamw"  # SGD with momentum 0.9, or AdamW
    lr: float = 1e-3  # peak learning rate of each training; a cosine to 0
    warmup: float = 0.0  # part of a training in which it rises
    weight_decay: float = 1e-4  # lambda
    view: float = 0.0  # strength of random shifts, turns and light changes in training; 0: the pictures as given

    def __post_init__(self) -> None:
        check_training(self.steps, self.batch, self.lr, self.warmup, self.weight_decay)
        require(self.rounds >= 0 and self.queries >= 1 and self.view >= 0, "rounds and view must not be negative and "
                f"queries at least 1; got {self.rounds}, {self.view} and {self.queries}")
        require(self.rule in RULES, f"rule is one of {', '.join(RULES)}, not {self.rule!r}")
        require(self.score in SCORES, f"score is one of {', '.join(SCORES)}, not {self.score!r}")
        require(self.mistakes is None or 0 <= self.mistakes <= 1, f"mistakes is a part of the pool in [0, 1], or none; "
                f"got {self.mistakes}")
        require(self.answer in ("probabilities", "logits", "label"), "answer is 'probabilities', 'logits' or 'label', "
                f"not {self.answer!r}")


EMBEDDED = Config(steps=400, batch=64, queries=50, answer="label", lr=0.01)


def distill(
    teacher: Classifier,
    student: Classifier,
    labelled: LabelledImages,
    unlabelled: Images,
    validation: LabelledImages | None = None,
    config: Config = Config(),
    run: Run | None = None,
) -> nn.Module:
    """Train the student in place and return it; `acquire` returns what was asked for too.

    `teacher` may be any function from pictures to logits, probabilities or labels. It is asked rounds x queries times,
    and once for every picture of `validation`, which is needed unless `mistakes` is given or another rule is taken;
    4 pictures are sent before to see whether it works.
    """
    return acquire(teacher, student, labelled, unlabelled, validation, config, run).student


def acquire(teacher: Any, student: Classifier, labelled: LabelledImages, unlabelled: Images,
            validation: LabelledImages | None, config: Config, run: Run | None) -> Acquired:
    """The algorithm. Raises RoleError or DataError before any work."""
    run = begin(run)
    example = run.check(Classifier, labelled, labels=True, student=student)["image"]
    assert isinstance(student, nn.Module)
    classes = feature_width(student, example)
    bought = config.rounds * config.queries
    held_out = 0 if validation is None else len(validation)
    box = BlackBox(teacher, config.answer, max(1, bought + held_out), classes)
    run.check(Classifier, unlabelled, teacher=BlackBox(teacher, config.answer, None, classes), student=student)
    require(bought <= len(unlabelled), f"{config.rounds} rounds of {config.queries} queries need as many pictures; "
            f"there are {len(unlabelled)}", DataError)
    if validation is not None:
        run.check(Classifier, validation, labels=True, student=student)
    elif config.rule == "minimax":
        require(config.mistakes is not None, "validation (labelled pictures) tells how often the teacher errs; give "
                "it, or config.mistakes", RoleError)
    with frozen(teacher):
        wrong = config.mistakes
        if wrong is None and validation is not None and config.rule == "minimax":
            wrong = run.once("mistakes of the teacher", lambda: error_of(box, validation, run.device))

        def choose(free: Tensor, asked: Tensor) -> Query:
            logits = extract(student, subset(unlabelled, free), device=run.device)
            gain = gains(logits, config.score)
            if config.rule == "minimax":
                m = min(round((wrong or 0.0) * len(free)) * (2 if config.penalised else 1), len(free) - 1)
                game = minimax(gain, m)
                run.log(mistakes=m, kept=game.kept, value=game.value)
                return Query(free[draw(game.q, gain, config.queries, run.shared)])
            return rival(gain, free, asked, student, labelled, unlabelled, config, run)

        view = (lambda x: random_view(x, run, config.view)) if config.view else None
        return learn_in_rounds(student, labelled, unlabelled, box, choose, config.rounds, config, run, view)


def error_of(box: BlackBox, validation: Any, device: torch.device) -> float:
    """The share of the held-out pictures whose answer is not their label."""
    answers = ask(box, read(validation, torch.arange(len(validation))), device)
    return (answers.argmax(-1) != column(validation, "label").cpu()).double().mean().item()


def rival(gain: Tensor, free: Tensor, asked: Tensor, student: nn.Module, labelled: Any, unlabelled: Any, config: Config,
          run: Run) -> Query:
    """What the other rules ask for."""
    b = config.queries
    if config.rule == "uniform":
        return Query(free[torch.randperm(len(free), generator=run.shared)[:b]])
    if config.rule == "top":
        return Query(free[top(gain, b)])
    if config.rule == "unixkd":
        chosen = free[top(gain, b)]
        partner = free[torch.randint(len(free), (b,), generator=run.shared)]
        return Query(chosen, partner, 1 - torch.linspace(0, 0.5, b))
    encoder, _ = replace_head(student)
    if config.rule == "k-center":
        known = [extract(encoder, labelled, device=run.device)]
        if len(asked):
            known.append(extract(encoder, subset(unlabelled, asked), device=run.device))
        return Query(free[farthest_first(extract(encoder, subset(unlabelled, free), device=run.device),
                                         torch.cat(known), b)])
    candidates = top(gain, min(len(free), CANDIDATES * b))
    features = extract(encoder, subset(unlabelled, free[candidates]), device=run.device)
    clusters = average_linkage(features, min(b, len(candidates)))
    return Query(free[candidates[in_turns(gain[candidates], clusters, b)]])


CANDIDATES = 10
"""Clustering-margin looks for diversity among this many times the pictures that it is to choose."""


def tiny() -> dict[str, Any]:
    torch.manual_seed(0)
    teacher, student = (nn.Sequential(nn.Conv2d(1, width, 3), nn.ReLU(), nn.Flatten(), nn.Linear(width * 36, 4))
                        for width in (4, 2))
    image, label = torch.rand(40, 1, 8, 8), torch.arange(40) % 4
    return {"teacher": teacher, "student": student, "labelled": TensorSet(image=image[:8], label=label[:8]),
            "unlabelled": TensorSet(image=image[8:30]), "validation": TensorSet(image=image[30:], label=label[30:]),
            "config": Config(steps=6, batch=4, rounds=2, queries=3, lr=0.01, view=1.0)}


# -------------------------------------------------------------------- the embedded experiment


CONCENTRATED, SPREAD, CLEAN = (0.25, 0.0, 0.6), (0.45, 0.2, 0.45), (0.0, 0.0, 0.0)
"""Share of degraded pictures, noise and size of the hidden box. The teacher errs on half of the degraded pictures of
the first kind and on a quarter of those of the second: on 10 to 14 % of all pictures in both."""


def ground(seed: int, degradation: tuple[float, float, float] = CONCENTRATED) -> dict[str, Any]:
    """Digits of 16 pixels, some of them degraded: 40 labelled, a pool of 960, 200 to judge the teacher by, 597 to test.
    The teacher is a ResNet that has learned from clean digits."""
    train = degraded(digits(16, "train"), *degradation, seed=seed)
    return {"labelled": train.select(range(40)), "unlabelled": train.select(range(40, 1000)),
            "validation": train.select(range(1000, 1200)), "teacher": digits_teacher(16),
            "test": degraded(digits(16, "test"), *degradation, seed=seed + 10_000)}


def softmax_regression() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(256, 10))


def experiment(run: Run) -> dict[str, dict[str, float]]:
    """All arms ask 3 times for 50 labels; the same student (softmax regression), initial weights and steps. Accuracy on
    597 digits, degraded like the pool, and on the same digits clean; the part of the answers that was wrong."""
    hard, spread, clean = (ground(run.seed, kind) for kind in (CONCENTRATED, SPREAD, CLEAN))

    def arm(g: dict[str, Any] = hard, new: Callable[[], nn.Module] = softmax_regression, **changes: Any
            ) -> Callable[[], dict[str, float]]:
        def measure() -> dict[str, float]:
            run.begin()
            student = new().to(run.device)
            config = dataclasses.replace(EMBEDDED, **changes)
            pool = g["unlabelled"]
            found = acquire(g["teacher"].to(run.device), student, g["labelled"], pool.without("label", "degraded"),
                            g["validation"], config, run)
            run.picture("asked for", pool.image[found.positions][:100], columns=25)
            right = found.answers.argmax(-1) == pool.label[found.positions]
            return {"accuracy": accuracy(student, g["test"], device=run.device),
                    "accuracy, clean": accuracy(student, clean["test"], device=run.device),
                    "wrong labels": 1 - right.double().mean().item(),
                    "degraded": pool.degraded[found.positions].double().mean().item()}

        return measure

    def game() -> dict[str, float]:
        """The gain that each rule guarantees, after training on the labels alone."""
        run.begin()
        student = softmax_regression().to(run.device)
        pool, teacher = hard["unlabelled"].without("label"), hard["teacher"].to(run.device)
        config = dataclasses.replace(EMBEDDED, rounds=0, steps=EMBEDDED.steps // (EMBEDDED.rounds + 1))
        acquire(teacher, student, hard["labelled"], pool, hard["validation"], config, run)
        logits, n, b = extract(student, pool, device=run.device), len(pool), EMBEDDED.queries
        gain = gains(logits)
        m = round(error_of(BlackBox(teacher, "label"), hard["validation"], run.device) * n)
        chosen = {f"{score}": top(gains(logits, score), b) for score in ("margin", "entropy", "confidence")}
        rules = {name: torch.zeros(n).index_fill(0, where, 1 / b) for name, where in chosen.items()}
        rules |= {"uniform": torch.full((n,), 1 / n), "proportional": gain / gain.sum(), "rad": minimax(gain, m).q}
        return {name: worst_case(q, gain, m) for name, q in rules.items()}

    return run.arms(
        {"uniform": arm(rule="uniform"),
         "margin": arm(rule="top"),
         "entropy": arm(rule="top", score="entropy"),
         "rad": arm(),
         "penalised": arm(penalised=True),
         "game": game},
        extended={"no mistakes expected": arm(mistakes=0.0),
                  "confidence": arm(rule="top", score="confidence"),
                  "k-center": arm(rule="k-center"),
                  "clustering-margin": arm(rule="clustering-margin"),
                  "unixkd": arm(rule="unixkd"),
                  "rad, soft": arm(answer="probabilities"),
                  "margin, soft": arm(rule="top", answer="probabilities"),
                  "rad, clean and soft": arm(clean, answer="probabilities"),
                  "margin, clean and soft": arm(clean, rule="top", answer="probabilities"),
                  "penalised, spread": arm(spread, penalised=True),
                  "margin, spread": arm(spread, rule="top"),
                  "penalised, convnet": arm(new=TinyConvNet, restart=False, penalised=True),
                  "margin, convnet": arm(new=TinyConvNet, restart=False, rule="top")})
