"""BD-KD: a large and a small network learn together from scratch; the small one becomes accurate and well calibrated.

On a batch with labels y, with z_t of the large network, z_s of the small one, p = softmax(z / tau), and the entropies
H(p) of every sample, in nats and without gradient:

    L_S = CE(y, z_s) + tau^2 mean_i [ w_i KL(p_t || p_s) + v_i KL(p_s || p_t) ],      no gradient to the large network
    L_T = CE(y, z_t) + tau^2 mean_i KL(p_s || p_t),                                   no gradient to the small one
    (w_i, v_i) = (beta, 1) where H(p_t) > H(p_s),  (1, beta) elsewhere.

A small network that is the surer of the two is told to cover (forward KL), one that is too flat to concentrate
(reverse KL). The large network's loss is not balanced. With K large networks, those of the small one's loss are
averaged, and each large one takes the mean over all others.

Amara et al. 2022, "BD-KD: Balancing the Divergences for Online Knowledge Distillation". That both divergences, weights
of every sample and the gap of the entropies are used is the paper's; which side is stressed, beta and tau are read from
its reasoning, as no code is known. `gate="opposite"` and `normalise` (both weights over 1 + beta) are offered beside.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stillhouse.data.digits import digits
from stillhouse.data.sets import TensorSet
from stillhouse.errors import RoleError, require
from stillhouse.evaluate.calibration import fit_temperature, reliability, reliability_figure, scores
from stillhouse.evaluate.claims import Claim
from stillhouse.evaluate.classification import accuracy, predictions
from stillhouse.measures.balanced import Gate, balanced_kl
from stillhouse.measures.divergences import kl
from stillhouse.models.convnets import SmallResNet, TinyConvNet
from stillhouse.protocols import Classifier, LabelledImages, Network
from stillhouse.recipes import kd, mutual, supervised
from stillhouse.recipes.mutual import Update, check_networks, learn_together
from stillhouse.recipes.supervised import check_training
from stillhouse.recipes.views import random_view
from stillhouse.run import Run, begin

NUMBER = 134

CLAIMS = [
    Claim("learning beside the large network beats learning alone",
          lambda a: a["bd-kd"]["accuracy"] - a["alone"]["accuracy"]),
    Claim("its negative log likelihood is lower than alone",
          lambda a: a["alone"]["nll"] - a["bd-kd"]["nll"]),
    Claim("its Brier score is lower than alone",
          lambda a: a["alone"]["brier"] - a["bd-kd"]["brier"]),
    Claim("it is at most one point below deep mutual learning",
          lambda a: a["bd-kd"]["accuracy"] - a["mutual learning"]["accuracy"] + 0.01),
    Claim("its negative log likelihood is at most 0.02 above that of deep mutual learning",
          lambda a: a["mutual learning"]["nll"] - a["bd-kd"]["nll"] + 0.02),
    Claim("the large network loses at most one point against learning alone",
          lambda a: a["bd-kd"]["large network"] - a["large alone"]["accuracy"] + 0.01),
    Claim("its calibration error is lower than that of deep mutual learning",
          lambda a: a["mutual learning"]["ece"] - a["bd-kd"]["ece"], report=True),
    Claim("its calibration error is lower than alone",
          lambda a: a["alone"]["ece"] - a["bd-kd"]["ece"], report=True),
    Claim("its calibration error is lower than alone with a temperature fitted to 150 more labels",
          lambda a: a["alone"]["ece, scaled"] - a["bd-kd"]["ece"], report=True),
    Claim("its calibration error is lower than with the opposite gate",
          lambda a: a["opposite gate"]["ece"] - a["bd-kd"]["ece"], report=True),
    Claim("its negative log likelihood is lower than with equal weights",
          lambda a: a["equal weights"]["nll"] - a["bd-kd"]["nll"], report=True),
    Claim("its negative log likelihood is lower than with the reverse divergence alone",
          lambda a: a["reverse only"]["nll"] - a["bd-kd"]["nll"], report=True),
    Claim("it beats KD from the large network trained before",
          lambda a: a["bd-kd"]["accuracy"] - a["kd"]["accuracy"], report=True),
    Claim("it beats collaborative learning (KDCL)",
          lambda a: a["bd-kd"]["accuracy"] - a["kdcl"]["accuracy"], report=True),
]


@dataclass(frozen=True)
class Config:
    steps: int = 78_000  # optimiser steps of every network: 200 epochs of 50,000 pictures at this batch
    batch: int = 128  # pictures a step
    optimizer: Literal["sgd", "adamw"] = "sgd"  # SGD with momentum 0.9, or AdamW
    lr: float = 0.1  # peak learning rate of every network; a cosine to 0
    warmup: float = 0.0  # part of the steps in which it rises
    weight_decay: float = 5e-4  # lambda
    temperature: float = 4.0  # tau of both divergences and of the entropies
    beta: float = 2.0  # weight of the stressed divergence, 1 or more; 1: equal weights (Jeffreys)
    forward: float = 1.0  # weight of KL(p_t || p_s) in the small network's loss
    reverse: float = 1.0  # weight of KL(p_s || p_t) there; 0, with beta = 1: deep mutual learning
    gate: Gate = "entropy"  # "opposite" stresses the other divergence
    normalise: bool = False  # divide both weights by 1 + beta
    regulariser: float = 1.0  # weight of KL(p_s || p_t) in the large network's loss
    update: Update = "together"  # on the answers from before the step, or the small network first, then the large
    peers: int = 1  # how many large networks `network` makes
    view: float = 0.0  # strength of random shifts, turns and light changes, the same for all; 0: the pictures as given

    def __post_init__(self) -> None:
        check_training(self.steps, self.batch, self.lr, self.warmup, self.weight_decay)
        require(self.temperature > 0 and self.beta >= 1, "temperature must be above 0 and beta 1 or more; got "
                f"{self.temperature} and {self.beta}")
        require(min(self.forward, self.reverse, self.regulariser) >= 0, "forward, reverse and regulariser are weights "
                "and must not be negative")
        require(self.gate in ("entropy", "opposite") and self.update in ("together", "in turn"), "gate is 'entropy' or "
                f"'opposite' and update 'together' or 'in turn'; got {self.gate!r} and {self.update!r}")
        require(self.peers >= 1 and self.view >= 0, f"peers must be 1 or more and view not negative; got {self.peers} "
                f"and {self.view}")


EMBEDDED = Config(steps=180, batch=50, temperature=3.0)


def distill(
    student: Classifier,
    network: Network,
    labelled: LabelledImages,
    config: Config = Config(),
    run: Run | None = None,
) -> nn.Module:
    """Train the student in place, together with what `network` makes; the student is returned.

    `network` is called once for every large network. They end trained too: keep them where the factory makes them.
    """
    run = begin(run)
    require(callable(network), f"network must be a factory of networks, not {type(network).__name__}", RoleError)
    assert isinstance(student, nn.Module)
    networks = [student, *(network().to(run.device) for _ in range(config.peers))]
    check_networks(networks, labelled, run)

    def objective(k: int, logits: list[Tensor], label: Tensor) -> dict[str, Tensor]:
        ce = F.cross_entropy(logits[k], label)
        others = [z for j, z in enumerate(logits) if j != k]
        if k == 0:
            return {"ce": ce, "balanced": torch.stack([balanced(z, logits[0], config) for z in others]).mean()}
        apart = torch.stack([kl(z, logits[k], config.temperature) for z in others]).mean()
        return {"ce": ce, "kd": config.regulariser * apart}

    view = (lambda x: random_view(x, run, config.view)) if config.view else None
    learn_together(networks, labelled, objective, config, run, view, name="bd-kd")
    return student


def balanced(z_t: Tensor, z_s: Tensor, config: Config) -> Tensor:
    """tau^2 mean_i [ w_i KL(p_t || p_s) + v_i KL(p_s || p_t) ] as `config` weighs it."""
    return balanced_kl(z_t, z_s, config.beta, config.temperature, forward=config.forward, reverse=config.reverse,
                       gate=config.gate, normalise=config.normalise)


def tiny() -> dict[str, Any]:
    torch.manual_seed(0)

    def make(width: int) -> nn.Module:
        return nn.Sequential(nn.Conv2d(1, width, 3), nn.ReLU(), nn.Flatten(), nn.Linear(width * 36, 4))

    return {"student": make(2), "network": lambda: make(4),
            "labelled": TensorSet(image=torch.rand(10, 1, 8, 8), label=torch.arange(10) % 4),
            "config": Config(steps=4, batch=4, lr=0.1, peers=2, update="in turn", view=1.0)}


# -------------------------------------------------------------------- the embedded experiment


def experiment(run: Run) -> dict[str, dict[str, float]]:
    """150 clean digits of 16 pixels for 60 epochs, 597 to test; networks of 1,200 and 78,000 parameters.

    All arms with the same networks, initial weights, batches and steps. "large network" is the large one's accuracy.
    """
    train = digits(16, "train")
    data: Any = train.select(range(150))
    held_out: Any = train.select(range(150, 300))
    test = digits(16, "test")
    training = {name: getattr(EMBEDDED, name) for name in ("steps", "batch", "lr", "warmup", "weight_decay")}

    def measured(student: nn.Module, **extra: float) -> dict[str, float]:
        run.picture("reliability", reliability_figure(reliability(*predictions(student, test, device=run.device))))
        return {**scores(student, test, run.device), **extra}

    def large() -> nn.Module:
        return SmallResNet().to(run.device)

    def small() -> nn.Module:
        run.begin()
        return TinyConvNet(width=4).to(run.device)

    def learn(how: Callable[[nn.Module, Callable[[], nn.Module]], Any]) -> dict[str, float]:
        made: list[nn.Module] = []

        def network() -> nn.Module:
            made.append(large())
            return made[-1]

        student = small()
        how(student, network)
        return measured(student, **{"large network": accuracy(made[0], test, device=run.device)})

    def bd_kd(**changes: Any) -> Callable[[], dict[str, float]]:
        config = dataclasses.replace(EMBEDDED, **changes)
        return lambda: learn(lambda student, network: distill(student, network, data, config, run))

    def mutual_learning(**changes: Any) -> Callable[[], dict[str, float]]:
        config = mutual.Config(**training, temperature=EMBEDDED.temperature, **changes)

        def how(student: nn.Module, network: Callable[[], nn.Module]) -> None:
            run.begin()
            mutual.train([student, network()], data, config, run)

        return lambda: learn(how)

    def alone() -> dict[str, float]:
        student = supervised.train(small(), data, supervised.Config(**training), run)
        scale = fit_temperature(*predictions(student, held_out, device=run.device))
        scaled = scores(student, test, run.device, scale)
        return measured(student, **{f"{name}, scaled": scaled[name] for name in ("ece", "nll", "brier")})

    def large_alone() -> nn.Module:
        run.begin()
        return supervised.train(large(), data, supervised.Config(**training), run)

    def offline() -> dict[str, float]:
        teacher = large_alone()
        config = kd.Config(**training, temperature=EMBEDDED.temperature, alpha=0.9)
        return measured(kd.distill(teacher, small(), data, config, run))

    return run.arms(
        {"alone": alone,
         "large alone": lambda: measured(large_alone()),
         "mutual learning": mutual_learning(),
         "bd-kd": bd_kd()},
        extended={"opposite gate": bd_kd(gate="opposite"),
                  "equal weights": bd_kd(beta=1.0),
                  "reverse only": bd_kd(forward=0.0),
                  "normalised": bd_kd(normalise=True),
                  "in turn": bd_kd(update="in turn"),
                  "no regulariser": bd_kd(regulariser=0.0),
                  "two large networks": bd_kd(peers=2),
                  "kdcl": mutual_learning(target="min-logit"),
                  "kd": offline})
