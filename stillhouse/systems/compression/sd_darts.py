"""SD-DARTS: a search for an architecture whose supernet learns from its own past, so that cutting it costs less.

A supernet computes on every edge sum_o softmax(alpha)_o o(x). Two steps alternate, on two halves of the data:

    alpha <- alpha - eta_alpha grad_alpha L_val(w, alpha),         L_val = CE (+ beta T^2 KL(p_vote || p)),
    w <- w - eta_w grad_w L_train(w, alpha),                       L_train = CE + lambda T^2 KL(p_vote || p).

p_vote is the vote of the last K snapshots of the supernet, each with the w, the alpha and the statistics of its time;
before there is one the step is that of DARTS, which lambda = beta = 0 is throughout. On every node the two strongest
edges are kept, on every edge the strongest operation, and the network that is left is trained from scratch.

Zhu et al. 2023, "Improving Differentiable Architecture Search via Self-Distillation", on Liu et al. 2019, "DARTS". No
code was published and the equations were not at hand. Chosen here: K = 3, one snapshot an epoch, the mean of the
softened probabilities as vote, no distillation in the step of alpha. Other choices are values of the config, as are
random smoothing (SDARTS, Chen and Hsieh 2020), an EMA teacher, and a random architecture (`search=0`). The second order
unrolls plain gradient descent, exactly, without the momentum and weight decay of the released DARTS; random shifts
(`final.view`) take the place of padding and crops. The supernet is built here, so there is no role for a network.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stillhouse.data.digits import digits
from stillhouse.data.sets import TensorSet, column, fetch, subset
from stillhouse.errors import DataError, require
from stillhouse.evaluate.claims import Claim
from stillhouse.evaluate.classification import accuracy
from stillhouse.evaluate.cost import parameters
from stillhouse.evaluate.landscape import extreme_curvatures, mean_sharpness
from stillhouse.evaluate.recalibrate import recalibrated
from stillhouse.hub.architectures import remember
from stillhouse.measures.divergences import kl
from stillhouse.models.cells import CellNet, Supernet, space_named
from stillhouse.parts.ensembles import vote_log_probs
from stillhouse.parts.snapshots import Snapshots, listening, traceless
from stillhouse.protocols import Classifier, LabelledImages
from stillhouse.recipes import cell_training
from stillhouse.recipes.bilevel import unrolled_gradient
from stillhouse.recipes.supervised import check_training, optimizer_for
from stillhouse.run import Run, begin, set_lr
from stillhouse.run.schedules import cosine
from stillhouse.run.seeds import derive

NUMBER = 129
Terms = Callable[[Tensor], dict[str, Any]]

CLAIMS = [
    Claim("the loss is flatter in alpha than after plain DARTS",
          lambda a: a["darts"]["sharpness"] - a["sd-darts"]["sharpness"]),
    Claim("cutting the supernet costs at most a point more than after plain DARTS",
          lambda a: a["darts"]["gap"] - a["sd-darts"]["gap"] + 0.01),
    Claim("the network found is at most half a point worse than that of plain DARTS",
          lambda a: a["sd-darts"]["accuracy"] - a["darts"]["accuracy"] + 0.005),
    Claim("and at most half a point worse than random architectures",
          lambda a: a["sd-darts"]["accuracy"] - a["random"]["accuracy"] + 0.005),
    Claim("the dominant eigenvalue of the Hessian in alpha is smaller than after plain DARTS",
          lambda a: abs(a["darts"]["eigenvalue"]) - abs(a["sd-darts"]["eigenvalue"]), report=True),
    Claim("the network found is better than that of plain DARTS",
          lambda a: a["sd-darts"]["accuracy"] - a["darts"]["accuracy"], report=True),
    Claim("cutting costs less than after plain DARTS", lambda a: a["darts"]["gap"] - a["sd-darts"]["gap"], report=True),
    Claim("at a distance at which operations change places the loss rises less than after plain DARTS",
          lambda a: a["darts"]["sharpness, far"] - a["sd-darts"]["sharpness, far"], report=True),
    Claim("three teachers leave a flatter loss than one", lambda a: a["one teacher"]["sharpness"]
          - a["sd-darts"]["sharpness"], report=True),
    Claim("cutting costs less than after random smoothing",
          lambda a: a["random smoothing"]["gap"] - a["sd-darts"]["gap"], report=True),
    Claim("cutting costs less than with an EMA teacher",
          lambda a: a["ema teacher"]["gap"] - a["sd-darts"]["gap"], report=True),
    Claim("there are fewer skip connections than plain DARTS chooses",
          lambda a: a["darts"]["skips"] - a["sd-darts"]["skips"], report=True),
]


@dataclass(frozen=True)
class Config:
    steps: int = 331_500  # steps of w in both phases: 50 epochs of 390, then 600 of 520
    search: float = 1 / 17  # part of them that searches; 0: a random architecture
    batch: int = 64  # pictures of each half a step of the search
    space: Literal["darts", "nas-bench-201"] = "darts"  # kind of cells
    operations: tuple[str, ...] | None = None  # O; None: all of the space
    nodes: int | None = None  # of a cell beside its inputs; None: 4 in darts, 3 in nas-bench-201
    cells: int = 8  # of the supernet
    channels: int = 16  # of its first cell
    final_cells: int = 20  # of the network that is returned
    final_channels: int = 36  # of its first cell
    weight: float = 1.0  # lambda
    alpha_weight: float = 0.0  # beta
    temperature: float = 2.0  # T
    snapshots: int = 3  # K
    interval: int | None = None  # steps from one snapshot to the next; None: an epoch
    vote: Literal["mean", "majority", "weighted"] = "mean"  # of the snapshots; weighted by their validation loss
    past: Literal["snapshots", "ema"] = "snapshots"  # who teaches: the snapshots, or one running average
    decay: float = 0.99  # of the average
    norm: Literal["batch", "running"] = "batch"  # statistics that BatchNorm in a teacher uses
    perturb: float = 0.0  # largest uniform noise on alpha in the step of w; it rises from 0 (SDARTS: 0.3)
    order: Literal[1, 2] = 1  # 2: alpha's gradient goes through one step of w, with xi = eta_w
    optimizer: Literal["sgd", "adamw"] = "sgd"  # of w: SGD with momentum 0.9, or AdamW
    lr: float = 0.025  # eta_w; a cosine to lr_min
    lr_min: float = 0.001
    weight_decay: float = 3e-4  # of w
    clip: float = 5.0  # largest global norm of w's gradient
    alpha_lr: float = 3e-4  # eta_alpha; Adam, betas 0.5 and 0.999
    alpha_weight_decay: float = 1e-3
    final: cell_training.Config = field(default_factory=cell_training.Config)  # training of the network found

    def __post_init__(self) -> None:
        check_training(self.steps, self.batch, self.lr, 0.0, self.weight_decay)
        space_named(self.space)
        require(0 <= self.search <= 1, f"search is a part of the steps in [0, 1], not {self.search}")
        require(min(self.weight, self.alpha_weight, self.perturb, self.lr_min, self.alpha_weight_decay) >= 0,
                "weight, alpha_weight, perturb, lr_min and alpha_weight_decay must not be negative")
        require(min(self.temperature, self.alpha_lr, self.clip) > 0, "temperature, alpha_lr and clip must be above 0")
        require(self.snapshots >= 1 and (self.interval is None or self.interval >= 1) and 0 <= self.decay <= 1,
                "snapshots and interval must be 1 or more, and decay lie in [0, 1]")
        for name, words in (("vote", ("mean", "majority", "weighted")), ("past", ("snapshots", "ema")),
                            ("norm", ("batch", "running")), ("order", (1, 2))):
            require(getattr(self, name) in words, f"{name} is one of {words}, not {getattr(self, name)!r}")


def distill(
    labelled: LabelledImages,
    validation: LabelledImages | None = None,
    config: Config = Config(),
    run: Run | None = None,
) -> nn.Module:
    """Search an architecture for the data and train it from scratch on `labelled`; the `CellNet` is returned.

    w learns from `labelled` and alpha from `validation`; without it, from one half of `labelled` each. The result says
    its architecture (`genotype`) and keeps the searched supernet with alpha beside it (`supernet`, not saved).
    """
    run = begin(run)
    train, held_out, shape = checked(labelled, validation, config, run)
    supernet = Supernet(config.space, **shape, channels=config.channels, cells=config.cells, nodes=config.nodes,
                        operations=config.operations).to(run.device)
    for given in (train, held_out):
        run.check(Classifier, given, network=supernet, labels=True)
    steps = round(config.search * config.steps)
    search(supernet, train, held_out, steps, config, run)
    genotype = str(supernet.genotype)
    run.say(f"found: {genotype}")
    options: dict[str, Any] = {"space": config.space, **shape, "channels": config.final_channels,
                               "cells": config.final_cells}
    words = ",".join(f"{name}={value}" for name, value in options.items())
    network = remember(CellNet(genotype, **options), f"cell-net:genotype={genotype},{words}").to(run.device)
    cell_training.train(network, labelled, config.steps - steps, config.final, run)
    network.__dict__["supernet"] = supernet
    run.picture("operations of the edges", chart(supernet))
    return network


def search(supernet: Supernet, train: Any, held_out: Any, steps: int, config: Config, run: Run) -> None:
    """The bi-level search; w and alpha of the supernet are trained in place."""
    w = {name: p for name, p in supernet.named_parameters() if not name.startswith("alpha.")}
    optimizer = optimizer_for(w.values(), config.optimizer, config.lr, config.weight_decay)
    outer = torch.optim.Adam(supernet.alpha.parameters(), config.alpha_lr, (0.5, 0.999),
                             weight_decay=config.alpha_weight_decay)
    taught = config.weight > 0 or config.alpha_weight > 0
    past = Snapshots(supernet, config.snapshots if config.past == "snapshots" else 1, config.norm) if taught else None
    since: Any = run.state(loss=torch.zeros((), device=run.device), count=0)
    data = {"train": train, "validation": held_out}
    supernet.train()
    for batch in run.loop("search", data, batch={n: min(config.batch, len(d)) for n, d in data.items()}, steps=steps,
                          drop_last=True, student=supernet, optimizer=optimizer, outer=outer, past=past, since=since):
        lr = config.lr_min + (config.lr - config.lr_min) * cosine(run.progress)
        set_lr(optimizer, lr)
        (x, y), (u, v) = ((batch[name]["image"], batch[name]["label"]) for name in data)
        noise = perturbation(supernet, config.perturb * run.progress, run) if config.perturb else None
        of_w = partial(terms, y=y, target=vote(past, x, config.weight, config), weight=config.weight, config=config)
        of_alpha = partial(terms, y=v, target=vote(past, u, config.alpha_weight, config), weight=config.alpha_weight,
                           config=config)
        if config.order == 1:
            named = of_alpha(supernet(u))
            run.update(outer, **{f"validation_{name}": term for name, term in named.items()})
            loss = named["ce"]
        else:
            loss, gradient = through_a_step(supernet, w, (x, noise, of_w), (u, of_alpha), lr)
            for alpha, g in zip(supernet.alpha.values(), gradient, strict=True):
                alpha.grad = g
            run.log(validation=loss)
            run.step(outer)
        run.update(optimizer, clip=config.clip, **of_w(supernet(x, supernet.weights(noise))))
        since.loss, since.count = since.loss + loss.detach(), since.count + 1
        if past is not None and config.past == "ema" and len(past):
            past.follow(supernet, config.decay)
        elif past is not None and (run.last_of_epoch if config.interval is None
                                   else (run.k + 1) % config.interval == 0):
            past.push(supernet, since.loss / since.count)
            since.loss, since.count = torch.zeros_like(since.loss), 0


def vote(past: Snapshots | None, x: Tensor, weight: float, config: Config) -> Tensor | None:
    """T log p_vote, the logits whose softmax at temperature T is the teachers' vote; None before the first snapshot."""
    if past is None or not weight or not len(past):
        return None
    scores = torch.stack(past.scores)
    return config.temperature * vote_log_probs(past.answers(x), config.vote, config.temperature, scores)


