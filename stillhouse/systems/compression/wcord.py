"""WCoRD: a teacher's features are moved into a student by both forms of the Wasserstein distance.

With penultimate features h_T, h_S and linear projectors, u = g_T(h_T) / |.|, v = g_S(h_S) / |.|, c a critic that is
1-Lipschitz in v for unit u (default c(v, u) = v . W u with sigma(W) <= 1), and a memory of the u and v of all samples:

    global (dual):   L_GCKT = -(E_joint c - E_product c)      the product: M other samples' rows of the memory, with
                                                              the student as anchor and with the teacher, averaged
    local (primal):  L_LCKT = sum_ij P_ij C_ij,  C_ij = 1 - cos(v_i, u_j)
                     P = argmin <P, C> - eps H(P) with uniform marginals over one batch (Sinkhorn), a constant
    L = CE + lambda_1 L_GCKT + lambda_2 L_LCKT (+ KD)

`objective="nce"` puts the same critic into CRD's logarithmic loss instead. Projectors, critic and memory are thrown
away; the student is returned. Three uses: compression (both see the picture), another modality and privileged
information (`teacher_sees="other"`: the teacher sees the batch field `other`, which is not needed afterwards). Labels
are read only where `ce` is above 0, and classes need to agree only where `kd` is.

Chen et al. 2021. Where the paper leaves room: lambda_1, lambda_2 and eps are not confirmed; the local term does not
train g_T (u is a constant there), or both projectors could meet in one point; the learning rate falls along a cosine in
place of three drops; a sample is never its own negative.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stillhouse.data.digits import digits
from stillhouse.data.sets import TensorSet, fetch
from stillhouse.errors import require
from stillhouse.evaluate.claims import Claim
from stillhouse.evaluate.classification import accuracy
from stillhouse.evaluate.probes import extract, linear_probe
from stillhouse.evaluate.transport import assignment_cost
from stillhouse.measures.crd import dual_contrast
from stillhouse.measures.transport import cosine_cost, sinkhorn, wasserstein
from stillhouse.models.convnets import TinyConvNet
from stillhouse.parts.critics import CRITICS
from stillhouse.parts.heads import replace_head
from stillhouse.protocols import AnyImages, Classifier, Encoder
from stillhouse.recipes import crd, kd, supervised
from stillhouse.recipes.crd import (
    Contrast,
    Scores,
    both_views,
    check_contrast,
    check_pair,
    features_of,
    label_terms,
    nce,
    negatives_of,
    remember,
)
from stillhouse.recipes.supervised import optimizer_for
from stillhouse.recipes.views import random_view
from stillhouse.run import Run, begin, frozen, set_lr
from stillhouse.run.reading import to_device
from stillhouse.run.schedules import warmup_cosine
from stillhouse.zoo.classifiers import digits_teacher
from stillhouse.zoo.modalities import edge_pairs, grey_teacher

NUMBER = 97

CLAIMS = [
    Claim("WCoRD beats the student trained on the labels alone",
          lambda a: a["wcord"]["accuracy"] - a["labels"]["accuracy"]),
    Claim("WCoRD is at most half a point below CRD",
          lambda a: a["wcord"]["accuracy"] - a["crd"]["accuracy"] + 0.005),
    Claim("from grey pictures to edge maps without labels: its features beat those of a fresh student (linear probe)",
          lambda a: a["edges, wcord"]["probe"] - a["edges, fresh"]["probe"]),
    Claim("and those of a student trained on few labels",
          lambda a: a["edges, wcord"]["probe"] - a["edges, few labels"]["probe"]),
    Claim("the transport cost between student and teacher on held-out pictures falls by half or more",
          lambda a: a["wcord"]["transport fall"] - 0.5),
    Claim("and by more than without the local term",
          lambda a: a["wcord"]["transport fall"] - a["global only"]["transport fall"]),
    Claim("WCoRD beats Hinton's KD", lambda a: a["wcord"]["accuracy"] - a["kd"]["accuracy"], report=True),
    Claim("both terms beat the global one alone", lambda a: a["wcord"]["accuracy"] - a["global only"]["accuracy"],
          report=True),
    Claim("both terms beat the local one alone", lambda a: a["wcord"]["accuracy"] - a["local only"]["accuracy"],
          report=True),
    Claim("KD adds to it", lambda a: a["with kd"]["accuracy"] - a["wcord"]["accuracy"], report=True),
    Claim("from grey pictures to edge maps it beats CRD",
          lambda a: a["edges, wcord"]["probe"] - a["edges, crd"]["probe"], report=True),
    Claim("a teacher that sees the full picture helps a student that sees a coarse one",
          lambda a: a["coarse, wcord"]["accuracy"] - a["coarse, labels"]["accuracy"], report=True),
    Claim("and helps it more than by CRD", lambda a: a["coarse, wcord"]["accuracy"] - a["coarse, crd"]["accuracy"],
          report=True),
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
    ce: float = 1.0  # weight of the cross-entropy with the labels; 0: labels are not read
    kd: float = 0.0  # weight of T^2 KL between the softened probabilities of teacher and student
    temperature: float = 4.0  # T
    gckt: float = 0.8  # lambda_1
    lckt: float = 0.05  # lambda_2
    objective: Literal["dual", "nce"] = "dual"  # form of L_GCKT: linear in c, or CRD's logarithmic one
    critic: Literal["bilinear", "dot", "mlp"] = "bilinear"  # c: v . W u, v . u, or ReLU layers on [v; u]
    spectral: bool = True  # whether projectors and critic are divided by their largest singular values
    eps: float = 0.05  # entropy weight of the transport plan
    tau: float = 0.07  # tau, divides c under "nce"
    width: int = 128  # length of the embeddings u and v
    negatives: int = 16384  # M
    momentum: float = 0.5  # of the memory
    teacher_sees: Literal["image", "other"] = "image"  # batch field that the teacher is given
    teacher_feature: str = "penultimate"  # h_T: "penultimate", "output" or the path of a module
    student_feature: str = "penultimate"  # h_S, likewise

    def __post_init__(self) -> None:
        check_contrast(self)
        require(min(self.gckt, self.lckt, self.view) >= 0, "gckt, lckt and view must not be negative; got "
                f"{self.gckt}, {self.lckt} and {self.view}")
        require(self.ce + self.kd + self.gckt + self.lckt > 0, "one of ce, kd, gckt and lckt must be above 0")
        require(self.objective in ("dual", "nce"), f"objective is 'dual' or 'nce', not {self.objective!r}")
        require(self.critic in CRITICS, f"critic is one of {', '.join(CRITICS)}, not {self.critic!r}")
        require(self.eps > 0, f"eps must be above 0, not {self.eps}")


EMBEDDED = Config(steps=300, batch=64, optimizer="adamw", lr=0.01, warmup=0.05, weight_decay=1e-4, gckt=0.1, lckt=0.5,
                  objective="nce", negatives=128)


def distill(
    teacher: Classifier | Encoder,
    student: Classifier | Encoder,
    data: AnyImages,
    config: Config = Config(),
    run: Run | None = None,
) -> nn.Module:
    """Train the student in place. `data` has labels where `ce` is above 0, and `other` where the teacher sees it."""
    return transfer(teacher, student, data, config, run)[0]


def transfer(teacher: Any, student: Any, data: Any, config: Config,
             run: Run | None = None) -> tuple[nn.Module, Contrast]:
    """What `distill` does; the projectors, critic and memory are returned as well."""
    run = begin(run)
    widths = check_pair(teacher, student, data, config, run)
    student.train()
    contrast = Contrast(*widths, len(data), config.width, config.momentum, config.critic, config.spectral)
    contrast.to(run.device)
    optimizer = optimizer_for([*student.parameters(), *contrast.parameters()], config.optimizer, config.lr,
                              config.weight_decay)
    with frozen(teacher), features_of(teacher, student, config) as (h_t, h_s):
        for batch in run.loop("wcord", data, batch=config.batch, steps=config.steps, student=student, contrast=contrast,
                              optimizer=optimizer, drop_last=len(data) >= config.batch):
            set_lr(optimizer, config.lr * warmup_cosine(run.progress, config.warmup))
            x, y = both_views(batch, config, (lambda x: random_view(x, run, config.view)) if config.view else None)
            with torch.no_grad():
                target = teacher(y)
            logits = student(x)
            u, v = contrast.g_t(h_t()), contrast.g_s(h_s())
            terms = label_terms(batch, logits, target, config)
            if config.gckt:
                far = negatives_of(contrast.memory, batch["index"], config.negatives, run)
                terms["gckt"] = config.gckt * global_term(contrast.scores(v, u, far), contrast, config, run)
            if config.lckt:
                terms["lckt"] = config.lckt * local_term(run.gather(v), run.gather(u), config.eps)
            run.update(optimizer, **terms)
            remember(contrast.memory, batch["index"], u, v, run)
    return student, contrast


def global_term(scores: Scores, contrast: Contrast, config: Config, run: Run) -> Tensor:
    """L_GCKT: under "dual" the mean over both anchors, at most 2 in size; under "nce" their sum, as in CRD."""
    if config.objective == "nce":
        return nce(scores, contrast.memory, config.tau, run)
    positive, far_u, far_v = scores
    return (dual_contrast(positive, far_u) + dual_contrast(positive, far_v)) / 2


def local_term(v: Tensor, u: Tensor, eps: float) -> Tensor:
    """L_LCKT between the batch's student and teacher embeddings [n, width]."""
    return wasserstein(cosine_cost(v, u.detach()), eps)


