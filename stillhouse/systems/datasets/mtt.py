"""Dataset distillation by matching training trajectories (Cazenavette et al. 2022, arXiv 2203.11932).

A labelled data set is distilled into a few synthetic pictures per class and a learning rate. Training on them shall
move a network's weights along the path on which training on all real data moves them. Expert paths theta*_0 … theta*_T
are recorded once; then, for an expert and an epoch t < T+ drawn at random, a student starts at theta*_t and takes N
steps

    theta_{n+1} = theta_n - alpha grad CE( f(A(x_b); theta_n), y_b )

on mini-batches of the synthetic pictures X, with differentiable augmentation A, and X and alpha are moved along the
gradient, through all N steps, of

    L = || theta_N - theta*_{t+M} ||^2 / || theta*_t - theta*_{t+M} ||^2.                              (equation 2)

Deviations: alpha is kept above 1e-6. The best evaluation over the run, which the paper picks on test pictures, is
picked on `validation` where that is given; without it the last state is returned. `flat_memory` is an addition.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from stillhouse.data.augment import DSA_DIGITS, DSA_GROUPS, DSA_PAPER, Augment, draw_dsa, dsa, fit_zca, random_tiles
from stillhouse.data.coresets import herding, k_center, random_per_class
from stillhouse.data.digits import digits
from stillhouse.data.distilled import DistilledSet
from stillhouse.data.sets import TensorSet, as_tensor_set
from stillhouse.errors import ConfigError, DataError, RoleError, require
from stillhouse.evaluate.claims import Claim
from stillhouse.measures.matching import trajectory_distance
from stillhouse.models.convnets import ConvNet, SmallAlexNet, SmallResNet, SmallVGG
from stillhouse.parts.unroll import FlatNetwork, sgd_step, unroll
from stillhouse.protocols import Classifier, LabelledImages, Network
from stillhouse.recipes.dataset_evaluation import evaluate_across, evaluate_dataset
from stillhouse.recipes.gradient_matching import GradientMatching, match_gradients
from stillhouse.recipes.trajectories import Trajectories, record_trajectories
from stillhouse.run import Run, begin
from stillhouse.zoo.experts import digits_experts, digits_network

NUMBER = 56

CLAIMS = [
    Claim("10 pictures distilled by MTT train better networks than 10 real ones, by more than 5 points",
          lambda a: a["mtt"]["accuracy"] - a["random"]["accuracy"] - 0.05),
    Claim("MTT is at least as good as matching gradients step by step with the same compute",
          lambda a: a["mtt"]["accuracy"] - a["gradient_matching"]["accuracy"]),
    Claim("learning alpha helps", lambda a: a["mtt"]["accuracy"] - a["fixed_alpha"]["accuracy"], report=True),
    Claim("normalising the distance helps", lambda a: a["mtt"]["accuracy"] - a["unnormalised"]["accuracy"],
          report=True),
]


@dataclass(frozen=True)
class Config:
    """Published settings for CIFAR-10 with one picture per class."""

    ipc: int = 1  # synthetic pictures per class
    steps: int = 5000  # outer iterations
    student_steps: int = 50  # N, SGD steps of the student on the synthetic pictures
    expert_epochs: int = 2  # M, epochs of the expert that they shall equal
    max_start: int = 2  # T+, the start epoch t is drawn from 0 … T+ - 1
    batch_syn: int | None = None  # synthetic pictures in one student step; None for all of them
    lr_img: float = 1000.0  # learning rate of the pictures
    lr_alpha: float = 1e-5  # learning rate of alpha; 0 keeps alpha fixed
    momentum: float = 0.5  # of both
    alpha: float = 0.01  # alpha_0, the student's learning rate at the start
    distance: Literal["normalised", "squared"] = "normalised"  # L, or its numerator alone
    init: Literal["real", "noise"] = "real"  # what the synthetic pictures are at the start
    texture: int = 1  # a synthetic picture is a wrapping canvas of this many tiles a side; 1 for plain pictures
    zca: bool = True  # whether real pictures are whitened first
    dsa: str = DSA_PAPER  # augmentation groups, joined by "_"; "" for none
    fill: float = 0.0  # value of pixels from outside of a picture
    experts: int = 100  # expert networks recorded, where no trajectories are given
    epochs: int = 50  # epochs of each
    expert_lr: float = 0.01  # their learning rate (SGD without momentum or weight decay)
    batch: int = 256  # real pictures in one of their steps
    experts_per_step: int = 1  # segments per outer iteration; a multiple of the number of processes
    flat_memory: bool = False  # take each student step twice instead of keeping its graph: memory flat in N
    evaluate_every: int = 100  # outer iterations between evaluations on `validation`
    evaluate_networks: int = 5  # fresh networks trained in one evaluation
    evaluate_steps: int = 1000  # training steps of each

    def __post_init__(self) -> None:
        positive = ("ipc", "expert_epochs", "max_start", "texture", "experts", "epochs", "batch", "experts_per_step",
                    "evaluate_every", "evaluate_networks", "evaluate_steps")
        for name in positive:
            require(getattr(self, name) >= 1, f"{name} must be at least 1, not {getattr(self, name)}")
        require(self.steps >= 0 and self.student_steps >= 0, "steps and student_steps must be 0 or more")
        require(self.batch_syn is None or self.batch_syn >= 1, f"batch_syn must be 1 or more, not {self.batch_syn}")
        require(self.alpha > 0 and self.lr_img >= 0 and self.lr_alpha >= 0 and 0 <= self.momentum < 1,
                "alpha must be above 0, lr_img and lr_alpha 0 or more, momentum in [0, 1)")
        require(self.distance in ("normalised", "squared"),
                f"distance is 'normalised' or 'squared', not {self.distance!r}")
        require(self.init in ("real", "noise"), f"init is 'real' or 'noise', not {self.init!r}")
        require(all(g in DSA_GROUPS for g in self.dsa.split("_") if self.dsa),
                f"dsa joins some of {', '.join(DSA_GROUPS)} by '_', got '{self.dsa}'")
        require(self.last_epoch <= self.epochs, f"segments end at epoch max_start - 1 + expert_epochs = "
                f"{self.last_epoch}, after the experts' last, {self.epochs}; lower max_start or raise epochs")

    @property
    def last_epoch(self) -> int:
        """The last epoch that a segment can reach."""
        return self.max_start - 1 + self.expert_epochs


EMBEDDED = Config(steps=120, student_steps=16, max_start=11, lr_img=40.0, lr_alpha=1e-4, alpha=0.05, zca=False,
                  dsa=DSA_DIGITS, fill=-1.0, experts=12, epochs=40, expert_lr=0.1, experts_per_step=2,
                  evaluate_networks=10, evaluate_steps=200)

REAL_LR = 0.02
"""Learning rate for training on real pictures, the best of a grid on other seeds."""

GRADIENTS = GradientMatching(steps=340, lr_img=0.03, distance="squared", batch_real=64, dsa=DSA_DIGITS, fill=-1.0,
                             lr=0.02)
"""The baseline with the wall-clock time of `EMBEDDED`; its rates and distance are the best of a grid on other seeds."""


def distill(
    network: Network,
    labelled: LabelledImages,
    teachers: Trajectories | None = None,
    validation: LabelledImages | None = None,
    config: Config = Config(),
    run: Run | None = None,
) -> DistilledSet:
    """Distil `labelled` into `config.ipc` pictures per class for networks like those of `network`.

    `teachers` are trajectories recorded before (`record_trajectories`, on whitened pictures if `config.zca`); without
    them they are recorded here. Networks with instance or group norm are advised: running statistics are not part of a
    trajectory. The evaluation of the result trains with its `lr`, the learned alpha.

    Raises DataError (empty, not finite, a class with too few pictures), RoleError (trajectories of another network),
    ConfigError (segments that the experts do not cover; experts_per_step that the processes cannot share).
    """
    run = begin(run)
    real = _check(run, network, labelled, teachers, validation, config)
    whitening = fit_zca(real.image) if config.zca else None
    if whitening is not None:
        real = real.with_fields(image=whitening.apply(real.image))
    if teachers is None:
        teachers = record_trajectories(network, real, count=config.experts, epochs=config.epochs, lr=config.expert_lr,
                                       batch=config.batch, strategy=config.dsa, fill=config.fill, run=run)
    student = FlatNetwork(network().to(run.device).train())
    initial, labels = first_pictures(real, config)
    images, labels = nn.Parameter(initial.to(run.device)), labels.to(run.device)
    alpha = nn.Parameter(torch.tensor(config.alpha, device=run.device))
    optimizers = (torch.optim.SGD([images], config.lr_img, config.momentum),
                  torch.optim.SGD([alpha], config.lr_alpha, config.momentum))
    best: Any = run.state(accuracy=-1.0, images=initial, alpha=config.alpha)
    tile = (real.image.shape[-2], real.image.shape[-1]) if config.texture > 1 else None

    for k in run.loop("match", steps=config.steps, images=images, alpha=alpha, optimizers=optimizers, best=best):
        losses = [segment_loss(student, start, target, images, labels, alpha, config, generator, tile)
                  for start, target, generator in run.shard(draw_segments(run, teachers, config))]
        run.update(optimizers, match=torch.stack(losses).mean())
        with torch.no_grad():
            alpha.clamp_(min=1e-6)
        run.log(alpha=alpha)
        if validation is not None and ((k + 1) % config.evaluate_every == 0 or k + 1 == config.steps):
            now = DistilledSet(images.detach().cpu().clone(), labels.cpu(), alpha.item(), whitening, tile)
            with run.aside("evaluate", grad=True):
                accuracy = evaluate(now, network, validation, config, run)["accuracy"]
            run.log(accuracy=accuracy)
            if accuracy > best.accuracy:
                best.accuracy, best.images, best.alpha = accuracy, now.images, alpha.item()

    last = DistilledSet(images.detach().cpu(), labels.cpu(), alpha.item(), whitening, tile)
    distilled = last if validation is None else replace(last, images=best.images.cpu(), lr=best.alpha)
    run.picture("distilled", distilled.pictures())
    return distilled


def segment_loss(
    student: FlatNetwork,
    start: Float[Tensor, " parameters"],
    target: Float[Tensor, " parameters"],
    images: Float[Tensor, "n channels height width"],
    labels: Tensor,
    alpha: Float[Tensor, ""],
    config: Config,
    generator: torch.Generator | None = None,
    tile: tuple[int, int] | None = None,
) -> Float[Tensor, ""]:
    """L of one segment: N steps on `images` from theta*_t = `start`, compared with theta*_{t+M} = `target`.

    Carries gradients to `images` and `alpha` through all N steps.
    """
    chunks = _chunks(len(images), config, generator)
    views = [_view(images[chunk], config, generator, tile) for chunk in chunks]

    def loss(theta: Tensor, n: int, inputs: tuple[Tensor, ...]) -> Tensor:
        return F.cross_entropy(student(theta, views[n](inputs[1][chunks[n]])), labels[chunks[n]])

    (reached,) = unroll(sgd_step(loss), (start,), config.student_steps, (alpha, images), flat=config.flat_memory)
    return trajectory_distance(reached, start, target, config.distance == "normalised")


def draw_segments(run: Run, experts: Trajectories, config: Config) -> list[tuple[Tensor, Tensor, torch.Generator]]:
    """For one outer iteration: theta*_t, theta*_{t+M} and a generator each, the same on all processes."""
    segments = []
    for _ in range(config.experts_per_step):
        expert = experts.experts[run.shared_randint(0, len(experts))]
        t = run.shared_randint(0, config.max_start)
        generator = torch.Generator().manual_seed(run.shared_randint(0, 2**62))
        segments.append((expert[t].to(run.device), expert[t + config.expert_epochs].to(run.device), generator))
    return segments


def first_pictures(real: TensorSet, config: Config) -> tuple[Tensor, Tensor]:
    """The synthetic pictures at the start, and their fixed labels: real pictures of each class, or noise."""
    side = range(config.texture)
    tiles = [[random_per_class(real.label, config.ipc) for _ in side] for _ in side]
    images = torch.cat([torch.cat([real.image[tile] for tile in row], -1) for row in tiles], -2)
    return torch.randn_like(images) if config.init == "noise" else images, real.label[tiles[0][0]]


def evaluate(distilled: DistilledSet, network: Network, test: LabelledImages, config: Config,
             run: Run) -> dict[str, Any]:
    """The paper's protocol: fresh networks, the set's own alpha, momentum 0.9, decay 5e-4, DSA in training only."""
    return evaluate_dataset(distilled, network, test, networks=config.evaluate_networks, steps=config.evaluate_steps,
                            augment=lambda x: dsa(x, config.dsa, fill=config.fill), device=run.device)


def _chunks(n: int, config: Config, generator: torch.Generator | None) -> list[Tensor]:
    """Which synthetic pictures each student step sees: chunks of permutations, or all."""
    if config.batch_syn is None or config.batch_syn >= n:
        return [torch.arange(n)] * config.student_steps
    chunks: list[Tensor] = []
    while len(chunks) < config.student_steps:
        chunks += torch.randperm(n, generator=generator).split(config.batch_syn)
    return chunks[: config.student_steps]


def _view(images: Tensor, config: Config, generator: torch.Generator | None, tile: tuple[int, int] | None) -> Augment:
    """The window and the augmentation of one student step, drawn now and applied when the step is taken."""
    if tile is None:
        return draw_dsa(images, config.dsa, fill=config.fill, generator=generator)
    seed = int(torch.randint(2**62, (), generator=generator))
    augment = draw_dsa(images[..., : tile[0], : tile[1]], config.dsa, fill=config.fill, generator=generator)
    return lambda x: augment(random_tiles(x, tile, torch.Generator().manual_seed(seed)))


def _check(run: Run, network: Network, labelled: LabelledImages, teachers: Trajectories | None,
           validation: LabelledImages | None, config: Config) -> TensorSet:
    """Raise before any work; return the real data in memory."""
    template = network()
    run.check(Classifier, labelled, labels=True, network=template)
    if validation is not None:
        run.check(Classifier, validation, labels=True, network=template)
    run.shard(range(config.experts_per_step))
    real = as_tensor_set(labelled)
    require("label" in real.fields, f"distilling needs labels, the data has only {real.fields}", DataError)
    fewest = int(real.label.bincount()[real.label.unique()].min())
    require(fewest >= config.ipc, f"ipc = {config.ipc}, but a class has only {fewest} pictures", DataError)
    if teachers is not None:
        size = FlatNetwork(template).size
        require(teachers.size == size, f"the trajectories are of networks with {teachers.size} parameters, the network "
                f"given has {size}; record them with the same network", RoleError)
        require(config.last_epoch <= teachers.epochs, f"segments end at epoch {config.last_epoch}, the trajectories at "
                f"{teachers.epochs}; lower max_start or expert_epochs", ConfigError)
    return real


def tiny() -> dict[str, Any]:
    """Inputs for the contract test: two tiny experts, three iterations with two segments each."""
    config = replace(EMBEDDED, steps=3, student_steps=2, batch_syn=2, expert_epochs=1, max_start=2, experts=2, epochs=2,
                     batch=16, experts_per_step=2, zca=True, evaluate_every=2, evaluate_networks=1, evaluate_steps=2)
    generator = torch.Generator().manual_seed(0)

    def pictures(n: int) -> TensorSet:
        return TensorSet(image=torch.randn(n, 1, 8, 8, generator=generator), label=torch.arange(n) % 3)

    return {"network": lambda: ConvNet(1, 3, 4, depth=2, image_size=8), "labelled": pictures(24),
            "validation": pictures(12), "config": config}


def experiment(run: Run) -> dict[str, dict[str, float]]:
    """10 digits of 8x8 pixels, one per class, distilled from 1,200; fresh networks trained on them, on 597 others."""
    network, train, test = digits_network(), digits(8, "train"), digits(8, "test")
    experts = digits_experts(EMBEDDED.experts, EMBEDDED.epochs, EMBEDDED.expert_lr)

    def score(distilled: DistilledSet) -> dict[str, float]:
        scores = run.once("evaluate", lambda: evaluate(distilled, network, test, EMBEDDED, run))
        return {"accuracy": scores["accuracy"], "std": scores["std"], "alpha": float(distilled.lr or 0)}

    def chosen(positions: Tensor) -> DistilledSet:
        return DistilledSet(train.image[positions], train.label[positions], REAL_LR)

    def system(config: Config = EMBEDDED) -> DistilledSet:
        return distill(network, train, experts, config=config, run=run)

    def across(distilled: DistilledSet) -> dict[str, float]:
        networks: dict[str, Network] = {"resnet": lambda: SmallResNet(norm="instance"), "vgg": SmallVGG,
                                        "alexnet": SmallAlexNet}
        scores = run.once("evaluate", lambda: evaluate_across(
            distilled, networks, test, networks=EMBEDDED.evaluate_networks, steps=EMBEDDED.evaluate_steps,
            augment=lambda x: dsa(x, EMBEDDED.dsa, fill=EMBEDDED.fill), device=run.device))
        return {name: s["accuracy"] for name, s in scores.items()}

    flat = train.image.flatten(1)
    return run.arms(
        {
            "random": lambda: score(chosen(random_per_class(train.label, EMBEDDED.ipc))),
            "gradient_matching": lambda: score(match_gradients(network, train, GRADIENTS, run)),
            "mtt": lambda: score(system()),
            "fixed_alpha": lambda: score(system(replace(EMBEDDED, lr_alpha=0.0))),
            "unnormalised": lambda: score(system(replace(EMBEDDED, distance="squared"))),
        },
        extended={
            "herding": lambda: score(chosen(herding(flat, train.label, EMBEDDED.ipc))),
            "k_center": lambda: score(chosen(k_center(flat, train.label, EMBEDDED.ipc))),
            "no_augmentation": lambda: score(system(replace(EMBEDDED, dsa=""))),
            "texture": lambda: score(system(replace(EMBEDDED, texture=2, init="noise"))),
            "across_random": lambda: across(chosen(random_per_class(train.label, EMBEDDED.ipc))),
            "across_mtt": lambda: across(system()),
        },
    )