def terms(z: Tensor, y: Tensor, target: Tensor | None, weight: float, config: Config) -> dict[str, Any]:
    """The cross-entropy, and weight T^2 KL(p_vote || p) where there is a vote."""
    named = {"ce": F.cross_entropy(z, y)}
    if target is not None:
        named["kd"] = weight * kl(target, z, config.temperature)
    return named


def through_a_step(supernet: Supernet, w: Mapping[str, Tensor], train: tuple[Tensor, Any, Terms],
                   validation: tuple[Tensor, Terms], xi: float) -> tuple[Tensor, list[Tensor]]:
    """L_val after one step of w, and its gradient in alpha; both losses with their distillation."""
    x, noise, of_w = train
    u, of_alpha = validation

    def train_loss(state: Mapping[str, Tensor]) -> Tensor:
        return total(of_w(traceless(supernet, x, supernet.weights(noise), state=state)))

    def validation_loss(state: Mapping[str, Tensor]) -> Tensor:
        return total(of_alpha(traceless(supernet, u, state=state)))

    return unrolled_gradient(train_loss, validation_loss, w, list(supernet.alpha.values()), xi)


def total(named: Mapping[str, Tensor]) -> Tensor:
    return torch.stack(list(named.values())).sum()


def perturbation(supernet: Supernet, size: float, run: Run) -> dict[str, Tensor]:
    """Uniform noise in [-size, size] on every alpha, the same on all processes."""
    return {kind: size * (2 * torch.rand(a.shape, generator=run.shared) - 1).to(a)
            for kind, a in supernet.alpha.items()}


