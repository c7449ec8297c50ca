"""MEKD: a classifier behind an interface is copied through pictures that are generated from logits.

Only answers of the teacher T are known (soft, or the best label alone), and private pictures x must not be sent to it.
1. Deprivatization. A generator G of pictures from z ~ N(0, I_C), C the number of classes, emulates the inverse of T:

    L_D = -log D(x) - log(1 - D(G(z)))
    L_G = mean_i -(1 + a_im yhat_i) log D(G(z_i)),   yhat_i = max_c softmax(T(G(z_i)))_c, a constant; labels: yhat = 1

2. Distillation. G is frozen. With x' = G(z), t = T(x'), s = S(x') teacher and student are compared by the pictures that
   G makes of their logits, and by the logits:

    L = w_f |G(s / tau_g) - G(t / tau_g)|_1 (mean) + w_kl tau KL(softmax(t / tau) || softmax(s / tau)).

Where only labels come back t is one-hot, and the second term is the cross-entropy with the label (`target="label"`), or
the released one with softmax(t / tau), which is almost flat (`target="flat"`).

Ma et al. 2024. Deviations: yhat is the highest probability, as in the paper (the released code multiplies by the number
of the class); discriminator and generator see the same z in a step; the discriminator has no BatchNorm right before its
linear layer (`PictureDiscriminator`); `pool` asks about that many pictures once instead of about new ones in every
step. Probabilities become logits that sum to zero.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from stillhouse.data.digits import digits
from stillhouse.data.sets import TensorSet
from stillhouse.errors import RoleError, require
from stillhouse.evaluate.claims import Claim
from stillhouse.evaluate.classification import accuracy
from stillhouse.measures.divergences import kl
from stillhouse.models.convnets import TinyConvNet
from stillhouse.models.generators import PictureGenerator
from stillhouse.parts.black_box import Answer, BlackBox
from stillhouse.protocols import Classifier, Images
from stillhouse.recipes import data_free, gan
from stillhouse.recipes.supervised import check_training, optimizer_for
from stillhouse.run import Run, begin, frozen, set_lr
from stillhouse.run.check import first_batch
from stillhouse.run.schedules import piecewise, warmup
from stillhouse.zoo.classifiers import digits_classifier

NUMBER = 115

CLAIMS = [
    Claim("MEKD beats asking about random noise by ten points",
          lambda a: a["mekd"]["accuracy"] - a["noise"]["accuracy"] - 0.1),
    Claim("with labels alone it loses at most five points",
          lambda a: a["mekd, labels"]["accuracy"] - a["mekd"]["accuracy"] + 0.05),
    Claim("L_IM does not make the teacher less sure of the generated pictures",
          lambda a: a["mekd"]["confidence"] - a["gan without L_IM"]["confidence"]),
    Claim("the image-level term costs at most half a point",
          lambda a: a["mekd"]["accuracy"] - a["no image term"]["accuracy"] + 0.005),
    Claim("MEKD beats KD on pictures of a generator that has not met the teacher",
          lambda a: a["mekd"]["accuracy"] - a["gan without L_IM"]["accuracy"], report=True),
    Claim("private pictures, if they could be sent, would do better",
          lambda a: a["private pictures sent"]["accuracy"] - a["mekd"]["accuracy"], report=True),
    Claim("MEKD beats white-box DAFL", lambda a: a["mekd"]["accuracy"] - a["dafl"]["accuracy"], report=True),
    Claim("cross-entropy with the label beats the flat target of the released code",
          lambda a: a["mekd, labels"]["accuracy"] - a["mekd, labels, flat"]["accuracy"], report=True),
    Claim("probabilities are as good as logits",
          lambda a: a["mekd, probabilities"]["accuracy"] - a["mekd"]["accuracy"], report=True),
    Claim("new pictures in every step beat a pool asked once",
          lambda a: a["mekd, no pool"]["accuracy"] - a["mekd"]["accuracy"], report=True),
]


@dataclass(frozen=True)
class Config:
    steps: int = 135_000  # optimiser steps of both stages: 200 epochs of 5,000 pictures, then 240 of 500 steps
    emulation: float = 1 / 9  # part of the steps that train the generator
    batch: int = 128  # pictures a step of the distillation
    gan_batch: int = 64  # pictures a step of the generator's training
    answer: Answer = "logits"  # what the teacher tells: "logits", "probabilities" or the best "label" alone
    target: Literal["label", "flat"] = "label"  # of the logit-level term where only labels come back
    pool: int = 0  # generated pictures that are asked about once, before the distillation; 0: new ones in every step
    budget: int | None = None  # most queries of the teacher; None: no limit
    information: float = 0.5  # a_im
    image_weight: float = 1.0  # w_f
    logit_weight: float = 1.0  # w_kl
    distance: Literal["l1", "l2"] = "l1"  # between generated pictures
    temperature: float = 5.0  # tau
    image_temperature: float = 5.0  # tau_g
    optimizer: Literal["sgd", "adamw"] = "sgd"  # of the student: SGD with momentum 0.9, or AdamW
    lr: float = 0.1  # its peak learning rate
    warmup: float = 0.0  # part of the distillation in which it rises
    drops: tuple[float, ...] = (1 / 3, 2 / 3)  # parts of the distillation after each of which it is a tenth
    weight_decay: float = 5e-4  # lambda
    gan_lr: float = 2e-4  # of Adam, for generator and discriminator
    width: int = 128  # channels of the generator
    eps: float = 0.8  # of the BatchNorms of generator and discriminator

    def __post_init__(self) -> None:
        check_training(self.steps, self.batch, self.lr, self.warmup, self.weight_decay)
        require(0 <= self.emulation <= 1, f"emulation is a part of the steps, not {self.emulation}")
        require(self.answer in ("logits", "probabilities", "label"), "answer is 'logits', 'probabilities' or 'label', "
                f"not {self.answer!r}")
        require(self.target in ("label", "flat"), f"target is 'label' or 'flat', not {self.target!r}")
        require(self.distance in ("l1", "l2"), f"distance is 'l1' or 'l2', not {self.distance!r}")
        require(min(self.information, self.image_weight, self.logit_weight, self.pool) >= 0, "information, the weights "
                "and pool must not be negative")
        require(self.image_weight + self.logit_weight > 0, "image_weight or logit_weight must be above 0")
        require(min(self.temperature, self.image_temperature) > 0, "temperatures must be above 0")
        require(self.optimizer in ("sgd", "adamw"), f"optimizer is 'sgd' or 'adamw', not {self.optimizer!r}")
        require(all(0 < drop < 1 for drop in self.drops), f"drops are parts of the distillation, not {self.drops}")


EMBEDDED = Config(steps=700, emulation=3 / 7, batch=64, pool=6000, image_weight=0.5, optimizer="adamw", lr=0.01,
                  drops=(0.6, 0.85), weight_decay=1e-4, gan_lr=2e-3, width=16, eps=1e-5)


def distill(
    teacher: Classifier,
    student: Classifier,
    unlabelled: Images,
    config: Config = Config(),
    run: Run | None = None,
) -> nn.Module:
    """Train the student in place. `unlabelled` are the private pictures, square and in [-1, 1]: they train the
    generator and are never sent to the teacher, which may be any function of pictures."""
    return emulated(teacher, student, unlabelled, config, run)[0]


def emulated(teacher: Any, student: Any, unlabelled: Any, config: Config, run: Run | None = None,
             ) -> tuple[nn.Module, PictureGenerator, BlackBox]:
    """What `distill` does; the generator and the teacher with its counters are returned as well."""
    run = begin(run)
    box = opened(teacher, student, unlabelled, config, run)
    with frozen(teacher):
        generator = emulate(box, unlabelled, config, run)
        with frozen(generator):
            learn(box, student, generator, config, run)
    run.log(**account(box))
    return student, generator, box


def opened(teacher: Any, student: Any, unlabelled: Any, config: Config, run: Run) -> BlackBox:
    """The teacher as a black box, asked about four pictures of noise to see that it has the student's classes."""
    run.check(Classifier, unlabelled, student=student)
    image = first_batch(unlabelled, ("image",))["image"]
    gan.checked(image)
    needed = queries(config)
    require(config.budget is None or needed <= config.budget, f"these settings ask the teacher about {needed:,} "
            f"pictures, more than the budget of {config.budget}; lower the steps, the batches, or set a pool")
    classes = _classes(student, image.to(run.device))
    box = BlackBox(teacher, config.answer, None, classes)
    noise = 2 * run.rand(4, *image.shape[1:]) - 1
    with frozen(teacher):
        found = box(noise).shape[-1]
    require(found == classes, f"the teacher has {found} classes and the student {classes}; give models made for the "
            "same task", RoleError)
    return box


