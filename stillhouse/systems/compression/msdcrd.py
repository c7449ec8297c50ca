"""MSDCRD: the last feature map of a classifier is moved into a student, window by window, within a single batch.

F_T and F_S are the maps before the pooling (tokens as a grid); a 1 x 1 convolution with BatchNorm and, where the sizes
differ, a bilinear resize bring F_S to F_T's channels and grid. For every window size k (k = H is the global feature)
sliding means give n_k local features a picture, matched by place: s_i of the student, t_i of the teacher. The teacher's
own head, put on each t_i, says which windows are reliable (its answer is the label) and which are ambiguous; the two
groups are contrasted apart. With features of unit length,

    L_sw = -mean_i log [ exp(s_i . t_i / tau) / sum_j exp(s_i . t_j / tau) ]           j: all windows of i's group
    L_fw = -mean_c log [ exp(s^c . t^c / tau) / sum_c' exp(s^c . t^c' / tau) ]         s^c: channel c over the windows
    L = CE (+ KD) + beta mean_k (L_sw + L_fw)

L_fw is taken in each group and weighted by the group's share of the windows. The projector is thrown away.

Wang and Wang 2025 (arXiv 2502.05835). The abstract confirms the windows, the categories, both losses and the single
batch; the rule for the categories, the window sizes, tau and the weights are our reading. The learning rate falls along
a cosine in place of three drops.
"""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stillhouse.data.sets import TensorSet
from stillhouse.data.shapes import coloured_names, coloured_shapes
from stillhouse.data.variants import balanced
from stillhouse.errors import require
from stillhouse.evaluate.claims import Claim
from stillhouse.evaluate.classification import accuracy
from stillhouse.evaluate.cost import saved_bytes
from stillhouse.measures.divergences import kl
from stillhouse.measures.local_contrast import channel_contrast, window_contrast, window_means, window_sizes
from stillhouse.models.convnets import TinyConvNet
from stillhouse.parts.last_map import LocalHead, last_map, local_head
from stillhouse.parts.regressors import Regressor
from stillhouse.parts.stages import feature_map
from stillhouse.parts.taps import taps
from stillhouse.protocols import AnyImages, Classifier
from stillhouse.recipes import crd, kd, supervised
from stillhouse.recipes.supervised import check_training, optimizer_for
from stillhouse.recipes.views import random_view
from stillhouse.run import Run, begin, frozen, set_lr
from stillhouse.run.reading import to_device
from stillhouse.run.schedules import warmup_cosine
from stillhouse.zoo.classifiers import shapes_classifier

NUMBER = 63

CLAIMS = [
    Claim("MSDCRD beats the student trained on the labels alone",
          lambda a: a["msdcrd"]["accuracy"] - a["labels"]["accuracy"]),
    Claim("it is at least as good as contrast of the global feature alone",
          lambda a: a["msdcrd"]["accuracy"] - a["global only"]["accuracy"]),
    Claim("its local features are nearer to the teacher's than after contrast of the global feature alone",
          lambda a: a["msdcrd"]["local cosine"] - a["global only"]["local cosine"]),
    Claim("it beats Hinton's KD", lambda a: a["msdcrd"]["accuracy"] - a["kd"]["accuracy"], report=True),
    Claim("the feature-wise term adds to it", lambda a: a["msdcrd"]["accuracy"] - a["sample-wise only"]["accuracy"],
          report=True),
    Claim("the sample-wise term adds to it", lambda a: a["msdcrd"]["accuracy"] - a["feature-wise only"]["accuracy"],
          report=True),
    Claim("the categories add to it", lambda a: a["msdcrd"]["accuracy"] - a["no categories"]["accuracy"], report=True),
    Claim("it beats CRD with its memory", lambda a: a["msdcrd"]["accuracy"] - a["crd"]["accuracy"], report=True),
    Claim("its loss is cheaper than CRD's with a sixteenth of the published 16,384 negatives",
          lambda a: 1 - a["cost"]["milliseconds"] / a["cost"]["milliseconds, crd"], report=True),
    Claim("and keeps less in memory", lambda a: 1 - a["cost"]["megabytes"] / a["cost"]["megabytes, crd"], report=True),
    Claim("with a third of the labels it beats the labels alone",
          lambda a: a["few labels, msdcrd"]["accuracy"] - a["few labels"]["accuracy"], report=True),
]


