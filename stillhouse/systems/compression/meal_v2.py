"""MEAL V2: several strong classifiers are averaged into one that is already trained, through final outputs alone.

Student s and frozen teachers k = 1 … K see the same picture. The soft target averages probabilities, the reference of
the discriminator D averages logits; no label, no temperature, no weight decay:

    p = 1/K sum_k softmax(z_k),   z = 1/K sum_k z_k,
    L = - sum p log softmax(z_s)  +  BCE(D(z_s), [1, 0]) + BCE(D(z), [0, 1])        (the mean of the four terms of BCE)

D minimises its term, the student maximises it (its gradient is reversed): the student's logits are to look like the
teachers'. D is three small linear layers and is thrown away. The student starts from ordinary training on labels.
Optionally CutMix: a box of each picture comes from another one, the soft targets are mixed by area.

Shen and Savvides 2020, "MEAL V2"; D as in MEAL (Shen et al. 2019). Deviations: the released code gives the student the
gradient of D's term as it is (`reversal=-1`) and puts a ReLU after D's last layer (`last_relu`); its CutMix shows the
mixed pictures to the teachers too (`cutmix_target="seen"`). `initial` is for students that are not trained yet.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stillhouse.data.digits import digits
from stillhouse.data.mining import pictures
from stillhouse.data.sets import TensorSet, column
from stillhouse.errors import RoleError, require
from stillhouse.evaluate.claims import Claim
from stillhouse.evaluate.classification import accuracy, predictions
from stillhouse.evaluate.probes import extract
from stillhouse.measures.adversarial import reverse_gradient, two_logit_loss
from stillhouse.measures.divergences import soft_cross_entropy
from stillhouse.models.convnets import TinyConvNet
from stillhouse.parts.discriminators import LogitDiscriminator
from stillhouse.parts.ensembles import answers, mean_log_probs
from stillhouse.parts.heads import feature_width
from stillhouse.protocols import AnyImages, Classifier, Images
from stillhouse.recipes import kd, supervised
from stillhouse.recipes.supervised import check_training, optimizer_for
from stillhouse.recipes.views import crop_view, cutmix, neighbours
from stillhouse.run import Run, begin, frozen, set_lr
from stillhouse.run.schedules import piecewise
from stillhouse.zoo.classifiers import digits_classifier

NUMBER = 55

CLAIMS = [
    Claim("the averaged teachers beat further training on the labels",
          lambda a: a["meal"]["accuracy"] - a["labels"]["accuracy"]),
    Claim("a trained student ends higher than a fresh one after the same steps",
          lambda a: a["meal"]["accuracy"] - a["fresh student"]["accuracy"]),
    Claim("hard labels are not needed: without them it is at most half a point worse",
          lambda a: a["meal"]["accuracy"] - a["with labels"]["accuracy"] + 0.005),
    Claim("weight decay is not needed: without it it is at most half a point worse",
          lambda a: a["meal"]["accuracy"] - a["weight decay"]["accuracy"] + 0.005),
    Claim("the discriminator tells the logits of a student that works against it from the teachers' less well",
          lambda a: a["no adversary"]["told apart"] - a["meal"]["told apart"]),
    Claim("it beats Hinton's KD from the better teacher",
          lambda a: a["meal"]["accuracy"] - a["kd"]["accuracy"], report=True),
    Claim("without the adversary it is no better",
          lambda a: a["meal"]["accuracy"] - a["no adversary"]["accuracy"], report=True),
    Claim("the reversed gradient beats the released joint form",
          lambda a: a["meal"]["accuracy"] - a["released"]["accuracy"], report=True),
]

@dataclass(frozen=True)
class Config:
    steps: int = 450_000  # optimiser steps in all: 180 epochs of 1.28 million pictures at this batch
    batch: int = 512  # pictures a step
    optimizer: Literal["sgd", "adamw"] = "sgd"  # SGD with momentum 0.9, or AdamW
    lr: float = 0.01  # learning rate of the student
    drop: float = 100 / 180  # part of the distillation after which both learning rates fall to a tenth
    weight_decay: float = 0.0  # lambda of the student; the paper: exactly 0
    adversarial: float = 1.0  # weight of the discriminator's term; 0: no discriminator
    discriminator_lr: float = 1e-4  # learning rate of D
    reversal: float = 1.0  # the student's gradient of D's term is -reversal times it; 0: D looks on; -1: as released
    last_relu: bool = False  # a ReLU after the last layer of D, as released
    average: Literal["probabilities", "logits"] = "probabilities"  # what the soft target averages over the teachers
    hard: float = 0.0  # weight of the cross-entropy with the labels; the paper: none
    crop: float = 0.08  # smallest part of the area that a random crop keeps; 1: the whole picture
    flip: bool = True  # mirror half of the pictures
    cutmix: float = 0.0  # probability that a picture gets a box of another one
    cutmix_alpha: float = 1.0  # lambda ~ Beta(alpha, alpha) of CutMix
    cutmix_target: Literal["mixed", "seen"] = "mixed"  # mix the targets by area, or let the teachers see the mixture
    initial: float = 0.0  # part of the steps that first trains the student on labels; 0: it comes trained
    initial_lr: float = 0.1  # peak learning rate there; a cosine to 0
    initial_decay: float = 1e-4  # weight decay there

    def __post_init__(self) -> None:
        check_training(self.steps, self.batch, self.lr, 0.0, self.weight_decay)
        check_training(self.steps, self.batch, self.initial_lr, 0.0, self.initial_decay)
        require(self.discriminator_lr > 0, f"discriminator_lr must be above 0, not {self.discriminator_lr}")
        require(min(self.adversarial, self.hard) >= 0, "adversarial and hard are weights and must not be negative")
        require(0 <= self.initial <= 1 and 0 <= self.drop <= 1, f"initial and drop are parts of the steps in [0, 1]; "
                f"got {self.initial} and {self.drop}")
        require(0 < self.crop <= 1 and 0 <= self.cutmix <= 1 and self.cutmix_alpha > 0, "crop must lie in (0, 1], "
                f"cutmix in [0, 1], cutmix_alpha above 0; got {self.crop}, {self.cutmix} and {self.cutmix_alpha}")
        require(self.average in ("probabilities", "logits") and self.cutmix_target in ("mixed", "seen"),
                "average is 'probabilities' or 'logits' and cutmix_target 'mixed' or 'seen'; got "
                f"{self.average!r} and {self.cutmix_target!r}")


EMBEDDED = Config(steps=450, batch=64, lr=0.1, discriminator_lr=0.02, crop=0.6, flip=False, initial=1 / 3)


def distill(
    teachers: Sequence[Classifier],
    student: Classifier,
    data: AnyImages,
    unlabelled: Images | None = None,
    config: Config = Config(),
    run: Run | None = None,
) -> nn.Module:
    """Train the student in place on the teachers' average over the pictures of `data` and `unlabelled`.

    Labels of `data` are read only where `config.initial` or `config.hard` is above 0.
    """
    return play(teachers, student, data, unlabelled, config, run)[0]


def play(teachers: Sequence[Classifier], student: Classifier, data: AnyImages, unlabelled: Images | None,
         config: Config, run: Run | None) -> tuple[nn.Module, LogitDiscriminator]:
    """`distill`; returns the discriminator too."""
    run = begin(run)
    require(len(teachers) >= 1, "give at least one teacher, better two or more", RoleError)
    read = config.initial > 0 or config.hard > 0
    example = run.check(Classifier, data, labels=read, teachers=list(teachers), student=student)
    if unlabelled is not None:
        run.check(Classifier, unlabelled, teachers=list(teachers), student=student)
    assert isinstance(student, nn.Module)
    first = round(config.initial * config.steps)
    if first:
        initialise(student, data, first, config, run)
    labels = column(data, "label") if config.hard else None
    mixed = data if unlabelled is None else pictures((data, None), (unlabelled, None))
    discriminator = LogitDiscriminator(feature_width(student, example["image"]), config.last_relu).to(run.device)
    optimizers: dict[str, Any] = {
        "optimizer": optimizer_for(student.parameters(), config.optimizer, config.lr, config.weight_decay)}
    if config.adversarial:
        optimizers["adversary"] = optimizer_for(discriminator.parameters(), config.optimizer, config.discriminator_lr,
                                                0.0)
    student.train()
    with frozen(*teachers):
        for batch in run.loop("distil", mixed, batch=config.batch, steps=config.steps - first, student=student,
                              discriminator=discriminator, drop_last=len(mixed) >= config.batch, **optimizers):
            for optimizer, lr in zip(optimizers.values(), (config.lr, config.discriminator_lr), strict=False):
                set_lr(optimizer, lr * piecewise(run.progress, [(config.drop, 0.1)]))
            seen, log_p, z = targets(teachers, view(batch["image"], config, run), config, run)
            z_s = student(seen)
            terms: dict[str, Any] = {"similarity": soft_cross_entropy(log_p, z_s)}
            if config.adversarial:
                fake, real = discriminator(reverse_gradient(z_s, config.reversal)), discriminator(z)
                terms["discriminator"] = config.adversarial * two_logit_loss(fake, real)
                run.log(told_apart=told_apart(fake, real))
            if labels is not None:
                terms["hard"] = config.hard * hard_loss(z_s, batch["index"], labels)
            run.update(list(optimizers.values()), **terms)
    return student, discriminator


def initialise(student: nn.Module, data: Any, steps: int, config: Config, run: Run) -> nn.Module:
    """Ordinary training on labels, for a student that does not come trained."""
    ordinary = supervised.Config(steps=steps, batch=config.batch, optimizer=config.optimizer, lr=config.initial_lr,
                                 weight_decay=config.initial_decay)
    with run.scope("initial"):
        return supervised.train(student, data, ordinary, run, lambda x: view(x, config, run))


def view(x: Tensor, config: Config, run: Run) -> Tensor:
    """A random crop at the picture's size, mirrored half of the time, as far as the settings ask for them."""
    return crop_view(x, run, (config.crop, 1.0), flip=config.flip) if config.crop < 1 or config.flip else x