def tiny() -> dict[str, Any]:
    torch.manual_seed(0)
    teacher, student = (nn.Sequential(nn.Conv2d(1, width, 3), nn.ReLU(), nn.Flatten(), nn.Linear(width * 36, 4))
                        for width in (4, 2))
    data = TensorSet(image=torch.rand(12, 1, 8, 8), label=torch.arange(12) % 4)
    return {"teacher": teacher, "student": student, "data": data,
            "config": Config(steps=5, batch=4, lr=0.1, view=1.0, kd=0.5, objective="nce", width=6, negatives=5,
                             eps=0.2)}


# -------------------------------------------------------------------- the embedded experiment


def ground() -> dict[str, TensorSet]:
    """400 labelled digits of 16 pixels and 597 to test; the same, seen coarsely by the student and whole (`other`) by
    the teacher; 600 unlabelled shapes as edge maps with their grey pictures, 12 labelled ones, and sets to probe on."""
    labelled: Any = digits(16, "train").select(range(400))
    test: Any = digits(16, "test")
    return {"labelled": labelled, "test": test, "coarse": coarse(labelled), "coarse test": coarse(test),
            "pairs": edge_pairs(600, seed=1).without("label"), "few": edge_pairs(12, seed=2),
            "probe": edge_pairs(400, seed=3), "probe test": edge_pairs(1000, seed=4)}