@dataclass(frozen=True)
class Config:
    steps: int = 187_500  # optimiser steps: 240 epochs of 50,000 pictures at this batch
    batch: int = 64  # pictures a step
    optimizer: Literal["sgd", "adamw", "lars"] = "sgd"  # SGD with momentum 0.9, AdamW, or LARS with momentum 0.9
    lr: float = 0.05  # peak learning rate; a cosine to 0
    warmup: float = 0.0  # part of the steps in which the learning rate rises
    weight_decay: float = 5e-4  # lambda
    view: float = 0.0  # strength of the random shifts, turns and light changes, the same for both models
    ce: float = 1.0  # weight of the cross-entropy with the labels
    kd: float = 0.0  # weight of T^2 KL between the softened probabilities of teacher and student
    temperature: float = 4.0  # T
    beta: float = 1.0  # beta: weight of both contrastive losses
    sample: float = 1.0  # weight of L_sw within beta; 0: none
    feature: float = 1.0  # weight of L_fw within beta; 0: none
    tau: float = 0.1  # tau: divides the cosines
    scales: tuple[float, ...] = (1.0, 0.5, 0.25)  # k / H: window sizes as parts of the map's side
    stride: Literal["one", "half"] = "one"  # step of the sliding windows: 1, or k / 2
    negatives: Literal["all", "place"] = "all"  # all other windows, or the same window of the other pictures
    same_class: bool = True  # whether pictures of the same label are negatives of each other
    categories: Literal["label", "teacher", "none"] = "label"  # what the head must say of a window to be reliable: the
    # label, or what it says of the whole picture; "none": no groups
    ambiguous: float = 1.0  # weight of the ambiguous windows
    norm: bool = True  # whether the projector has BatchNorm
    teacher_map: str = ""  # F_T: path of a module; empty: the last map is found
    student_map: str = ""  # F_S, likewise

    def __post_init__(self) -> None:
        check_training(self.steps, self.batch, self.lr, self.warmup, self.weight_decay)
        require(min(self.view, self.ce, self.kd, self.beta, self.sample, self.feature, self.ambiguous) >= 0,
                "view and weights must not be negative")
        require(self.ce + self.kd + self.beta * (self.sample + self.feature) > 0, "every weight is 0")
        require(self.temperature > 0 and self.tau > 0, "temperature and tau must be above 0; got "
                f"{self.temperature} and {self.tau}")
        window_sizes((1, 1), self.scales)
        for name, known in (("stride", ("one", "half")), ("negatives", ("all", "place")),
                            ("categories", ("label", "teacher", "none"))):
            require(getattr(self, name) in known, f"{name} is one of {', '.join(known)}, not {getattr(self, name)!r}")

    @property
    def labels(self) -> bool:
        """Whether labels are read."""
        return self.ce > 0 or self.categories == "label" or not self.same_class


EMBEDDED = Config(steps=300, batch=64, optimizer="adamw", lr=0.01, warmup=0.05, weight_decay=1e-4, beta=4.0,
                  tau=0.4)


def distill(
    teacher: Classifier,
    student: Classifier,
    data: AnyImages,
    config: Config = Config(),
    run: Run | None = None,
) -> nn.Module:
    """Train the student in place and return it. Labels are needed with ce > 0, categories "label" or without
    `same_class`; the two models need the same classes with labels or kd."""
    return transfer(teacher, student, data, config, run)[0]


def transfer(teacher: Any, student: Any, data: Any, config: Config,
             run: Run | None = None) -> tuple[nn.Module, Regressor]:
    """What `distill` does; the projector is returned as well."""
    run = begin(run)
    t_map, s_map, projector, head = prepare(teacher, student, data, config, run)
    student.train()
    optimizer = optimizer_for([*student.parameters(), *projector.parameters()], config.optimizer, config.lr,
                              config.weight_decay)
    with frozen(teacher), taps(teacher, [t_map]) as of_teacher, taps(student, [s_map]) as of_student:
        for batch in run.loop("msdcrd", data, batch=config.batch, steps=config.steps, student=student,
                              projector=projector, optimizer=optimizer, drop_last=len(data) >= config.batch):
            set_lr(optimizer, config.lr * warmup_cosine(run.progress, config.warmup))
            x = random_view(batch["image"], run, config.view) if config.view else batch["image"]
            with torch.no_grad():
                target = teacher(x)
            logits = student(x)
            terms: dict[str, Any] = {}
            if config.ce:
                terms["ce"] = config.ce * F.cross_entropy(logits, batch["label"])
            if config.kd:
                terms["kd"] = config.kd * kl(target, logits, config.temperature)
            if config.beta:
                label = batch["label"] if config.labels else target.argmax(1)
                terms.update(contrast(projector(of_student[s_map]), feature_map(of_teacher[t_map]), target, label,
                                      head, config, run))
            run.update(optimizer, **terms)
    return student, projector