def queries(config: Config) -> int:
    """How many pictures the teacher is asked about in all."""
    steps = round(config.emulation * config.steps)
    gan_queries = steps * config.gan_batch if config.information else 0
    return 4 + gan_queries + (config.pool or (config.steps - steps) * config.batch)


def account(box: BlackBox) -> dict[str, float]:
    """Queries, and bytes sent and received (pictures there; answers of four bytes a class, or one label, back)."""
    asked = int(box.queries)
    return {"queries": asked, "bytes sent": int(box.bytes),
            "bytes received": 4 * asked * (1 if box.answer == "label" else int(box.classes or 0))}


def emulate(box: BlackBox, unlabelled: Any, config: Config, run: Run) -> PictureGenerator:
    """Step 1: the generator, whose latent has the shape of the logits."""
    settings = gan.Config(steps=round(config.emulation * config.steps), batch=config.gan_batch, lr=config.gan_lr,
                          latent=int(box.classes or 0), width=config.width, eps=config.eps)

    def weigh(fake: Tensor) -> Tensor:
        return 1 + config.information * sureness(box, fake)

    with run.scope("emulate"):
        return gan.train(unlabelled, settings, run, weigh if config.information else None, _counters(box))


def sureness(box: BlackBox, image: Tensor) -> Float[Tensor, " n"]:
    """yhat: the teacher's highest probability; 1 where it tells labels alone."""
    answers = box(image)
    return torch.ones(len(image), device=image.device) if box.answer == "label" else answers.softmax(-1).amax(-1)


