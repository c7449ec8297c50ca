"""Pruning a labelled set: what each way of scoring needs is trained or extracted here, behind one interface."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from stillhouse.data import pruning
from stillhouse.data.sets import column, fetch
from stillhouse.errors import require
from stillhouse.measures.hardness import el2n, from_the_median, gradient_norms
from stillhouse.parts.feature_taps import feature_tap
from stillhouse.recipes.supervised import View, check_training, optimizer_for
from stillhouse.run import Run, frozen, set_lr
from stillhouse.run.schedules import warmup

Way = Literal["random", "el2n", "grand", "forgetting", "ccs", "moderate", "kcenter", "herding"]
TRAINED = ("el2n", "grand", "forgetting", "ccs")
"""Ways whose scores come from networks that are trained for them."""
FEATURES = ("moderate", "kcenter", "herding")
"""Ways that look at the features of a trained network."""
WAYS = ("random", *TRAINED, *FEATURES)


@dataclass(frozen=True)
class Config:
    way: Way = "random"  # what decides
    fraction: float = 0.1  # f, the part that is kept
    balanced: bool = False  # whether it is taken of every class alike
    keep: Literal["hardest", "easiest"] = "hardest"  # which end of el2n, grand and forgetting
    repeats: int = 10  # networks over which a score is averaged
    steps: int = 4000  # optimiser steps of all these networks: 10 epochs of CIFAR at this batch
    batch: int = 128  # pictures a step
    optimizer: Literal["sgd", "adamw", "lars"] = "sgd"  # SGD with momentum 0.9, AdamW, or LARS with momentum 0.9
    lr: float = 0.1  # learning rate, constant after its warm-up
    warmup: float = 0.0  # part of the steps in which it rises
    weight_decay: float = 5e-4  # lambda
    hardest: float = 0.1  # beta of ccs, the part with the highest scores that is left out
    bins: int = 50  # strata of ccs

    def __post_init__(self) -> None:
        check_training(self.steps, self.batch, self.lr, self.warmup, self.weight_decay)
        require(self.way in WAYS, f"the way of pruning is one of {', '.join(WAYS)}, not {self.way!r}")
        require(0 < self.fraction <= 1, f"fraction is the part that is kept, in (0, 1], not {self.fraction}")
        require(self.keep in ("hardest", "easiest"), f"keep is 'hardest' or 'easiest', not {self.keep!r}")
        require(self.repeats >= 1, f"a score needs at least 1 network, not {self.repeats}")
        require(0 <= self.hardest < 1 and self.bins >= 1, "hardest lies in [0, 1) and bins is 1 or more; got "
                f"{self.hardest} and {self.bins}")


def kept(labelled: Any, network: Callable[[], nn.Module], teacher: Any, config: Config, run: Run,
         view: View | None = None) -> Int[Tensor, " kept"]:
    """The positions that are kept of the labelled pictures, in ascending order, by `config.way`.

    Scores come from fresh networks of the factory `network`, trained briefly on all of them; features from `teacher`.
    The result is kept by the run.
    """
    score = trained_score(labelled, network, config, run, view) if config.way in TRAINED else None
    return run.once(f"kept by {config.way}", lambda: _kept(labelled, score, teacher, config, run)).cpu()


def _kept(labelled: Any, score: Tensor | None, teacher: Any, config: Config, run: Run) -> Tensor:
    label, f, balanced = column(labelled, "label"), config.fraction, config.balanced
    if score is not None and config.way == "ccs":
        return pruning.by_coverage(score, label, f, balanced, config.hardest, config.bins)
    if score is not None:
        return pruning.by_score(score, label, f, balanced, highest=config.keep == "hardest")
    if config.way == "random":
        return pruning.at_random(label, f, balanced)
    features = features_of(teacher, labelled, run.device)
    if config.way == "moderate":
        return pruning.by_score(from_the_median(features, label), label, f, balanced, highest=False)
    return pruning.by_features(features, label, f, balanced, config.way)


def trained_score(labelled: Any, network: Callable[[], nn.Module], config: Config, run: Run, view: View | None = None
                  ) -> Float[Tensor, " n"]:
    """EL2N (which ccs uses too), GraNd or forgetting counts, mean over `config.repeats` networks; high is hard.

    A forgetting event is a picture that was right at one visit and is wrong at the next (Toneva et al. 2019); one that
    was never right counts as one more than it has visits. The counts change with random views.
    """
    total = torch.zeros(len(labelled))
    parts = [config.steps * (i + 1) // config.repeats - config.steps * i // config.repeats
             for i in range(config.repeats)]
    for i, steps in enumerate(parts):
        with run.scope(f"scoring {i}"):
            total += _one_score(labelled, network().to(run.device), steps, config, run, view)
    return total / config.repeats


def _one_score(labelled: Any, network: nn.Module, steps: int, config: Config, run: Run, view: View | None) -> Tensor:
    optimizer = optimizer_for(network.parameters(), config.optimizer, config.lr, config.weight_decay)
    n = len(labelled)
    seen = run.state(right=torch.zeros(n), ever=torch.zeros(n), forgotten=torch.zeros(n), visits=torch.zeros(n))
    network.train()
    for batch in run.loop("train", labelled, batch=config.batch, steps=steps, student=network, optimizer=optimizer,
                          seen=seen, drop_last=n >= config.batch):
        set_lr(optimizer, config.lr * warmup(run.progress, config.warmup))
        logits = network(view(batch["image"]) if view else batch["image"])
        if config.way == "forgetting":
            right = (logits.argmax(1) == batch["label"]).float()
            told = run.gather(torch.stack([batch["index"].float(), right], 1)).cpu()
            where, now = told.to(seen.right.dtype).unbind(1)
            at = where.long()
            seen.forgotten[at] += seen.right[at] * (1 - now)
            seen.right[at] = now
            seen.ever[at] = torch.maximum(seen.ever[at], now)
            seen.visits[at] += 1
        run.update(optimizer, ce=F.cross_entropy(logits, batch["label"]))
    if config.way == "forgetting":
        return torch.where(seen.ever > 0, seen.forgotten, seen.visits + 1)
    measure = _gradients if config.way == "grand" else _errors
    with frozen(network):
        return torch.cat([measure(network, part["image"].to(run.device), part["label"].to(run.device)).cpu()
                          for part in _parts(labelled)])


def _errors(network: nn.Module, image: Tensor, label: Tensor) -> Tensor:
    with torch.no_grad():
        return el2n(network(image).float(), label)


def _gradients(network: nn.Module, image: Tensor, label: Tensor) -> Tensor:
    return gradient_norms(network, image, label).detach()


def _parts(data: Any, batch: int = 256) -> Any:
    for start in range(0, len(data), batch):
        yield fetch(data, range(start, min(start + batch, len(data))))


def features_of(model: Any, data: Any, device: torch.device | str = "cpu") -> Float[Tensor, "n features"]:
    """What goes into a trained network's last linear layer, for every picture; in eval mode, on the CPU."""
    rows = []
    with frozen(model), torch.no_grad(), feature_tap(model) as tap:
        for part in _parts(data):
            model(part["image"].to(device))
            rows.append(tap().float().cpu())
    return torch.cat(rows)


def fresh_copies(model: nn.Module) -> Callable[[], nn.Module]:
    """A factory of copies of a network with newly drawn weights, layer by layer, where its layers know how
    (`reset_parameters`); parameters of others stay as they are."""

    def make() -> nn.Module:
        made = copy.deepcopy(model)
        for module in made.modules():
            if hasattr(module, "reset_parameters") and callable(module.reset_parameters):
                module.reset_parameters()
        return made

    return make