def targets(teachers: Sequence[Classifier], x: Tensor, config: Config, run: Run) -> tuple[Tensor, Tensor, Tensor]:
    """The pictures that the student sees, log of the soft target p, and z, the mean of the teachers' logits."""
    seen = x
    if config.cutmix:
        seen, own = cutmix(x, run, config.cutmix_alpha, config.cutmix)
    z_k = answers(teachers, seen if config.cutmix_target == "seen" else x)
    z = z_k.mean(0)
    log_p = mean_log_probs(z_k) if config.average == "probabilities" else z.log_softmax(-1)
    if config.cutmix and config.cutmix_target == "mixed":
        own = own[:, None]
        log_p = (own * log_p.exp() + (1 - own) * neighbours(log_p, run).exp()).log()
        z = own * z + (1 - own) * neighbours(z, run)
    return seen, log_p, z


def hard_loss(z_s: Tensor, index: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy with the labels over the batch; what comes from `unlabelled`, behind `labels`, counts as 0."""
    known = torch.cat([labels, labels.new_full((1,), -100)]).to(z_s.device)
    target = known[index.clamp_max(len(labels)).to(z_s.device)]
    return F.cross_entropy(z_s, target, ignore_index=-100, reduction="sum") / len(z_s)


def told_apart(fake: Tensor, real: Tensor) -> Tensor:
    """The discriminator's accuracy: its larger logit names the side; a tie counts as wrong."""
    return ((fake[:, 0] > fake[:, 1]).float().mean() + (real[:, 1] > real[:, 0]).float().mean()) / 2


def tiny() -> dict[str, Any]:
    torch.manual_seed(0)
    teachers = [nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 4)) for _ in range(2)]
    student = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(72, 4))
    data = TensorSet(image=torch.rand(14, 1, 8, 8), label=torch.arange(14) % 4)
    config = Config(steps=6, batch=6, initial=1 / 3, crop=0.5, cutmix=0.5, hard=0.5)
    return {"teachers": teachers, "student": student, "data": data,
            "unlabelled": TensorSet(image=torch.rand(10, 1, 8, 8)), "config": config}