def ask(box: BlackBox, image: Tensor) -> Float[Tensor, "n classes"]:
    """t, the teacher's answers as logits: raw ones, log-probabilities shifted to a sum of zero, or one-hot labels."""
    z = box(image)
    if box.answer == "probabilities":
        return z - z.mean(-1, keepdim=True)
    return F.one_hot(z.argmax(-1), z.shape[-1]).to(image.dtype) if box.answer == "label" else z


def learn(box: BlackBox, student: Any, generator: PictureGenerator, config: Config, run: Run, images: Any = None
          ) -> nn.Module:
    """Step 2: the student learns on generated pictures, or on other `images`, through a frozen generator."""
    n_classes, steps = int(box.classes or 0), config.steps - round(config.emulation * config.steps)
    pool = asked(box, generator, images, config, run) if config.pool or images is not None else None
    optimizer = optimizer_for(student.parameters(), config.optimizer, config.lr, config.weight_decay)
    n = len(list(run.shard(range(config.batch))))
    student.train()
    for batch in run.loop("distil", pool, batch=min(config.batch, len(pool)) if pool else config.batch, steps=steps,
                          student=student, optimizer=optimizer, drop_last=True, **_counters(box)):
        p = run.progress
        set_lr(optimizer, config.lr * warmup(p, config.warmup) * piecewise(p, [(d, 0.1) for d in config.drops]))
        if pool is None:
            with torch.no_grad():
                x = generator(run.randn(n, n_classes))
            t = ask(box, x)
        else:
            x, t = batch["image"], batch["answer"]
        s = student(x)
        terms: dict[str, Any] = {}
        if config.image_weight:
            terms["image"] = config.image_weight * image_term(s, t, generator, config)
        if config.logit_weight:
            terms["logit"] = config.logit_weight * logit_term(s, t, config)
        run.update(optimizer, **terms)
    return student


def asked(box: BlackBox, generator: PictureGenerator, images: Any, config: Config, run: Run) -> TensorSet:
    """Pictures with the teacher's answers, asked about once: `pool` generated ones, or the given ones."""
    def fetch() -> dict[str, Any]:
        if images is None:
            z = torch.randn(config.pool, int(box.classes or 0), generator=run.shared).to(run.device)
            with torch.no_grad():
                x = torch.cat([generator(part) for part in z.split(config.batch)])
        else:
            x = images.to(run.device)
        t = torch.cat([ask(box, part) for part in x.split(config.batch)])
        return {"image": x.cpu(), "answer": t.cpu(), "queries": box.queries.cpu(), "bytes": box.bytes.cpu()}

    found = run.once("ask", fetch)
    box.queries.copy_(found["queries"])
    box.bytes.copy_(found["bytes"])
    return TensorSet(image=found["image"].cpu(), answer=found["answer"].cpu())


def image_term(s: Tensor, t: Tensor, generator: nn.Module, config: Config) -> Tensor:
    """L_F; gradients go through the generator into s alone."""
    with torch.no_grad():
        target = generator(t / config.image_temperature)
    measure = F.l1_loss if config.distance == "l1" else F.mse_loss
    return measure(generator(s / config.image_temperature), target)


def logit_term(s: Tensor, t: Tensor, config: Config) -> Tensor:
    """L_KL, times tau (not squared); or the cross-entropy with the label."""
    if config.answer == "label" and config.target == "label":
        return F.cross_entropy(s, t.argmax(-1))
    return kl(t, s, config.temperature) / config.temperature