def contrast(f_s: Tensor, f_t: Tensor, target: Tensor, label: Tensor, head: LocalHead | None, config: Config,
             run: Run) -> dict[str, Tensor]:
    """beta L_sw and beta L_fw, means over the window sizes, of the maps of all processes."""
    wanted = run.gather(target.argmax(1) if config.categories == "teacher" else label)
    label = run.gather(label)
    sample, feature = [], []
    for size in window_sizes(f_t.shape[2:], config.scales):
        stride = (1, 1) if config.stride == "one" else (max(1, size[0] // 2), max(1, size[1] // 2))
        s, t = (run.gather(window_means(f, size, stride)) for f in (f_s, f_t))
        reliable = None
        if head is not None:
            with torch.no_grad():
                reliable = head(t).argmax(-1) == wanted[:, None]
        if config.sample:
            weight = None if reliable is None else torch.where(reliable, 1.0, config.ambiguous).to(s)
            sample.append(window_contrast(s, t, config.tau, config.negatives == "place",
                                          None if reliable is None else reliable.long(),
                                          None if config.same_class else label, weight))
        if config.feature:
            feature.append(by_channel(s.flatten(0, 1), t.flatten(0, 1), reliable, config))
    weights = {"sample": config.sample, "feature": config.feature}
    return {name: config.beta * weights[name] * torch.stack(losses).mean()
            for name, losses in (("sample", sample), ("feature", feature)) if losses}


def by_channel(s: Tensor, t: Tensor, reliable: Tensor | None, config: Config) -> Tensor:
    """L_fw of the windows [samples, channels], in each group by its share of the windows."""
    if reliable is None:
        return channel_contrast(s, t, config.tau)
    mask = reliable.flatten()
    share = mask.float().mean()
    return (share * channel_contrast(s, t, config.tau, mask)
            + (1 - share) * config.ambiguous * channel_contrast(s, t, config.tau, ~mask))


def prepare(teacher: Any, student: Any, data: Any, config: Config,
            run: Run) -> tuple[str, str, Regressor, LocalHead | None]:
    """Check everything; the paths of both maps, the projector, and the teacher's head on single places."""
    read = config.labels or config.ce > 0
    if config.labels or config.kd:
        image = run.check(Classifier, data, labels=read, teacher=teacher, student=student)["image"]
    else:
        run.check(Classifier, data, teacher=teacher)
        image = run.check(Classifier, data, labels=read, student=student)["image"]
    (t_map, t_shape), (s_map, s_shape) = (last_map(model, image, path) for model, path in
                                          ((teacher, config.teacher_map), (student, config.student_map)))
    projector = Regressor(s_shape, t_shape, norm=config.norm).to(run.device)
    grouped = config.categories != "none" and config.beta > 0
    return t_map, s_map, projector, local_head(teacher, image, t_map) if grouped else None


def tiny() -> dict[str, Any]:
    torch.manual_seed(0)
    teacher, student = (nn.Sequential(nn.Conv2d(1, width, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                                      nn.Linear(width, 4)) for width in (5, 3))
    head = teacher[4]
    assert isinstance(head, nn.Linear)
    nn.init.zeros_(head.bias)
    data = TensorSet(image=2 * torch.randn(10, 1, 9, 9), label=torch.arange(10) % 4)
    return {"teacher": teacher, "student": student, "data": data,
            "config": Config(steps=4, batch=4, lr=0.1, kd=0.5, view=1.0, ambiguous=0.5, norm=False)}


# -------------------------------------------------------------------- the embedded experiment

TEACHER, STUDENT = 16, 12
"""Widths of the two networks: 79,000 and 10,000 parameters."""


def ground() -> dict[str, TensorSet]:
    """Pictures of 16 pixels with two cues, a coloured shape (16 classes) and the grating behind it: 240 labelled, a
    third of them, 1,000 to test."""
    train = coloured_shapes(240, seed=1, size=16)
    return {"train": train, "few": balanced(train, 5), "test": coloured_shapes(1000, seed=2, size=16)}


def experiment(run: Run) -> dict[str, dict[str, float]]:
    """All arms with the same student, steps and batch, and beta and tau tuned for either contrast; "local cosine" is
    the mean cosine of the student's (projected) and the teacher's features in windows of a quarter of the map, on the
    test pictures."""
    g = ground()
    teacher = shapes_classifier(width=TEACHER).to(run.device)
    shared = {name: getattr(EMBEDDED, name) for name in ("steps", "batch", "optimizer", "lr", "warmup", "weight_decay")}

    def new() -> nn.Module:
        run.begin()
        return TinyConvNet(channels_in=3, classes=len(coloured_names()), width=STUDENT).to(run.device)

    def right(student: nn.Module) -> dict[str, float]:
        return {"accuracy": accuracy(student, g["test"], device=run.device)}

    def ours(data: str = "train", **changes: Any) -> dict[str, float]:
        config = dataclasses.replace(EMBEDDED, **changes)
        student, projector = transfer(teacher, new(), g[data], config, run)
        near = nearness(teacher, student, projector, g["test"].image.to(run.device), config)
        run.picture("test pictures, and below how near the student is to the teacher in each window",
                    near_picture(g["test"].image[:10], near[:10].cpu()), columns=10)
        return {**right(student), "local cosine": near.mean().item()}

    def crd_arm() -> dict[str, float]:
        config = crd.Config(**shared, crd=1.0, tau=0.2, negatives=128, width=64)
        return right(crd.distill(teacher, new(), g["train"], config, run))

    return run.arms(
        {"labels": lambda: right(supervised.train(new(), g["train"], supervised.Config(**shared), run)),
         "kd": lambda: right(kd.distill(teacher, new(), g["train"], kd.Config(**shared), run)),
         "global only": lambda: ours(scales=(1.0,), feature=0.0, categories="none", beta=8.0, tau=0.8),
         "msdcrd": lambda: ours()},
        extended={
            "sample-wise only": lambda: ours(feature=0.0),
            "feature-wise only": lambda: ours(sample=0.0),
            "no categories": lambda: ours(categories="none"),
            "crd": crd_arm,
            "cost": lambda: cost(teacher, new(), g["train"], run),
            "few labels": lambda: right(supervised.train(new(), g["few"], supervised.Config(**shared), run)),
            "few labels, kd": lambda: right(kd.distill(teacher, new(), g["few"], kd.Config(**shared), run)),
            "few labels, msdcrd": lambda: ours("few")})


@torch.no_grad()
def nearness(teacher: Any, student: Any, projector: Regressor, image: Tensor, config: Config) -> Tensor:
    """Cosines of student and teacher [n, height, width] in the windows of a quarter of the map."""
    (t_map, _), (s_map, _) = last_map(teacher, image, config.teacher_map), last_map(student, image, config.student_map)
    with frozen(teacher), frozen(student), frozen(projector), taps(teacher, [t_map]) as of_teacher, taps(
            student, [s_map]) as of_student:
        teacher(image), student(image)
        f_t, f_s = feature_map(of_teacher[t_map]), projector(of_student[s_map])
        size = window_sizes(f_t.shape[2:], (0.25,))[0]
        s, t = window_means(f_s, size), window_means(f_t, size)
        height, width = f_t.shape[2] - size[0] + 1, f_t.shape[3] - size[1] + 1
        return F.cosine_similarity(s, t, dim=-1).unflatten(1, (height, width))


def near_picture(image: Tensor, near: Tensor) -> Tensor:
    """Pictures [n, 3, h, w] in [-1, 1], then the cosines of each (-1 black, 1 white) at the pictures' size."""
    shown = F.interpolate(near[:, None], image.shape[2:], mode="nearest").expand_as(image)
    return torch.cat([image, shown])


def cost(teacher: Any, student: Any, data: Any, run: Run, negatives: int = 1024, samples: int = 50_000,
         repeats: int = 5) -> dict[str, float]:
    """What the contrastive loss alone costs beside the networks, forward and backward, on a batch of 64: milliseconds,
    and megabytes kept for the backward pass and between steps; of MSDCRD, and of CRD with its memory of 50,000
    samples."""
    run.begin()
    batch = to_device(data.batch(list(range(64))), run.device)
    t_map, s_map, projector, head = prepare(teacher, student, data, EMBEDDED, run)
    memory = crd.Contrast(projector.conv.out_channels, projector.conv.in_channels, samples).to(run.device)
    far = torch.randint(samples - 1, (64, negatives), device=run.device)
    with frozen(teacher), torch.no_grad(), taps(teacher, [t_map]) as of_teacher, taps(student, [s_map]) as of_student:
        target, _ = teacher(batch["image"]), student(batch["image"])
        f_t, f_s = feature_map(of_teacher[t_map]), feature_map(of_student[s_map])

    def ours() -> Tensor:
        terms = contrast(projector(leaf), f_t, target, batch["label"], head, EMBEDDED, run)
        return torch.stack([*terms.values()]).sum()

    def theirs() -> Tensor:
        scores = memory.scores(memory.g_s(leaf.mean((2, 3))), memory.g_t(f_t.mean((2, 3))), far)
        return crd.nce(scores, memory.memory, 0.07, run)

    result = {}
    for name, loss, kept in (("", ours, 0), (", crd", theirs, 2 * samples * 128 * 4)):
        leaf = f_s.clone().requires_grad_()
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            loss().backward()
            times.append(time.perf_counter() - start)
        result["milliseconds" + name] = 1000 * sorted(times)[repeats // 2]
        with saved_bytes() as saved:
            loss()
        result["megabytes" + name] = (saved.bytes + kept) / 2**20
    return result
