"""SimCLR v2: a big network learns from pictures without labels, then from a few labels, then teaches a small network.

1. Pretraining: the big encoder f with a head g of three layers minimises NT-Xent between two distorted views,
   l_ij = -log exp(z_i z_j / tau) / sum_{k != i} exp(z_i z_k / tau), z = g(f(x)) of unit length.
2. Fine-tuning on the few labels from a middle layer of the head: W_task relu(BN(W_1 f(x))), W_task starting at zero.
3. Distillation on all pictures x of the unlabelled and the labelled set, with P(y | x; tau) = softmax(z(x) / tau):

    L = -(1 - alpha) sum_L log P_S(y_i | x_i) - alpha tau^2 sum_{U + L} sum_y P_T(y | x; tau) log P_S(y | x; tau),

   first of the big network into itself (self-distillation), then into the small one.

Chen et al. 2020, "Big Self-Supervised Models are Strong Semi-Supervised Learners". The sums are means over batches;
the teacher's entropy, a constant, is taken off the loss. Deviations: self-distillation starts from the pretrained
weights with a new classifier (the paper does not say from what); colours are turned in RGB about the grey axis and
distorted in a fixed order; no selective kernels, the encoder is the user's.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from stillhouse.data.digits import digits
from stillhouse.data.mining import pictures
from stillhouse.data.sets import TensorSet, column
from stillhouse.errors import DataError, RoleError, require
from stillhouse.evaluate.claims import Claim
from stillhouse.evaluate.classification import accuracy
from stillhouse.evaluate.probes import few_per_class
from stillhouse.models.convnets import TinyConvNet
from stillhouse.parts.heads import (
    Cut,
    Projected,
    classifier_from_head,
    feature_width,
    normed_projector,
    replace_head,
)
from stillhouse.protocols import Classifier, Encoder, Images, LabelledImages
from stillhouse.recipes import kd, simclr, supervised
from stillhouse.recipes.supervised import check_training
from stillhouse.recipes.views import colour_view, crop_view
from stillhouse.run import Run, begin
from stillhouse.run.check import first_batch
from stillhouse.zoo.contrastive import digits_simclr_v2

NUMBER = 29

CLAIMS = [
    Claim("the small network distilled from the big one beats its own pretraining and fine-tuning",
          lambda a: a["simclrv2"]["accuracy"] - a["small, pretrained"]["accuracy"]),
    Claim("pretraining the small network beats training it on the labels alone",
          lambda a: a["small, pretrained"]["accuracy"] - a["labels"]["accuracy"]),
    Claim("distilling on all pictures beats distilling on the labelled ones",
          lambda a: a["simclrv2"]["accuracy"] - a["labelled pictures"]["accuracy"]),
    Claim("the small network comes within 3 points of its teacher",
          lambda a: a["simclrv2"]["accuracy"] - a["simclrv2"]["teacher"] + 0.03, report=True),
    Claim("a teacher fine-tuned from the head's first layer beats one fine-tuned from the encoder",
          lambda a: a["simclrv2"]["teacher"] - a["layer 0"]["teacher"], report=True),
    Claim("and so does its student",
          lambda a: a["simclrv2"]["accuracy"] - a["layer 0"]["accuracy"], report=True),
    Claim("self-distillation makes the big network better",
          lambda a: a["self-distilled"]["teacher"] - a["simclrv2"]["teacher"], report=True),
    Claim("the small network is a better student of itself than it was as its own teacher",
          lambda a: a["small, itself"]["accuracy"] - a["small, pretrained"]["accuracy"], report=True),
    Claim("labels beside the teacher add nothing",
          lambda a: a["simclrv2"]["accuracy"] - a["with labels"]["accuracy"], report=True),
    Claim("a momentum queue helps the pretraining",
          lambda a: a["small, queue"]["accuracy"] - a["small, pretrained"]["accuracy"], report=True),
    Claim("bigger helps more with fewer labels",
          lambda a: (a["sizes"]["width 16, 2 labels"] - a["sizes"]["width 4, 2 labels"])
          - (a["sizes"]["width 16, 50 labels"] - a["sizes"]["width 4, 50 labels"]), report=True),
]


@dataclass(frozen=True)
class Config:
    steps: int = 125_000  # optimiser steps of a distillation: 400 epochs of 1.28 million pictures at this batch
    batch: int = 4096  # pictures a step
    pretrain: float = 2.0  # steps of the pretraining, in parts of steps (800 epochs); 0: the teacher is pretrained
    fine_tune: float = 0.006  # steps of the fine-tuning, in parts of steps: 60 epochs of 1 % of the pictures
    fine_tune_batch: int = 1024  # labelled pictures a step of the fine-tuning
    self_distil: float = 1.0  # steps of the self-distillation, in parts of steps; 0: none
    optimizer: Literal["sgd", "adamw", "lars"] = "lars"  # of all stages
    lr: float = 0.1  # learning rate of pretraining and distillation; its peak is lr sqrt(batch)
    fine_tune_lr: float = 0.005  # that of the fine-tuning; its peak is fine_tune_lr sqrt(fine_tune_batch)
    warmup: float = 0.05  # part of a stage in which the learning rate rises; none in the fine-tuning
    weight_decay: float = 1e-4  # lambda of pretraining and distillation; 0 in the fine-tuning
    temperature: float = 0.1  # tau of NT-Xent
    queue: int = 0  # further negatives of a momentum encoder (the paper's option: 65,536); 0: neither
    decay: float = 0.999  # m of the momentum encoder
    head_layers: int = 3  # linear layers of the head g
    out: int = 128  # width of z
    layer: int = 1  # layers of the head that the fine-tuning keeps; 0: the whole head is dropped, as in SimCLR v1
    soft_temperature: float = 1.0  # tau of the distillation
    alpha: float = 1.0  # weight of the teacher; the labels have 1 - alpha
    targets: Literal["all", "labelled"] = "all"  # pictures that the teacher speaks about in the distillation
    area: tuple[float, float] = (0.08, 1.0)  # part of the picture that a view of the pretraining shows
    weak_area: tuple[float, float] = (0.08, 1.0)  # and one of the fine-tuning and the distillation
    flip: bool = True  # whether views are mirrored
    colour: float = 1.0  # s, strength of the colour distortion
    grey: float = 0.2  # probability of a grey view
    blur: float = 0.5  # probability of a blurred view

    def __post_init__(self) -> None:
        check_training(self.steps, self.batch, self.lr, self.warmup, self.weight_decay)
        check_training(self.steps, self.fine_tune_batch, self.fine_tune_lr, 0.0, 0.0)
        require(min(self.pretrain, self.fine_tune, self.self_distil, self.colour) >= 0 and self.queue >= 0,
                "pretrain, fine_tune, self_distil, colour and queue must be 0 or more")
        require(min(self.temperature, self.soft_temperature) > 0, "temperatures must be above 0")
        require(0 <= self.layer <= self.head_layers and self.out >= 1, f"layer lies between 0 and head_layers = "
                f"{self.head_layers}, out is 1 or more; got {self.layer} and {self.out}")
        require(0 <= self.alpha <= 1 and 0 <= self.decay <= 1, "alpha and decay must lie in [0, 1]")
        require(self.targets in ("all", "labelled"), f"targets is 'all' or 'labelled', not {self.targets!r}")
        require(all(0 < a[0] <= a[1] <= 1 for a in (self.area, self.weak_area)), "area and weak_area are ranges within "
                f"(0, 1], got {self.area} and {self.weak_area}")
        require(0 <= self.grey <= 1 and 0 <= self.blur <= 1, "grey and blur are probabilities")

    def steps_of(self, part: float) -> int:
        return round(part * self.steps)


EMBEDDED = Config(steps=400, batch=128, pretrain=0.0, fine_tune=0.25, fine_tune_batch=25, self_distil=0.0,
                  optimizer="adamw", lr=9e-4, fine_tune_lr=1e-3, temperature=0.5, area=(0.4, 1.0),
                  weak_area=(0.6, 1.0), flip=False, colour=0.5)
SMALL_FINE_TUNE_LR = 2e-3  # what suits the small network, which the big one's rate would leave short


def distill(
    teacher: Encoder,
    student: Classifier,
    labelled: LabelledImages,
    unlabelled: Images,
    config: Config = Config(),
    run: Run | None = None,
) -> nn.Module:
    """Train the student in place on all pictures, taught by a big network that knows the few labels.

    `teacher` is the big encoder; copies of it are pretrained, fine-tuned and self-distilled. A `Projected` brings its
    own head, and with `pretrain` 0 its own pretraining. The attribute `teacher` of what is returned is the big
    classifier.
    """
    run = begin(run)
    classes = check_roles(teacher, student, labelled, unlabelled, config, run)
    everything = pictures((unlabelled, None), (labelled, None))
    big = fine_tuned(teacher, classes, labelled, everything, config, run)
    weak = weak_view(config, run)
    spoken_of = pictures((labelled, None)) if config.targets == "labelled" else everything
    soft = kd.Config(**_training(config), steps=config.steps, temperature=config.soft_temperature, alpha=config.alpha)
    kd.distill(big, student, labelled, soft, run, weak, unlabelled=spoken_of)
    _module(student).__dict__["teacher"] = big
    return _module(student)


def fine_tuned(teacher: Encoder, classes: int, labelled: LabelledImages, everything: Images, config: Config,
               run: Run) -> nn.Module:
    """Pretraining, fine-tuning and self-distillation: the big classifier."""
    example = first_batch(everything, ("image",))["image"].to(run.device)
    pretrained = with_head(teacher, example, config).to(run.device)
    width = feature_width(pretrained.encoder, example)
    weak = weak_view(config, run)
    if config.pretrain:
        contrast = simclr.Config(**_training(config), steps=config.steps_of(config.pretrain), queue=config.queue,
                                 temperature=config.temperature, decay=config.decay)
        simclr.train(pretrained, everything, strong_view(config, run), contrast, run)
    big = classifier_from_head(pretrained, classes, width, config.layer)
    few = supervised.Config(config.steps_of(config.fine_tune), config.fine_tune_batch, config.optimizer,
                            config.fine_tune_lr * math.sqrt(config.fine_tune_batch), warmup=0.0, weight_decay=0.0)
    supervised.fine_tune(big, labelled, big.linear, few, run, weak, backbone_lr=1.0)
    if not config.self_distil:
        return big
    with run.scope("self-distillation"):
        soft = kd.Config(**_training(config), steps=config.steps_of(config.self_distil), alpha=1.0,
                         temperature=config.soft_temperature)
        again = classifier_from_head(pretrained, classes, width, config.layer)
        return kd.distill(big, again, None, soft, run, weak, unlabelled=everything)


def with_head(teacher: Encoder, example: Tensor, config: Config) -> Projected:
    """A copy of the big encoder with a projection head: its own, or a new one."""
    body = copy.deepcopy(_module(teacher)).requires_grad_(True)
    if isinstance(body, Projected):
        return body
    return Projected(body, normed_projector(feature_width(body, example), config.out, config.head_layers))


def strong_view(config: Config, run: Run) -> Callable[[Tensor], Tensor]:
    """Pretraining: a part of the picture, its colours distorted, blurred."""
    return lambda x: colour_view(crop_view(x, run, config.area, flip=config.flip), run, config.colour,
                                 grey=config.grey, blur=config.blur)


def weak_view(config: Config, run: Run) -> Callable[[Tensor], Tensor]:
    """Fine-tuning and distillation: a part of the picture."""
    return lambda x: crop_view(x, run, config.weak_area, flip=config.flip)


def check_roles(teacher: Encoder, student: Classifier, labelled: LabelledImages, unlabelled: Images, config: Config,
                run: Run) -> int:
    """Refuse what the stages could not work with; returns the number of classes."""
    for given in (labelled, unlabelled):
        run.check(Encoder, given, teacher=teacher)
        run.check(Classifier, given, student=student)
    images = first_batch(labelled, ("image", "label"))["image"].to(run.device)
    classes, labels = feature_width(_module(student), images), column(labelled, "label")
    require(int(labels.min()) >= 0 and int(labels.max()) < classes, f"labels lie between {int(labels.min())} and "
            f"{int(labels.max())}, but the student has {classes} classes", RoleError)
    require(config.pretrain > 0 or config.layer == 0 or isinstance(teacher, Projected), "pretrain=0 takes a teacher "
            "that is pretrained with its projection head (stillhouse.parts.heads.Projected); let it be pretrained, or "
            "drop the head with layer=0", RoleError)
    if isinstance(teacher, Projected):
        classifier_from_head(teacher, classes, 1, config.layer)
    for name, data in (("labelled", labelled), ("unlabelled", unlabelled)):
        most = first_batch(data)["image"].abs().max().item()
        require(most <= 1.001, f"the pictures of '{name}' reach {most:.3g}; views take pictures in [-1, 1]", DataError)
    return classes


def _module(model: Any) -> nn.Module:
    assert isinstance(model, nn.Module)
    return model


def _training(config: Config) -> dict[str, Any]:
    return {"batch": config.batch, "optimizer": config.optimizer, "lr": config.lr * math.sqrt(config.batch),
            "warmup": config.warmup, "weight_decay": config.weight_decay}


def tiny() -> dict[str, Any]:
    torch.manual_seed(0)
    image = torch.rand(22, 3, 8, 8) * 2 - 1
    teacher = nn.Sequential(nn.Conv2d(3, 6, 3, 2), nn.BatchNorm2d(6), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    student = nn.Sequential(nn.Conv2d(3, 2, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(18, 4))
    return {"teacher": teacher, "student": student,
            "labelled": TensorSet(image=image[:8], label=torch.arange(8) % 4), "unlabelled": TensorSet(image=image[8:]),
            "config": Config(steps=3, batch=8, pretrain=1.0, fine_tune=0.67, fine_tune_batch=4, self_distil=0.67,
                             queue=12, alpha=0.7, out=8)}


# -------------------------------------------------------------------- the embedded experiment


def ground() -> dict[str, Any]:
    """Digits of 16 pixels: 1,200 to learn from, of which five a class have labels, 597 to test on; a pretrained
    residual network as the big encoder."""
    return {"pool": digits(16, "train"), "test": digits(16, "test"), "teacher": digits_simclr_v2()}


def small_encoder(out: int = 64) -> Projected:
    """A TinyConvNet without its classes and a head of three layers: 5,000 parameters below the classifier."""
    encoder, _ = replace_head(TinyConvNet())
    return Projected(encoder, normed_projector(20, out))


def experiment(run: Run) -> dict[str, dict[str, float]]:
    """All arms with the same small network, initial weights, labelled pictures, weak views and number of steps; the
    rate of fine-tuning is tuned for the big network and for the small one."""
    g = ground()
    pool, test, unlabelled = g["pool"], g["test"], g["pool"].without("label")

    def labelled(per_class: int = 5) -> Any:
        return pool.select(few_per_class(pool.label, per_class, seed=run.seed))

    def small() -> Projected:
        run.begin()
        return small_encoder().to(run.device)

    def new() -> Cut:
        return classifier_from_head(small(), 10, 20, EMBEDDED.layer)

    def measured(model: nn.Module, **more: nn.Module) -> dict[str, float]:
        if run.first and not more:
            run.picture("views", torch.cat([view(EMBEDDED, run)(test.image[:8].to(run.device))
                                            for view in (strong_view, weak_view)]), columns=8)
        return {n: accuracy(m, test, device=run.device) for n, m in {"accuracy": model, **more}.items()}

    def labels() -> dict[str, float]:
        few = supervised.Config(**{**_training(EMBEDDED), "batch": EMBEDDED.fine_tune_batch}, steps=EMBEDDED.steps)
        return measured(supervised.train(new(), labelled(), few, run, weak_view(EMBEDDED, run)))

    by_itself: dict[str, Any] = {"pretrain": 1 - EMBEDDED.fine_tune, "fine_tune_lr": SMALL_FINE_TUNE_LR}

    def alone(**changes: Any) -> Callable[[], dict[str, float]]:
        config = dataclasses.replace(EMBEDDED, **by_itself, **changes)
        return lambda: measured(fine_tuned(small(), 10, labelled(), unlabelled, config, run))

    def taught(by: Callable[[], nn.Module] = lambda: g["teacher"].to(run.device), **changes: Any
               ) -> Callable[[], dict[str, float]]:
        def measure() -> dict[str, float]:
            config = dataclasses.replace(EMBEDDED, **changes)
            student = distill(by(), new(), labelled(), unlabelled, config, run)
            return measured(student, teacher=student.__dict__["teacher"])
        return measure

    def sizes() -> dict[str, float]:
        found = {}
        for width in (4, 8, 16):
            for count in (2, 50):
                with run.scope(f"width {width}, {count} labels"):
                    big = fine_tuned(digits_simclr_v2(width).to(run.device), 10, labelled(count), unlabelled, EMBEDDED,
                                     run)
                    found[f"width {width}, {count} labels"] = accuracy(big, test, device=run.device)
        return found

    return run.arms(
        {"labels": labels, "small, pretrained": alone(), "simclrv2": taught(),
         "labelled pictures": taught(targets="labelled")},
        {"layer 0": taught(layer=0), "self-distilled": taught(self_distil=0.5), "with labels": taught(alpha=0.5),
         "small, itself": taught(small, **by_itself), "small, queue": alone(queue=1024, decay=0.99),
         "sizes": sizes})
