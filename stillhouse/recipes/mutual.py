"""Mutual learning: several networks train together from scratch, each on the labels and on what the others answer.

`learn_together` is the loop that online methods share; `train` is deep mutual learning (DML, Zhang et al. 2018) and,
with another target, collaborative learning (KDCL, Guo et al. 2020).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from stillhouse.errors import RoleError, require
from stillhouse.measures.divergences import kl
from stillhouse.protocols import Classifier, LabelledImages
from stillhouse.recipes.supervised import View, check_training, optimizer_for
from stillhouse.run import Run, begin, set_lr
from stillhouse.run.schedules import warmup_cosine

Update = Literal["together", "in turn"]
Target = Literal["peers", "best", "min-logit"]

Objective = Callable[[int, list[Tensor], Tensor], dict[str, Tensor]]
"""objective(k, logits, label): the named terms that network k minimises. logits[k] carries its gradient, those of the
others are detached."""


@dataclass(frozen=True)
class Config:
    steps: int = 1000  # optimiser steps of every network
    batch: int = 64  # pictures a step
    optimizer: Literal["sgd", "adamw", "lars"] = "sgd"  # SGD with momentum 0.9, AdamW, or LARS with momentum 0.9
    lr: float = 0.1  # peak learning rate of every network; a cosine to 0
    warmup: float = 0.05  # part of the steps in which the learning rate rises
    weight_decay: float = 5e-4  # lambda
    temperature: float = 1.0  # T; DML: 1, KDCL: 2
    weight: float = 1.0  # of what the others answer, beside the labels
    target: Target = "peers"  # "peers" (DML): each of the others; one for all (KDCL): "best" (Naive), "min-logit"
    update: Update = "together"  # on the answers from before the step, or one network after another on fresh ones

    def __post_init__(self) -> None:
        check_training(self.steps, self.batch, self.lr, self.warmup, self.weight_decay)
        require(self.temperature > 0 and self.weight >= 0, "temperature must be above 0 and weight not negative; got "
                f"{self.temperature} and {self.weight}")
        require(self.target in ("peers", "best", "min-logit"), "target is 'peers', 'best' or 'min-logit', not "
                f"{self.target!r}")
        require(self.update in ("together", "in turn"), f"update is 'together' or 'in turn', not {self.update!r}")


def train(
    networks: Sequence[nn.Module],
    labelled: LabelledImages,
    config: Config = Config(),
    run: Run | None = None,
    view: View | None = None,
) -> list[nn.Module]:
    """Train all networks in place on the same batches; they are returned.

    L_k = CE(y, z_k) + weight T^2 KL(target || softmax(z_k / T)), where "peers" takes the mean of the divergences from
    each of the others (DML, equation 8), "best" the network with the lowest cross-entropy on that picture and
    "min-logit" the lowest logits after that of the label is taken off (KDCL, section 3.2). Targets carry no gradient.
    Raises RoleError for fewer than two networks.
    """
    run = begin(run)
    check_networks(networks, labelled, run)

    def objective(k: int, logits: list[Tensor], label: Tensor) -> dict[str, Tensor]:
        own = logits[k]
        if config.target == "peers":
            targets = [z for j, z in enumerate(logits) if j != k]
        else:
            targets = [TARGETS[config.target](torch.stack([z.detach() for z in logits]), label)]
        apart = torch.stack([kl(z, own, config.temperature) for z in targets]).mean()
        return {"ce": F.cross_entropy(own, label), "kd": config.weight * apart}

    learn_together(networks, labelled, objective, config, run, view)
    return list(networks)


def check_networks(networks: Sequence[nn.Module], labelled: Any, run: Run) -> None:
    """Before any work: at least two different networks over the same classes, and labels. Raises RoleError."""
    require(len(networks) >= 2, f"mutual learning needs at least 2 networks, not {len(networks)}", RoleError)
    require(len({id(n) for n in networks}) == len(networks), "the networks must be different objects; one is given "
            "twice", RoleError)
    run.check(Classifier, labelled, labels=True, networks=list(networks))


def learn_together(networks: Sequence[nn.Module], labelled: Any, objective: Objective, config: Any, run: Run,
                   view: View | None = None, name: str = "mutual") -> None:
    """Train all networks in place in the stage `name`, each with an optimizer of its own; all see the same view.

    `config` has the fields steps, batch, optimizer, lr, warmup, weight_decay and update. "together": every network
    learns from the answers of before the step, one forward pass each. "in turn": after network k has moved, it
    answers again (without gradient) for those after it (DML, algorithm 1), one more forward pass for all but the last.
    """
    optimizers = [optimizer_for(n.parameters(), config.optimizer, config.lr, config.weight_decay) for n in networks]
    for network in networks:
        network.train()
    held: dict[str, Any] = {f"optimizer{i}": optimizer for i, optimizer in enumerate(optimizers)}
    for batch in run.loop(name, labelled, batch=config.batch, steps=config.steps, student=networks[0],
                          peers=list(networks[1:]), drop_last=len(labelled) >= config.batch, **held):
        x = view(batch["image"]) if view else batch["image"]
        answers = [network(x) for network in networks]
        everything: dict[str, Tensor] = {}
        for k, optimizer in enumerate(optimizers):
            set_lr(optimizer, config.lr * warmup_cosine(run.progress, config.warmup))
            logits = [z if j == k else z.detach() for j, z in enumerate(answers)]
            terms = {f"{term}_{k}": value for term, value in objective(k, logits, batch["label"]).items()}
            if config.update == "together":
                everything |= terms
                continue
            run.update(optimizer, clip=None, **terms)
            if k + 1 < len(networks):
                with torch.no_grad():
                    answers[k] = networks[k](x)
        if everything:
            run.update(optimizers, clip=None, **everything)


def best_of(logits: Float[Tensor, "networks batch classes"], label: Int[Tensor, " batch"]
            ) -> Float[Tensor, "batch classes"]:
    """For every sample the logits of the network with the lowest cross-entropy (KDCL-Naive)."""
    ce = torch.stack([F.cross_entropy(z, label, reduction="none") for z in logits])
    return logits[ce.argmin(0), torch.arange(len(label), device=label.device)]


def min_logit(logits: Float[Tensor, "networks batch classes"], label: Int[Tensor, " batch"]
              ) -> Float[Tensor, "batch classes"]:
    """min_k (z_k - z_k[label]), class by class (KDCL-MinLogit): no cross-entropy is above that of the best."""
    at_label = logits.gather(-1, label.expand(logits.shape[:-1])[..., None])
    return (logits - at_label).amin(0)


TARGETS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"best": best_of, "min-logit": min_logit}
