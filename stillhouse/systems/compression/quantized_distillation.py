"""Quantized distillation and differentiable quantization: a teacher is distilled into a student of few-bit weights.

Q(w) takes every value of a weight tensor to one of s = 2^b points, in buckets of k values that have an offset and a
scale each (`stillhouse.parts.quantizers`). With z the logits of the teacher or of the student the loss is

    L = rho T^2 KL(softmax(z_t / T) || softmax(z_s / T)) + (1 - rho) CE(y, z_s).

Quantized distillation trains full-precision weights w by the gradient that L has at their quantised values:

    w <- w - lr dL/dw_q,  w_q = Q(w),        and returns Q(w) after the last step.

Differentiable quantization keeps the weights of a trained student and learns where the points p_1 <= ... <= p_s lie,
with alpha the range of a value's bucket and the student's own full precision for a teacher:

    dL/dp_j = sum over the i assigned to j of alpha_i dL/dw_i.

It begins at the percentiles of the scaled weights, sorts the points after every step, and may share the points out
among the tensors by the norms of their gradients. The two can alternate: weights, points, weights, ...; the weights go
on from their values at the points learned, and the run ends with quantized distillation.

Polino et al. 2018, "Model compression via distillation and quantization". Deviations: the KL is a mean over the batch
(the released code averages over batch and classes: `reduction="element"`); what rounding leaves of the points goes to
the largest remainders; the gradients of the allocation are taken in eval mode; learning rates fall along a cosine
instead of by plateaus; `spare_ends` spares the first and last layer (the code: tensor).
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from stillhouse.data.digits import digits
from stillhouse.data.sets import TensorSet, fetch
from stillhouse.errors import RoleError, require
from stillhouse.evaluate.claims import Claim
from stillhouse.evaluate.classification import accuracy
from stillhouse.evaluate.size import model_size
from stillhouse.measures.divergences import kl
from stillhouse.models.convnets import ConvNet
from stillhouse.parts.packed import QuantizedModel
from stillhouse.parts.quantizers import (
    Code,
    Codebook,
    Gradient,
    allocate_points,
    encode,
    even_points,
    quantizable,
    straight_through,
)
from stillhouse.protocols import Classifier, LabelledImages
from stillhouse.recipes.supervised import check_training
from stillhouse.run import Run, begin, frozen, set_lr
from stillhouse.run.reading import to_device
from stillhouse.run.schedules import cosine, warmup_cosine
from stillhouse.zoo.classifiers import digits_teacher

NUMBER = 82

CLAIMS = [
    Claim("at 2 bits quantized distillation beats quantising the full-precision student by more than 5 points",
          lambda a: a["quantized, 2 bits"]["accuracy"] - a["post, 2 bits"]["accuracy"] - 0.05),
    Claim("at 2 bits learned points beat quantising the full-precision student",
          lambda a: a["points, 2 bits"]["accuracy"] - a["post, 2 bits"]["accuracy"]),
    Claim("at 2 bits quantising with one bucket a tensor is worse than with buckets of 64",
          lambda a: a["post, 2 bits"]["accuracy"] - a["post, 2 bits, one bucket"]["accuracy"]),
    Claim("at 4 bits quantized distillation is within 2 points of the full-precision student",
          lambda a: a["quantized, 4 bits"]["accuracy"] - a["full precision"]["accuracy"] + 0.02),
    Claim("at 4 bits the quantised weights take less than a fifth of the space",
          lambda a: a["quantized, 4 bits"]["times smaller"] - 5),
    Claim("at 2 bits the teacher helps quantised training on labels",
          lambda a: a["quantized, 2 bits"]["accuracy"] - a["labels, 2 bits"]["accuracy"], report=True),
    Claim("at 2 bits learning the points beats leaving them at the percentiles",
          lambda a: a["points, 2 bits"]["accuracy"] - a["percentiles, 2 bits"]["accuracy"], report=True),
]

NOT_COUNTED = -100


@dataclass(frozen=True)
class Config:
    steps: int = 400_000  # optimiser steps in all: 200 epochs of 50,000 pictures
    batch: int = 25  # pictures a step
    bits: int = 4  # b: s = 2^b points
    bucket: int | None = 256  # k: values that share a scale; None: one scale a tensor
    points: float = 0.0  # part of the steps that learns points: 0 quantized distillation, 1 differentiable quantization
    rounds: int = 1  # for 0 < points < 1: how many times learning points interrupts learning weights
    tensors: Literal["all", "weights", "none"] = "all"  # weights: no biases and normalisations; none: full precision
    keep: tuple[str, ...] = ()  # names or patterns of parameters that stay in full precision
    spare_ends: bool = False  # leave the first and the last layer in full precision
    rounding: Literal["nearest", "stochastic"] = "nearest"  # of the weights while they are trained
    gradient: Gradient = "plain"  # how the gradient passes the quantiser
    start: Literal["percentiles", "even"] = "percentiles"  # where the points begin
    allocate: bool = True  # share the points out by the norms of the gradients
    allocation_batches: int = 5  # batches over which those gradients are averaged
    temperature: float = 2.0  # T
    rho: float = 0.7  # weight of the teacher; the labels have 1 - rho
    reduction: Literal["batch", "element"] = "batch"  # of the KL: mean over samples, or over samples and classes
    lr: float = 1e-3  # peak learning rate of the weights, a cosine to 0; SGD with Nesterov momentum 0.9
    warmup: float = 0.0  # part of the steps in which it rises
    weight_decay: float = 2.2e-4  # lambda, on the weights
    points_lr: float = 1e-5  # peak learning rate of the points, a cosine to 0; gradients sum over a point's weights

    def __post_init__(self) -> None:
        check_training(self.steps, self.batch, self.lr, self.warmup, self.weight_decay)
        require(1 <= self.bits <= 16, f"bits must lie between 1 and 16, not {self.bits}")
        require(self.bucket is None or self.bucket >= 1, f"bucket is 1 value or more, or None; not {self.bucket}")
        require(0 <= self.points <= 1, f"points is a fraction of the steps, not {self.points}")
        require(self.rounds >= 1 and self.allocation_batches >= 1, "rounds and allocation_batches must be 1 or more")
        require(0 <= self.rho <= 1 and self.temperature > 0,
                f"rho must lie in [0, 1] and temperature above 0; got {self.rho} and {self.temperature}")
        require(self.points_lr > 0, f"points_lr must be above 0, not {self.points_lr}")
        choices = {"tensors": ("all", "weights", "none"), "rounding": ("nearest", "stochastic"),
                   "gradient": ("plain", "truncated", "complicated"), "start": ("percentiles", "even"),
                   "reduction": ("batch", "element")}
        for name, known in choices.items():
            value = getattr(self, name)
            require(value in known, f"{name} is one of {', '.join(known)}, not {value!r}")


EMBEDDED = Config(steps=285, batch=64, bits=2, bucket=64, tensors="weights", allocate=False, lr=0.1, warmup=0.05,
                  points_lr=5e-5)


class Phase(NamedTuple):
    """Steps that train the weights, or the points; `before` are the earlier steps of its kind."""

    kind: Literal["weights", "points"]
    name: str
    steps: int
    before: int


def phases(config: Config) -> list[Phase]:
    """One phase, or weights, points, weights, ..., weights."""
    learned = round(config.points * config.steps)
    if config.points in (0, 1):
        kind: Literal["weights", "points"] = "points" if config.points else "weights"
        return [Phase(kind, kind, config.steps, 0)]

    def parts(kind: Any, steps: int, n: int) -> list[Phase]:
        ends = [steps * i // n for i in range(n + 1)]
        return [Phase(kind, f"{kind} {i + 1}", ends[i + 1] - ends[i], ends[i]) for i in range(n)]

    weights, points = (parts("weights", config.steps - learned, config.rounds + 1),
                       parts("points", learned, config.rounds))
    return [p for pair in zip(weights, points, strict=False) for p in pair] + weights[-1:]


def distill(
    student: Classifier,
    labelled: LabelledImages,
    teacher: Classifier | None = None,
    config: Config = Config(),
    run: Run | None = None,
) -> QuantizedModel:
    """Train the student in place and quantise it; `save` of what is returned writes the packed weights.

    With `points=1` the student must be trained already and is its own teacher; otherwise a teacher is needed unless
    `rho` is 0. Logits may be [batch, ..., classes] with labels [batch, ...]; labels of -100 do not count.
    """
    run = begin(run)
    plan = phases(config)
    if config.points == 1:
        require(teacher is None, "with points=1 the student's own full precision is the teacher; leave teacher out, or "
                "distil first (points=0, tensors='none')", RoleError)
    else:
        require(teacher is not None or config.rho == 0, "quantized distillation needs a teacher; give one, or rho=0 to "
                "train on labels alone", RoleError)
    run.check(Classifier, labelled, labels=True, student=student, teacher=teacher)
    assert isinstance(student, nn.Module)
    names = quantizable(student, config.tensors, config.keep, config.spare_ends)
    shadow = {name: p for name, p in student.named_parameters() if name in names}
    optimizer = torch.optim.SGD(student.parameters(), config.lr, momentum=0.9, nesterov=True,
                                weight_decay=config.weight_decay)
    target = QuantizedModel(student, {})
    student.train()
    with frozen(teacher):
        for phase in plan:
            if phase.kind == "points":
                target = QuantizedModel(student, learn_points(student, shadow, labelled, phase, config, run))
                continue
            total = sum(p.steps for p in plan if p.kind == "weights")
            for batch in run.loop(phase.name, labelled, batch=config.batch, steps=phase.steps, student=student,
                                  optimizer=optimizer, drop_last=len(labelled) >= config.batch):
                set_lr(optimizer, config.lr * warmup_cosine((phase.before + run.k) / total, config.warmup))
                weights = {name: straight_through(w, 2**config.bits, config.bucket, config.gradient,
                                                  noise(w, config, run)) for name, w in shadow.items()}
                logits = functional_call(student, weights, (batch["image"],))
                run.update(optimizer, clip=None, **losses(teacher, batch, logits, config, run))
    if plan[-1].kind == "weights":
        target = QuantizedModel(student, {name: encode(clamped(w, config), 2**config.bits, config.bucket)
                                          for name, w in shadow.items()})
    size = model_size(target)
    run.say(f"the model takes {size.megabytes:.3g} MB, {size.huffman_megabytes:.3g} with Huffman coded indices")
    return target


def learn_points(student: nn.Module, shadow: dict[str, nn.Parameter], labelled: LabelledImages, phase: Phase,
                 config: Config, run: Run) -> dict[str, Code]:
    """Differentiable quantization of fixed weights; the batch statistics of the student are estimated anew."""
    teacher = copy.deepcopy(student)
    levels = [2**config.bits] * len(shadow)
    if config.allocate and shadow:
        norms = run.once(f"norms of {phase.name}", lambda: gradient_norms(student, shadow, labelled, config, run))
        levels = allocate_points(norms, 2**config.bits)
        run.say(f"points a tensor: {dict(zip(shadow, levels, strict=True))}")
    books = [Codebook(w, s, config.bucket, config.start) for w, s in zip(shadow.values(), levels, strict=True)]
    require(len(books) > 0, "there are no points to learn: tensors is 'none'")
    optimizer = torch.optim.SGD([book.points for book in books], config.points_lr, momentum=0.9, nesterov=True)
    with frozen(teacher):
        for batch in run.loop(phase.name, labelled, batch=config.batch, steps=phase.steps, student=student,
                              books=books, optimizer=optimizer, drop_last=len(labelled) >= config.batch):
            set_lr(optimizer, config.points_lr * cosine(run.progress))
            weights = {name: book() for name, book in zip(shadow, books, strict=True)}
            logits = functional_call(student, weights, (batch["image"],))
            run.update(optimizer, clip=None, **losses(teacher, batch, logits, config, run))
            for book in books:
                book.sort_()
    return {name: book.code() for name, book in zip(shadow, books, strict=True)}


def losses(teacher: Any, batch: dict[str, Tensor], logits: Tensor, config: Config, run: Run) -> dict[str, Tensor]:
    """The two terms of L; means over the labels that count."""
    label = batch["label"]
    counted = label != NOT_COUNTED
    terms = {}
    if config.rho < 1:
        ce = F.cross_entropy(logits.flatten(0, -2), label.flatten(), ignore_index=NOT_COUNTED, reduction="sum")
        terms["ce"] = (1 - config.rho) * run.mean(ce, counted.sum())
    if config.rho > 0:
        with torch.no_grad():
            target = teacher(batch["image"])
        distance = kl(target, logits, config.temperature, mask=counted, reduction="sum")
        classes = logits.shape[-1] if config.reduction == "element" else 1
        terms["kd"] = config.rho / classes * run.mean(distance, counted.sum())
    return terms


def noise(w: Tensor, config: Config, run: Run) -> Tensor | None:
    """Uniform draws in the shape of w, the same on all processes; None where rounding is to the nearest point."""
    return torch.rand(w.shape, generator=run.shared).to(w) if config.rounding == "stochastic" else None


def clamped(w: Tensor, config: Config) -> Tensor:
    """w, or what the truncated gradient quantises."""
    return w.clamp(-1, 1) if config.gradient == "truncated" else w


def gradient_norms(student: nn.Module, shadow: dict[str, nn.Parameter], labelled: LabelledImages, config: Config,
                   run: Run) -> list[float]:
    """2-norm per tensor of the mean gradient of the cross-entropy at the full-precision weights over a few batches."""
    trained = {name: torch.zeros_like(w) for name, w in shadow.items() if w.requires_grad}
    chosen = torch.randperm(len(labelled))[: config.allocation_batches * config.batch].split(config.batch)
    with run.aside("gradients", student, grad=True):
        for indices in chosen:
            batch = to_device(fetch(labelled, indices.tolist()), run.device)
            ce = F.cross_entropy(student(batch["image"]).flatten(0, -2), batch["label"].flatten(),
                                 ignore_index=NOT_COUNTED)
            grads = torch.autograd.grad(ce, [shadow[name] for name in trained], allow_unused=True)
            for mean, g in zip(trained.values(), grads, strict=True):
                mean += 0 if g is None else g / len(chosen)
    return [trained[name].norm().item() if name in trained else 0.0 for name in shadow]


def tiny() -> dict[str, Any]:
    torch.manual_seed(0)
    teacher = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 4))
    student = nn.Sequential(nn.Flatten(), nn.Linear(64, 6), nn.ReLU(), nn.Linear(6, 4))
    config = Config(steps=9, batch=6, bits=2, bucket=16, points=0.4, rounding="stochastic", gradient="complicated",
                    lr=0.1, points_lr=1e-3)
    return {"teacher": teacher, "student": student, "config": config,
            "labelled": TensorSet(image=torch.rand(16, 1, 8, 8), label=torch.arange(16) % 4)}


# -------------------------------------------------------------------- the embedded experiment


def experiment(run: Run) -> dict[str, dict[str, float]]:
    """A ConvNet of four convolutions, as in the paper, and 7,418 parameters learns 1,200 digits of 16 pixels from a
    ResNet; accuracy on 597 others, and how many times smaller the quantised weights are (`Huffman`: with their indices
    so coded)."""
    train: Any = digits(16, "train")
    test, teacher = digits(16, "test"), digits_teacher(16).to(run.device)

    def new() -> nn.Module:
        run.begin()
        return ConvNet(width=16, depth=4, image_size=16, norm="batch").to(run.device)

    with run.scope("full precision"):
        full = distill(new(), train, teacher, dataclasses.replace(EMBEDDED, tensors="none"), run).model

    def measured(target: QuantizedModel) -> dict[str, float]:
        found = {"accuracy": accuracy(target.model, test, device=run.device)}
        if target.codes:
            size = model_size(target)
            found |= {"times smaller": size.ratio, "Huffman": size.full / size.huffman}
            run.picture("use of the points", use_of_points(target))
        run.picture("filters of the first layer", next(target.model.parameters()), columns=8)
        return found

    def trained(**changes: Any) -> Callable[[], dict[str, float]]:
        config = dataclasses.replace(EMBEDDED, **changes)
        return lambda: measured(distill(new(), train, teacher, config, run))

    def given(**changes: Any) -> Callable[[], dict[str, float]]:
        """From the full-precision student, without another look at the teacher."""
        config = dataclasses.replace(EMBEDDED, **{"points": 1.0, **changes})
        return lambda: measured(distill(copy.deepcopy(full), train, None, config, run))

    post: dict[str, Any] = {"points": 0.0, "rho": 0.0, "steps": 0}
    return run.arms(
        {"full precision": lambda: measured(QuantizedModel(full, {})),
         "post, 2 bits": given(**post),
         "post, 2 bits, one bucket": given(**post, bucket=None),
         "post, 4 bits": given(**post, bits=4),
         "labels, 2 bits": trained(rho=0.0),
         "labels, 4 bits": trained(rho=0.0, bits=4),
         "quantized, 2 bits": trained(),
         "quantized, 4 bits": trained(bits=4),
         "percentiles, 2 bits": given(steps=0),
         "points, 2 bits": given(),
         "points, 4 bits": given(bits=4)},
        extended={"post, 4 bits, one bucket": given(**post, bits=4, bucket=None),
                  "quantized, 2 bits, one bucket": trained(bucket=None),
                  "quantized, 2 bits, stochastic": trained(rounding="stochastic"),
                  "quantized, 2 bits, truncated": trained(gradient="truncated"),
                  "quantized, 2 bits, complicated": trained(gradient="complicated"),
                  "quantized, 2 bits, all tensors": trained(tensors="all"),
                  "quantized, 2 bits, ends spared": trained(spare_ends=True),
                  "quantized, 2 bits, mean over elements": trained(reduction="element"),
                  "points, 2 bits, even start": given(start="even"),
                  "points, 2 bits, allocated": given(allocate=True),
                  "alternating, 2 bits": trained(points=0.4, rounds=3, allocate=True)})


def use_of_points(target: QuantizedModel) -> Any:
    """A figure: where the points of the largest tensor lie, and which part of its values each has."""
    from matplotlib.figure import Figure

    name, code = max(target.codes.items(), key=lambda pair: pair[1].index.numel())
    points = even_points(code.levels) if code.points is None else code.points
    figure = Figure(figsize=(4, 2))
    axes = figure.add_subplot(xlabel=f"point, as a part of its bucket's range ({name})", ylabel="part of the values")
    axes.stem(points.numpy(), (torch.bincount(code.index, minlength=code.levels) / len(code.index)).numpy())
    return figure