# -------------------------------------------------------------------- the embedded experiment


def ground() -> dict[str, Any]:
    """Digits of 16 pixels: 400 to train on, 597 to test; a ResNet and a ViT as teachers, trained on 1,000."""
    teachers = [digits_classifier("resnet", 16, last=1000), digits_classifier("vit", 16, last=1000, steps=1500)]
    return {"train": digits(16, "train").select(range(400)), "test": digits(16, "test"), "teachers": teachers}


def experiment(run: Run) -> dict[str, dict[str, float]]:
    """All arms with the same student, views, batch and, after the same first phase, steps. Measured on the 597 test
    pictures: accuracy, and how well the student's logits are told from the teachers' mean: by the discriminator that
    was trained along (0.5 where it cannot), and by one that is trained anew."""
    g = ground()
    teachers, train, test = [t.to(run.device) for t in g["teachers"]], g["train"], g["test"]
    first = round(EMBEDDED.initial * EMBEDDED.steps)
    further: dict[str, Any] = {"steps": EMBEDDED.steps - first, "batch": EMBEDDED.batch, "lr": EMBEDDED.initial_lr}

    def new() -> nn.Module:
        run.begin()
        return TinyConvNet().to(run.device)

    def cropped(x: Tensor) -> Tensor:
        return view(x, EMBEDDED, run)

    def right(student: nn.Module) -> dict[str, float]:
        logits, label = predictions(student, test, device=run.device)
        wrong = logits.argmax(-1) != label
        run.picture("test digits taken for another", test.image[wrong][:40], columns=10)
        return {"accuracy": 1 - wrong.double().mean().item()}

    def meal(teachers: list[nn.Module] = teachers, **changes: Any) -> Callable[[], dict[str, float]]:
        config = dataclasses.replace(EMBEDDED, **changes)

        def measured() -> dict[str, float]:
            student, discriminator = play(teachers, new(), train, None, config, run)
            pairs = {part: logits_of(student, teachers, g[part], run) for part in ("train", "test")}
            anew = new_discriminator(pairs["train"], run)
            return {**right(student), "told apart": verdict(discriminator, pairs["test"], run),
                    "told apart anew": verdict(anew, pairs["test"], run)}

        return measured

    def trained() -> nn.Module:
        return initialise(new(), train, first, EMBEDDED, run)

    better = max(teachers, key=lambda teacher: accuracy(teacher, train, device=run.device))
    return run.arms(
        {"labels": lambda: right(supervised.train(trained(), train, supervised.Config(**further), run, cropped)),
         "kd": lambda: right(kd.distill(better, trained(), train, kd.Config(**further), run, cropped)),
         "meal": meal(),
         "fresh student": meal(steps=EMBEDDED.steps - first, initial=0.0),
         "with labels": meal(hard=1.0),
         "weight decay": meal(weight_decay=1e-2),
         "no adversary": meal(reversal=0.0)},
        extended={
            "first phase": lambda: right(trained()),
            "teachers": lambda: {name: accuracy(t, test, device=run.device)
                                 for name, t in zip(("resnet", "vit"), teachers, strict=True)},
            "fresh student, all steps": meal(initial=0.0),
            "better teacher alone": meal([better]),
            "mean of logits": meal(average="logits"),
            "released": meal(reversal=-1.0, last_relu=True, discriminator_lr=EMBEDDED.lr),
            "cutmix": meal(cutmix=0.5),
            "cutmix, seen by the teachers": meal(cutmix=0.5, cutmix_target="seen")})


def logits_of(student: nn.Module, teachers: Sequence[nn.Module], data: Any, run: Run) -> TensorSet:
    """The student's logits and the mean of the teachers' for a whole set."""
    real = torch.stack([extract(t, data, device=run.device) for t in teachers]).mean(0)
    return TensorSet(fake=extract(student, data, device=run.device), real=real)


def new_discriminator(pairs: TensorSet, run: Run) -> LogitDiscriminator:
    """One that is trained on the logits of a finished student."""
    judge = LogitDiscriminator(pairs.real.shape[1]).to(run.device)
    optimizer = torch.optim.AdamW(judge.parameters(), lr=0.01, weight_decay=0.0)
    for batch in run.loop("judge", pairs, batch=100, steps=200, judge=judge, optimizer=optimizer):
        run.update(optimizer, apart=two_logit_loss(judge(batch["fake"]), judge(batch["real"])))
    return judge


def verdict(discriminator: LogitDiscriminator, pairs: TensorSet, run: Run) -> float:
    with run.aside("verdict", discriminator):
        return told_apart(*(discriminator(pairs.data[side].to(run.device)) for side in ("fake", "real"))).item()