def _counters(box: BlackBox) -> dict[str, Any]:
    return {"queries": box.queries, "sent": box.bytes}


def _classes(student: nn.Module, image: Tensor) -> int:
    modes = [(m, m.training) for m in student.modules()]
    with torch.no_grad():
        width = student.eval()(image[:1]).shape[-1]
    for module, training in modes:
        module.training = training
    return width


def tiny() -> dict[str, Any]:
    torch.manual_seed(0)
    teacher, student = (nn.Sequential(nn.Conv2d(1, width, 3, 2), nn.Tanh(), nn.Flatten(), nn.Linear(width * 9, 4))
                        for width in (3, 2))
    return {"teacher": teacher, "student": student, "unlabelled": TensorSet(image=2 * torch.rand(10, 1, 8, 8) - 1),
            "config": Config(steps=6, emulation=0.5, batch=4, gan_batch=4, pool=6, width=4, eps=1e-5)}


# -------------------------------------------------------------------- the embedded experiment


def experiment(run: Run) -> dict[str, dict[str, float]]:
    """All arms with the same student, steps of distillation and batch; 300 private digits without labels, 597 to test;
    a ResNet that was trained on 900 others. `confidence` is the teacher's on new pictures of the generator."""
    private: Any = digits(16, "train").select(range(900, 1200)).without("label")
    test = digits(16, "test")
    teacher = digits_classifier("resnet", first=0, last=900).to(run.device)
    made: dict[str, tuple[PictureGenerator, dict[str, Any]]] = {}

    def generator(box: BlackBox, config: Config) -> PictureGenerator:
        """Trained once for all arms that would train the same."""
        key = f"{config.information} {config.answer if config.answer == 'label' else 'soft'}"
        if key not in made:
            network = emulate(box, private, config, run).requires_grad_(False)
            made[key] = network, {name: value.clone() for name, value in _counters(box).items()}
        network, counts = made[key]
        for name, value in _counters(box).items():
            value.copy_(counts[name])
        return network.eval()

    def arm(images: Tensor | None = None, **changes: Any) -> Callable[[], dict[str, float]]:
        config = dataclasses.replace(EMBEDDED, **changes)

        def trained() -> dict[str, float]:
            run.begin()
            student = TinyConvNet().to(run.device)
            box = BlackBox(teacher, config.answer, None, 10)
            with frozen(teacher):
                network = generator(box, config) if images is None else None
                learn(box, student, network, config, run, images)  # type: ignore[arg-type]
            result = {"accuracy": accuracy(student, test, device=run.device), **account(box)}
            return result | (seen(network, teacher, run) if network is not None else {})

        return trained

    def dafl() -> dict[str, float]:
        run.begin()
        config = data_free.Config(shape=(1, 16, 16), steps=EMBEDDED.steps, batch=64, optimizer=EMBEDDED.optimizer,
                                  lr=EMBEDDED.lr, weight_decay=EMBEDDED.weight_decay, latent=10, width=EMBEDDED.width)
        student = data_free.distill(teacher, TinyConvNet().to(run.device), config, run)
        return {"accuracy": accuracy(student, test, device=run.device)}

    noise = 2 * torch.rand(EMBEDDED.pool, 1, 16, 16, generator=torch.Generator().manual_seed(run.seed)) - 1
    plain: dict[str, Any] = {"image_weight": 0.0}
    return run.arms(
        {"private pictures sent": arm(private.image, **plain),
         "noise": arm(noise, **plain),
         "gan without L_IM": arm(information=0.0, **plain),
         "mekd": arm(),
         "mekd, labels": arm(answer="label"),
         "no image term": arm(**plain)},
        extended={"mekd, labels, flat": arm(answer="label", target="flat"),
                  "mekd, probabilities": arm(answer="probabilities"),
                  "mekd, no pool": arm(pool=0),
                  "dafl": dafl})


def seen(generator: PictureGenerator, teacher: nn.Module, run: Run) -> dict[str, float]:
    """How sure the teacher is of a thousand new generated pictures, and how evenly it spreads them over the classes (as
    a part of the highest entropy). Draws pictures of logits that favour one class each."""
    with run.aside("generated", generator, teacher):
        p = teacher(generator(run.randn(1000, 10))).softmax(-1)
        pure = generator(2 * torch.eye(10, device=run.device).repeat(2, 1))
    mean = p.mean(0)
    run.picture("from logits of one class each", pure, columns=10)
    return {"confidence": p.amax(-1).mean().item(),
            "evenness": -torch.xlogy(mean, mean).sum().item() / math.log(10)}
