"""Born-again networks: a network's outputs train the same architecture again from new random weights, for several
generations, and the children are averaged.

Generation 0 is trained on the labels (or is the `teacher` given, of any architecture). Generation k starts afresh and
sees, under the same views, q = softmax(z_k) against p = softmax(z_{k-1}), both at temperature 1:

    BAN    L = - sum_c p_c log q_c
    BAN+L  L = - sum_c p_c log q_c - log q_y                                             (labels = 1)
    CWTM   L = sum_s w_s (- log q_{s,y}),   w_s = max_c p_{s,c} / sum_u max_c p_{u,c}
    DKPP   BAN with the p_c of all classes but argmax p exchanged at random, anew for every sample and visit
    BANE   q = 1/K sum_k softmax(z_k), k = 1 … K: the ensemble of the children           (result = "ensemble")

The gradient of BAN in a logit is q_c - p_c: at the true class the term that CWTM keeps as a weight, at all others the
dark knowledge that DKPP keeps but for what it says of which class. `treatment="labels"` trains every generation on the
labels alone: independent networks, the control of the ensemble. With `corpus` the networks are causal language models
and the samples are the tokens to be predicted.

Furlanello et al. 2018, "Born Again Neural Networks". Deviations: of language models the KL is taken in place of the
cross-entropy with the teacher, which is less by the teacher's entropy, a constant; CWTM and DKPP are of classifiers.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stillhouse.data.digits import digits
from stillhouse.data.grammar import VOCABULARY, grammar
from stillhouse.data.sets import TensorSet
from stillhouse.data.variants import noisy_labels
from stillhouse.errors import DataError, require
from stillhouse.evaluate.claims import Claim
from stillhouse.evaluate.classification import calibration_error, predictions
from stillhouse.evaluate.text import language_loss
from stillhouse.measures.classes import confidence_weighted, permuted_target
from stillhouse.measures.divergences import signed_cross_entropy, soft_cross_entropy
from stillhouse.measures.language import language_cross_entropy, language_divergence
from stillhouse.models.convnets import SmallVGG, TinyConvNet
from stillhouse.models.language import next_tokens
from stillhouse.models.recurrent import LSTMLanguageModel
from stillhouse.parts.ensembles import Ensemble
from stillhouse.protocols import CausalLM, Classifier, LabelledImages, Network, TokenPairs
from stillhouse.recipes import generations as chain
from stillhouse.recipes.generations import Terms, generations, pictured, taught
from stillhouse.recipes.language import check_pairs
from stillhouse.recipes.views import random_view
from stillhouse.run import Run, begin

NUMBER = 159

CLAIMS = [
    Claim("the children of three generations are on average as good as generation 0",
          lambda a: a["ban"]["accuracy"] - a["generation 0"]["accuracy"]),
    Claim("the ensemble of the children beats generation 0",
          lambda a: a["ban"]["ensemble"] - a["generation 0"]["accuracy"]),
    Claim("with permuted dark knowledge (DKPP) a child is at most 0.3 points below generation 0",
          lambda a: a["dkpp"]["accuracy"] - a["generation 0"]["accuracy"] + 0.003),
    Claim("with a tenth of the labels wrong, the first child beats generation 0",
          lambda a: a["ban, wrong labels"]["generation 1"] - a["generation 0, wrong labels"]["accuracy"]),
    Claim("of a language model, the child's perplexity (BAN+L) is at most 1% above generation 0's",
          lambda a: 1.01 - a["language, ban+l"]["perplexity"] / a["language, generation 0"]["perplexity"]),
    Claim("the ensemble of the children beats that of three networks trained independently",
          lambda a: a["ban"]["ensemble"] - a["independent"]["ensemble"], report=True),
    Claim("weights by the teacher's confidence alone (CWTM) beat generation 0",
          lambda a: a["cwtm"]["accuracy"] - a["generation 0"]["accuracy"], report=True),
    Claim("one generation with labels (BAN+L) beats generation 0",
          lambda a: a["ban+l"]["accuracy"] - a["generation 0"]["accuracy"], report=True),
    Claim("the language model's child beats generation 0 with the labels' term, and does not without",
          lambda a: min(a["language, generation 0"]["perplexity"] - a["language, ban+l"]["perplexity"],
                        a["language, ban"]["perplexity"] - a["language, generation 0"]["perplexity"]), report=True),
    Claim("one network trained as long as all four generations is behind the third child",
          lambda a: a["ban"]["generation 3"] - a["trained four times as long"]["accuracy"], report=True),
]

TREATMENTS = ("ban", "cwtm", "dkpp", "labels")


@dataclass(frozen=True)
class Config:
    steps: int = 937_500  # optimiser steps of all generations: 300 epochs of 50,000 pictures at this batch for each
    batch: int = 64  # pictures, or texts, a step
    generations: int = 3  # K, children after generation 0
    treatment: Literal["ban", "cwtm", "dkpp", "labels"] = "ban"  # what a child takes from the generation before
    labels: float = 0.0  # weight of the labels' cross-entropy beside it: 0 BAN, 1 BAN+L
    smoothing: float = 0.0  # epsilon of the labels' cross-entropy, spread over all classes
    result: Literal["last", "ensemble"] = "last"  # what is returned: child K, or the mean of all children
    optimizer: Literal["sgd", "adamw"] = "sgd"  # SGD with momentum 0.9, or AdamW
    lr: float = 0.1  # peak learning rate
    schedule: Literal["cosine", "step"] = "step"  # to 0 along a cosine, or a tenth after 1/2 and after 3/4
    warmup: float = 0.0  # part of the steps in which the learning rate rises
    weight_decay: float = 1e-4  # lambda
    clip: float = math.inf  # largest global norm of the gradient
    view: float = 0.0  # strength of the random shifts, turns and light changes; 0: the view that the data set gives
    flip: bool = False  # whether pictures are mirrored at random

    def __post_init__(self) -> None:
        chain.Config(**self.training(self.steps))
        require(self.treatment in TREATMENTS, f"treatment is one of {', '.join(TREATMENTS)}, not {self.treatment!r}")
        require(self.result in ("last", "ensemble"), f"result is 'last' or 'ensemble', not {self.result!r}")
        require(self.generations >= 0, f"generations must be 0 or more, not {self.generations}")
        require(self.labels >= 0 and self.view >= 0, "labels and view must be 0 or more, not "
                f"{self.labels} and {self.view}")
        require(0 <= self.smoothing < 1, f"smoothing must lie in [0, 1), not {self.smoothing}")

    def training(self, steps: int) -> dict[str, Any]:
        """Settings of one generation of `steps`."""
        same = ("batch", "optimizer", "lr", "schedule", "warmup", "weight_decay", "clip")
        return {"steps": steps, **{name: getattr(self, name) for name in same}}


EMBEDDED = Config(steps=1200, optimizer="adamw", lr=0.02, schedule="cosine", warmup=0.05, view=1.0)


def distill(
    network: Network,
    labelled: LabelledImages | None = None,
    corpus: TokenPairs | None = None,
    teacher: Classifier | CausalLM | None = None,
    config: Config = Config(),
    run: Run | None = None,
) -> nn.Module:
    """The last child, or the ensemble of all children, of `network`'s architecture.

    Give `labelled` (networks are classifiers) or `corpus` (they are causal language models). With `teacher` that is
    generation 0 and all steps go to the children; without, generation 0 is trained first, as long as each child.
    """
    run = begin(run)
    _check(network, labelled, corpus, teacher, config, run)
    data: Any = corpus if labelled is None else labelled
    say, terms = (next_tokens, token_terms) if labelled is None else (pictured, picture_terms)
    first = 0 if teacher is None else 1
    trained = config.generations + 1 - first

    def view(x: Tensor) -> Tensor:
        return random_view(x, run, config.view, flip=config.flip)

    def lesson(child: nn.Module, before: Any, k: int) -> nn.Module:
        steps = config.steps * (k + 1 - first) // trained - config.steps * (k - first) // trained
        settings = chain.Config(**config.training(steps))
        heard = None if config.treatment == "labels" else before
        viewed = view if labelled is not None and (config.view or config.flip) else None
        return taught(child, heard, data, terms(config, run), settings, run, say, viewed)

    made = generations(network, lesson, config.generations, run, teacher)
    return Ensemble(made[1:]) if config.result == "ensemble" else made[-1]


def picture_terms(config: Config, run: Run) -> Terms:
    """The loss of a classifier z under the treatment of the one before, p (None: the labels alone)."""

    def terms(p: Tensor | None, z: Tensor, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        if p is None:
            return {"ce": F.cross_entropy(z, batch["label"], label_smoothing=config.smoothing)}
        if config.treatment == "cwtm":
            named = {"cwtm": run.mean(*confidence_weighted(p, z, batch["label"]))}
        elif config.treatment == "dkpp":
            named = {"dkpp": signed_cross_entropy(permuted_target(p, run.rand(len(p), p.shape[1] - 1)), z)}
        else:
            named = {"ban": soft_cross_entropy(p, z)}
        if config.labels:
            named["ce"] = config.labels * F.cross_entropy(z, batch["label"], label_smoothing=config.smoothing)
        return named

    return terms


def token_terms(config: Config, run: Run) -> Terms:
    """The loss of a language model, mean over the tokens to be predicted."""

    def terms(p: Any, z: Any, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        named = {}
        if p is not None:
            named["ban"] = run.mean(*language_divergence(p, z, batch["target_mask"]))
        if p is None or config.labels:
            ce = run.mean(*language_cross_entropy(z, batch["input_ids"], batch["target_mask"]))
            named["ce"] = ce if p is None else config.labels * ce
        return named

    return terms


def _check(network: Network, labelled: Any, corpus: Any, teacher: Any, config: Config, run: Run) -> None:
    require((labelled is None) != (corpus is None), "classifiers learn from labelled pictures (labelled), language "
            f"models from texts (corpus): give one of them, not {'none' if labelled is None else 'both'}", DataError)
    require(config.generations >= (1 if teacher is not None or config.result == "ensemble" else 0),
            "without children there is nothing to return; generations must be 1 or more")
    if labelled is not None:
        run.check(Classifier, labelled, labels=True, network=network(), teacher=teacher)
        return
    require(config.treatment in ("ban", "labels") and config.result == "last" and config.smoothing == 0,
            "language models have the treatments 'ban' and 'labels', without smoothing, and give the last child")
    check_pairs("corpus", corpus)
    run.check(CausalLM, corpus, network=network(), teacher=teacher)


def tiny() -> dict[str, Any]:
    torch.manual_seed(0)

    def network() -> nn.Module:
        return nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(108, 4))

    data = TensorSet(image=torch.rand(14, 1, 8, 8), label=torch.arange(14) % 4)
    return {"network": network, "labelled": data, "teacher": network(),
            "config": Config(steps=6, batch=6, generations=2, treatment="dkpp", labels=0.5, result="ensemble",
                             view=1.0)}


# -------------------------------------------------------------------- the embedded experiment


def ground() -> dict[str, Any]:
    """300 digits of 16 pixels to train on, with right labels and with a tenth of them wrong, and 597 to test; 800 texts
    of the toy grammar and 400 to test."""
    train = digits(16, "train").select(range(300))
    return {"train": train, "wrong": noisy_labels(train, 0.1), "test": digits(16, "test"),
            "texts": grammar("train", 800), "test texts": grammar("test", 400)}


LANGUAGE = Config(steps=1200, batch=32, generations=1, labels=1.0, optimizer="adamw", lr=0.01, schedule="cosine",
                  warmup=0.05, weight_decay=0.01, clip=1.0)


def experiment(run: Run) -> dict[str, dict[str, float]]:
    """Every generation of every arm with the same architecture, pictures, views, steps and settings; those of one
    number have the same initial weights and data order. Accuracy on the 597 test pictures."""
    g = ground()
    each = EMBEDDED.steps // (EMBEDDED.generations + 1)
    parents: dict[str, nn.Module] = {}

    def network() -> nn.Module:
        return TinyConvNet(width=16)

    def larger() -> nn.Module:
        return TinyConvNet(width=24)

    def language() -> nn.Module:
        return LSTMLanguageModel(len(VOCABULARY), width=64)

    def parent(data: str) -> nn.Module:
        """Generation 0, trained once."""
        if data not in parents:
            if data == "texts":
                config = dataclasses.replace(LANGUAGE, generations=0, steps=LANGUAGE.steps // 2)
                parents[data] = distill(language, corpus=g["texts"], config=config, run=run)
            else:
                parents[data] = alone(data=data)
        return parents[data]

    def alone(make: Callable[[], nn.Module] = network, steps: int = each, data: str = "train", **changes: Any
              ) -> nn.Module:
        config = dataclasses.replace(EMBEDDED, generations=0, steps=steps, **changes)
        return distill(make, g[data], config=config, run=run)

    def measured(model: nn.Module) -> dict[str, float]:
        logits, label = predictions(model, g["test"], device=run.device)
        wrong = logits.argmax(-1) != label
        run.picture("test digits taken for another", g["test"].image[wrong][:40], columns=10)
        return {"accuracy": 1 - wrong.double().mean().item(), "calibration error": calibration_error(logits, label)}

    def children(count: int = 1, data: str = "train", teacher: Callable[[], nn.Module] | None = None, **changes: Any
                 ) -> Callable[[], dict[str, float]]:
        """The mean over the children (`accuracy`), each of them, and their ensemble."""

        def work() -> dict[str, float]:
            config = dataclasses.replace(EMBEDDED, generations=count, steps=count * each, result="ensemble", **changes)
            before = parent(data) if teacher is None else teacher()
            both: Any = distill(network, g[data], teacher=before, config=config, run=run)
            scores = [measured(child)["accuracy"] for child in both.members]
            named = {f"generation {k}": score for k, score in enumerate(scores, 1)}
            whole = measured(both)
            return {"accuracy": sum(scores) / count, **named, "ensemble": whole["accuracy"],
                    "calibration error": whole["calibration error"]}

        return work

    def perplexity(model: nn.Module) -> dict[str, float]:
        with run.aside("perplexity", model):
            return {"perplexity": math.exp(language_loss(model, g["test texts"]))}

    def spoken(**changes: Any) -> Callable[[], dict[str, float]]:
        config = dataclasses.replace(LANGUAGE, steps=LANGUAGE.steps // 2, **changes)
        return lambda: perplexity(distill(language, corpus=g["texts"], teacher=parent("texts"), config=config, run=run))

    return run.arms(
        {"generation 0": lambda: measured(parent("train")),
         "ban": children(3),
         "ban+l": children(labels=1.0),
         "cwtm": children(treatment="cwtm"),
         "dkpp": children(treatment="dkpp"),
         "independent": children(3, treatment="labels"),
         "generation 0, wrong labels": lambda: measured(parent("wrong")),
         "ban, wrong labels": children(data="wrong"),
         "language, generation 0": lambda: perplexity(parent("texts")),
         "language, ban+l": spoken()},
        extended={
            "ban+l, wrong labels": children(data="wrong", labels=1.0),
            "label smoothing": lambda: measured(alone(smoothing=0.1)),
            "trained four times as long": lambda: measured(alone(steps=EMBEDDED.steps)),
            "a larger network": lambda: measured(alone(larger)),
            "child of a larger network": children(teacher=lambda: alone(larger)),
            "child of a VGG": children(teacher=lambda: alone(lambda: SmallVGG(image_size=16, norm="batch"))),
            "language, ban": spoken(labels=0.0)})