def coarse(data: TensorSet) -> TensorSet:
    """Pictures averaged over squares of 4 pixels, with the full ones as `other`."""
    low = F.interpolate(F.avg_pool2d(data.image, 4), data.image.shape[-2:], mode="nearest")
    return data.with_fields(image=low, other=data.image)


def experiment(run: Run) -> dict[str, dict[str, float]]:
    """All arms of one part with the same student, steps and batch; rates in [0, 1] on held-out pictures."""
    g = ground()
    digit_teacher, shape_teacher = digits_teacher(16).to(run.device), grey_teacher().to(run.device)
    shared = {name: getattr(EMBEDDED, name) for name in ("steps", "batch", "optimizer", "lr", "warmup", "weight_decay")}
    contrastive = {name: getattr(EMBEDDED, name) for name in ("tau", "width", "negatives", "momentum")}

    def new(classes: int = 10) -> nn.Module:
        run.begin()
        return TinyConvNet(classes=classes).to(run.device)

    def right(student: nn.Module, test: str = "test") -> dict[str, float]:
        return {"accuracy": accuracy(student, g[test], device=run.device)}

    def probed(student: nn.Module) -> dict[str, float]:
        encoder = replace_head(student)[0]
        x, test = (extract(encoder, g[name], device=run.device) for name in ("probe", "probe test"))
        return {"probe": linear_probe(x, g["probe"].label, test, g["probe test"].label)}

    def wcord(**changes: Any) -> dict[str, float]:
        config = dataclasses.replace(EMBEDDED, **changes)
        with run.scope("before"):
            start = transfer(digit_teacher, new(), g["labelled"], dataclasses.replace(config, steps=0), run)
        end = transfer(digit_teacher, new(), g["labelled"], config, run)
        costs = []
        for student, contrast in (start, end):
            v, u = embeddings(digit_teacher, student, contrast, g["test"], config, run)
            costs.append(assignment_cost(v, u))
        run.picture("transport plan of test digits, in the order of their classes", plan_picture(v, u, g["test"].label))
        return {**right(end[0]), "transport": costs[1], "transport fall": 1 - costs[1] / costs[0]}

    def labels(part: str) -> nn.Module:
        return supervised.train(new(), g[part], supervised.Config(**shared), run)

    def by_crd(teacher: nn.Module, student: nn.Module, part: str, **changes: Any) -> nn.Module:
        config = crd.Config(**shared, **contrastive, crd=EMBEDDED.gckt, **changes)
        return crd.distill(teacher, student, g[part], config, run)

    def seeing_other(teacher: nn.Module, student: nn.Module, part: str, **changes: Any) -> nn.Module:
        return distill(teacher, student, g[part], dataclasses.replace(EMBEDDED, teacher_sees="other", **changes), run)

    kinds = 6
    return run.arms(
        {"labels": lambda: right(labels("labelled")),
         "kd": lambda: right(kd.distill(digit_teacher, new(), g["labelled"], kd.Config(**shared), run)),
         "crd": lambda: right(by_crd(digit_teacher, new(), "labelled")),
         "wcord": lambda: wcord(),
         "global only": lambda: wcord(lckt=0.0),
         "local only": lambda: wcord(gckt=0.0),
         "edges, fresh": lambda: probed(new(kinds)),
         "edges, few labels": lambda: probed(supervised.train(new(kinds), g["few"], supervised.Config(**shared), run)),
         "edges, wcord": lambda: probed(seeing_other(shape_teacher, new(kinds), "pairs", ce=0.0, critic="dot"))},
        extended={
            "with kd": lambda: wcord(ce=0.1, kd=0.9),
            "dual": lambda: wcord(objective="dual", gckt=0.8),
            "dot critic": lambda: wcord(critic="dot"),
            "no spectral norm": lambda: wcord(spectral=False),
            "edges, bilinear critic": lambda: probed(seeing_other(shape_teacher, new(kinds), "pairs", ce=0.0)),
            "edges, crd": lambda: probed(by_crd(shape_teacher, new(kinds), "pairs", ce=0.0, teacher_sees="other")),
            "coarse, labels": lambda: right(labels("coarse"), "coarse test"),
            "coarse, crd": lambda: right(by_crd(digit_teacher, new(), "coarse", teacher_sees="other"), "coarse test"),
            "coarse, wcord": lambda: right(seeing_other(digit_teacher, new(), "coarse"), "coarse test")})


def embeddings(teacher: nn.Module, student: nn.Module, contrast: Contrast, data: Any, config: Config,
               run: Run) -> tuple[Tensor, Tensor]:
    """v and u of a whole set."""
    batch = to_device(fetch(data, range(len(data))), run.device)
    with run.aside("embeddings", teacher, student, contrast), features_of(teacher, student, config) as (h_t, h_s):
        teacher(batch[config.teacher_sees])
        student(batch["image"])
        return contrast.g_s(h_s()), contrast.g_t(h_t())


def plan_picture(v: Tensor, u: Tensor, label: Tensor, n: int = 100) -> Tensor:
    """The plan between the first `n` student (rows) and teacher embeddings, sorted by class: blocks on the diagonal
    where mass goes to pictures of the same class."""
    order = label[:n].argsort(stable=True).to(v.device)
    return sinkhorn(cosine_cost(v[order], u[order]), 0.02).sqrt()[None, None]