def checked(labelled: Any, validation: Any, config: Config, run: Run) -> tuple[Any, Any, dict[str, int]]:
    """What w and what alpha learns from, and the channels and classes of the data. Raises DataError for labels that do
    not number the classes from 0 without gaps."""
    given = [labelled] if validation is None else [labelled, validation]
    image, *_ = (run.check(Classifier, part, labels=True)["image"] for part in given)
    found = torch.cat([column(part, "label") for part in given]).unique().tolist()
    require(found == list(range(len(found))), "labels number the classes from 0 without gaps; the data has "
            f"{len(found)} classes, the first labelled {found[0]} and the last {found[-1]}", DataError)
    shape = {"channels_in": image.shape[1], "classes": len(found)}
    if validation is not None:
        return labelled, validation, shape
    require(len(labelled) >= 2, "w and alpha learn from different pictures; give two or more", DataError)
    order = torch.randperm(len(labelled), generator=torch.Generator().manual_seed(derive("halves", run.seed)))
    middle = len(order) // 2
    return subset(labelled, order[:middle]), subset(labelled, order[middle:]), shape


def chart(supernet: Supernet) -> Any:
    """softmax(alpha) of every edge; what is kept is framed."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    kept = supernet.masked(supernet.genotype)
    figure = Figure(figsize=(1.5 + 3.2 * len(kept), 4), layout="constrained")
    for axis, (kind, weights) in zip(figure.subplots(1, len(kept), squeeze=False)[0], supernet.weights().items(),
                                     strict=True):
        axis.imshow(weights.detach().cpu().tolist(), vmin=0, cmap="Blues", aspect="auto")
        for edge, operation in kept[kind].nonzero().tolist():
            axis.add_patch(Rectangle((operation - 0.5, edge - 0.5), 1, 1, fill=False, edgecolor="#c0392b"))
        axis.set_xticks(range(len(supernet.operations)), supernet.operations, rotation=60, ha="right")
        axis.set(ylabel="edge", title=kind)
    return figure


def tiny() -> dict[str, Any]:
    torch.manual_seed(0)
    data = TensorSet(image=torch.randn(12, 1, 4, 4), label=torch.arange(12) % 3)
    final = cell_training.Config(batch=6, drop_path=0.3)
    return {"labelled": data, "validation": data.select(range(6)),
            "config": Config(steps=6, search=0.7, batch=4, operations=("none", "skip_connect", "conv_3x3"), nodes=2,
                             cells=2, channels=2, final_cells=2, final_channels=2, snapshots=2, interval=1,
                             alpha_weight=0.5, vote="weighted", perturb=0.1, final=final)}


# -------------------------------------------------------------------- the embedded experiment

EMBEDDED = Config(
    steps=220, search=100 / 220, nodes=2, cells=2, channels=4,
    operations=("none", "skip_connect", "conv_3x3", "dil_conv_3x3", "avg_pool_3x3"),
    final_cells=3, final_channels=4, temperature=1.0, lr=0.2, lr_min=0.0, alpha_lr=0.02,
    final=cell_training.Config(batch=64, lr=0.1, warmup=0.05, auxiliary=0.0, drop_path=0.0, erase=0.0))


def ground() -> dict[str, Any]:
    """Digits of 8 pixels: 700 for w and for the network found, 500 for alpha, 597 to test."""
    train = digits(8, "train")
    return {"train": train.select(range(700)), "validation": train.select(range(700, 1200)), "test": digits(8, "test")}


NEAR, FAR = 1.0, 6.0
"""Distances in alpha at which sharpness is measured: about that of the noise of SDARTS, and one at which operations
change places."""


def diagnosed(supernet: Supernet, g: dict[str, Any], run: Run) -> dict[str, float]:
    """How flat the cross-entropy of 200 validation pictures is in alpha, with the statistics of that batch and in the
    same directions for all arms; and what cutting costs on the test pictures, with statistics measured anew before and
    after."""
    def acc(model: nn.Module) -> float:
        return accuracy(recalibrated(model, g["train"], device=run.device), g["test"], device=run.device)

    whole, cut = acc(supernet), acc(supernet.inherited(supernet.genotype))
    part = {name: value.to(run.device) for name, value in fetch(g["validation"], range(200)).items()}
    model: Any = listening(supernet, "batch")
    alphas = [a.requires_grad_() for a in model.alpha.values()]

    def loss() -> Tensor:
        return F.cross_entropy(traceless(model, part["image"]), part["label"])

    dominant, largest = extreme_curvatures(loss, alphas, iterations=12, tolerance=0.01)
    return {"sharpness": mean_sharpness(loss, alphas, NEAR, directions=8),
            "sharpness, far": mean_sharpness(loss, alphas, FAR, directions=8), "eigenvalue": dominant,
            "largest eigenvalue": largest, "gap": whole - cut, "supernet": whole}


def experiment(run: Run) -> dict[str, dict[str, float]]:
    """All arms with the same pictures, steps and settings; the search is diagnosed before the network is trained."""
    g = ground()

    def measured(network: Any) -> dict[str, float]:
        return {"accuracy": accuracy(network, g["test"], device=run.device), "parameters": float(parameters(network)),
                "skips": float(network.genotype.count("skip_connect"))}

    def arm(**changes: Any) -> Callable[[], dict[str, float]]:
        def work() -> dict[str, float]:
            config = dataclasses.replace(EMBEDDED, **changes)
            network: Any = distill(g["train"], g["validation"], config, run)
            return {**measured(network), **diagnosed(network.supernet, g, run)}

        return work

    def random() -> dict[str, float]:
        """The mean of three random architectures."""
        steps = EMBEDDED.steps - round(EMBEDDED.search * EMBEDDED.steps)
        config = dataclasses.replace(EMBEDDED, search=0.0, steps=steps)
        each = []
        for i in range(3):
            with run.scope(f"architecture {i}"):
                each.append(measured(distill(g["train"], g["validation"], config, run)))
        return {name: sum(e[name] for e in each) / len(each) for name in each[0]}

    return run.arms(
        {"darts": arm(weight=0.0), "sd-darts": arm(), "random": random},
        extended={"one teacher": arm(snapshots=1), "random smoothing": arm(weight=0.0, perturb=0.3),
                  "ema teacher": arm(past="ema"), "majority": arm(vote="majority"),
                  "distilled alpha": arm(alpha_weight=1.0)})
