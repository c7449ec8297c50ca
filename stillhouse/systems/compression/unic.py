"""UNIC: several frozen vision transformers with different strengths are moved into one encoder of the size of one.

After every block b of L the student's tokens x_b, class token and patches, go through a ladder of projectors,

    s_t = sum_b P_tb(x_b)                    for every teacher t and token kind (cls, patch), P: Linear - GELU - Linear
    f_t = (f_t - mean_t) / (std_t + eps)     running statistics per dimension, those before this batch
    l_ti = mean over {cls, mean of patches} of 1/2 (1 - cos(s, f)) + 1/2 smoothL1(s, f)        for picture i
    L = sum_ti c_ti l_ti / sum_ti c_ti

with c_ti = 1 for the teacher that is farthest on picture i and, with probability p, 0 for each other one (teacher
dropping). The statistics follow the batches by m, mean <- (1 - m) mean + m mean(batch), and m falls from 1 to 0.001
along a cosine. Labels are never read. The ladder is thrown away: what is returned is the encoder alone.

Sariyildiz et al. 2024, "UNIC: Universal Classification Models via Multi-teacher Distillation"; where the paper is
silent, its released code. Deviations: no solarisation among the random views; drop path (0.1 there) is a setting of the
student's own network. Teachers whose patch grid is another one are resized to the student's.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stillhouse.data.sets import TensorSet
from stillhouse.data.shapes import FACTORS, shape_factors
from stillhouse.errors import RoleError, require
from stillhouse.evaluate.claims import Claim
from stillhouse.evaluate.probes import extract, probe_tasks
from stillhouse.measures.tokens import cosine_and_smooth_l1, kept_teachers
from stillhouse.models.vit import SmallViT
from stillhouse.parts.ladder import Ladder
from stillhouse.parts.standardise import Standardiser
from stillhouse.parts.taps import taps
from stillhouse.parts.tokens import Split, TokenPlaces, resize_patches, similarity_of, token_places
from stillhouse.protocols import Encoder, Images
from stillhouse.recipes.supervised import check_training
from stillhouse.recipes.views import colour_view, resized_crop
from stillhouse.run import Run, begin, frozen, set_lr
from stillhouse.run.check import first_batch
from stillhouse.run.reading import to_device
from stillhouse.run.schedules import cosine, warmup_cosine
from stillhouse.zoo.encoders import factor_teacher

NUMBER = 59


def _teachers(a: Any, metric: str) -> list[float]:
    return [a[f"teacher of {name}"][metric] for name in TAUGHT]


CLAIMS = [
    Claim("the student's worst task is better than the worst task of every teacher",
          lambda a: a["unic"]["worst task"] - max(_teachers(a, "worst task"))),
    Claim("over all tasks it is better than plain distillation from the same teachers",
          lambda a: a["unic"]["mean"] - a["naive"]["mean"]),
    Claim("with teacher dropping the teacher it is farthest from is nearer than without",
          lambda a: a["unic"]["least similarity"] - a["no dropping"]["least similarity"]),
    Claim("over all tasks it is better than every teacher",
          lambda a: a["unic"]["mean"] - max(_teachers(a, "mean")), report=True),
    Claim("on the task that no teacher was trained on it is better than every teacher",
          lambda a: a["unic"]["position"] - max(_teachers(a, "position")), report=True),
    Claim("the ladder from all blocks helps over all tasks",
          lambda a: a["unic"]["mean"] - a["no ladder"]["mean"], report=True),
    Claim("the ladder from all blocks brings the student nearer to its teachers",
          lambda a: a["unic"]["mean similarity"] - a["no ladder"]["mean similarity"], report=True),
    Claim("features of one teacher times ten cost plain distillation more than UNIC",
          lambda a: (a["naive"]["mean"] - a["naive, one teacher x 10"]["mean"])
          - (a["unic"]["mean"] - a["unic, one teacher x 10"]["mean"]), report=True),
    Claim("patch targets help over all tasks", lambda a: a["unic"]["mean"] - a["class tokens only"]["mean"],
          report=True),
]


@dataclass(frozen=True)
class Config:
    steps: int = 500_000  # optimiser steps: 200 epochs of 1.28 million pictures at this batch
    batch: int = 512  # pictures a step
    lr: float = 6e-4  # peak learning rate: 3e-4 for every 256 pictures of a step
    min_lr: float = 1e-6  # where its cosine ends
    warmup: float = 0.05  # part of the steps in which it rises: 10 epochs of 200
    weight_decay: float = 0.03  # of AdamW with betas (0.9, 0.99); biases and norms have none
    ladder: Literal["all", "last"] = "all"  # blocks that have projectors
    hidden: int = 768  # hidden width of the projectors of all but the last block; 0: one linear layer
    last_hidden: int = 3072  # hidden width of those of the last block; 0: one linear layer
    std: float = 0.02  # of the projectors' first weights; in narrow networks more, 0.02 sqrt(768 / width)
    loss: Literal["cosine+l1", "mse"] = "cosine+l1"  # of a token: as above, or the mean squared error
    smooth_l1: float = 0.5  # weight of smooth L1 in it; the cosine term has 1 minus that
    patch: float = 0.5  # weight of the patches; the class token has 1 minus that
    drop: float = 0.5  # p, probability with which a teacher that is not the farthest is dropped from a picture
    standardise: bool = True  # whether targets are standardised
    momentum: float = 1.0  # m of the running statistics at first
    last_momentum: float = 0.001  # m at the end
    smallest_crop: float = 0.08  # smallest area of the random crops (mirrored half of the time); 1: whole pictures
    colour: float = 0.5  # strength of the random changes of colour; 0: none

    def __post_init__(self) -> None:
        check_training(self.steps, self.batch, self.lr, self.warmup, self.weight_decay)
        require(0 <= self.min_lr <= self.lr, f"min_lr lies between 0 and lr, not {self.min_lr}")
        require(self.ladder in ("all", "last"), f"ladder is 'all' or 'last', not {self.ladder!r}")
        require(self.loss in ("cosine+l1", "mse"), f"loss is 'cosine+l1' or 'mse', not {self.loss!r}")
        require(min(self.hidden, self.last_hidden) >= 0, "hidden and last_hidden must not be negative; got "
                f"{self.hidden} and {self.last_hidden}")
        require(self.std > 0, f"std must be above 0, not {self.std}")
        for name in ("smooth_l1", "patch", "drop", "momentum", "last_momentum"):
            require(0 <= getattr(self, name) <= 1, f"{name} must lie in [0, 1], not {getattr(self, name)}")
        require(0 < self.smallest_crop <= 1 and self.colour >= 0, "smallest_crop is a part of the area in (0, 1] and "
                f"colour not negative; got {self.smallest_crop} and {self.colour}")


EMBEDDED = Config(steps=600, batch=32, lr=1e-2, hidden=32, last_hidden=128, std=0.1, smallest_crop=1.0, colour=0.0)


def distill(
    teachers: Sequence[Encoder],
    student: Encoder,
    data: Images,
    config: Config = Config(),
    run: Run | None = None,
) -> nn.Module:
    """Train the student in place on the tokens of all teachers and return it, without the ladder.

    All are vision transformers; their widths may differ.
    """
    fit(teachers, student, data, config, run)
    assert isinstance(student, nn.Module)
    return student


@dataclass(frozen=True)
class Match:
    """What a student was trained through: where tokens are read, the ladder and the statistics of the teachers."""

    own: TokenPlaces
    blocks: tuple[str, ...]
    theirs: list[TokenPlaces]
    ladder: Ladder
    statistics: nn.ModuleList

    def targets(self, tapped: Sequence[Tensor]) -> list[Split]:
        """The teachers' tokens, on the student's patch grid."""
        splits = [where.split(x) for where, x in zip(self.theirs, tapped, strict=True)]
        return [{"cls": s["cls"], "patch": resize_patches(s["patch"], self.own.patches)} for s in splits]

    def standardised(self, targets: Sequence[Split]) -> list[Split]:
        return [{kind: norms[kind](x) for kind, x in target.items()}  # type: ignore[index]
                for norms, target in zip(self.statistics, targets, strict=True)]


def fit(teachers: Sequence[Encoder], student: Encoder, data: Images, config: Config, run: Run | None) -> Match:
    """The training itself."""
    run = begin(run)
    match = _prepare(run, teachers, student, data, config)
    assert isinstance(student, nn.Module)
    groups = [{"params": [p for m in (student, match.ladder) for p in m.parameters() if (p.dim() > 1) is heavy],
               "weight_decay": config.weight_decay * heavy} for heavy in (True, False)]
    optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.99))
    student.train()
    with frozen(*teachers), ExitStack() as stack:
        mine = stack.enter_context(taps(student, match.blocks))
        ends = [stack.enter_context(taps(_module(teacher), [where.end]))
                for teacher, where in zip(teachers, match.theirs, strict=True)]
        for batch in run.loop("distil", data, batch=config.batch, steps=config.steps, student=student,
                              ladder=match.ladder, statistics=match.statistics, optimizer=optimizer,
                              drop_last=len(data) >= config.batch):
            set_lr(optimizer, max(config.min_lr, config.lr * warmup_cosine(run.progress, config.warmup)))
            x = _view(batch["image"], config, run)
            with torch.no_grad():
                for teacher in teachers:
                    teacher(x)
                targets = match.targets([tap[w.end] for tap, w in zip(ends, match.theirs, strict=True)])
                wanted = match.standardised(targets) if config.standardise else targets
                _follow(match, targets, config, run)
            student(x)
            said = match.ladder([match.own.split(mine[block]) for block in match.blocks])
            losses = torch.stack([_distance(s, f, config) for s, f in zip(said, wanted, strict=True)])
            kept = kept_teachers(losses.detach(), run.rand(len(x), len(teachers)).T, config.drop).to(losses)
            run.update(optimizer, match=run.mean((kept * losses).sum(), kept.sum()))
            run.log(**{f"teacher {i}": loss for i, loss in enumerate(losses.detach().mean(1))})
    return match


def _distance(said: Split, wanted: Split, config: Config) -> Tensor:
    """l_ti, one value per picture."""
    def tokens(s: Tensor, f: Tensor) -> Tensor:
        if config.loss == "mse":
            return F.mse_loss(s, f, reduction="none").mean(-1)
        return cosine_and_smooth_l1(s, f, 1 - config.smooth_l1, config.smooth_l1)

    cls, patch = (tokens(said[kind], wanted[kind]) for kind in ("cls", "patch"))
    return (1 - config.patch) * cls + config.patch * patch.mean(-1)


def _follow(match: Match, targets: Sequence[Split], config: Config, run: Run) -> None:
    """Update the statistics of every teacher and token kind with this batch."""
    m = config.last_momentum + (config.momentum - config.last_momentum) * cosine(run.progress)
    for norms, target in zip(match.statistics, targets, strict=True):
        for kind, x in target.items():
            norms[kind].update(run.gather(x), m)  # type: ignore[index]


def _view(x: Tensor, config: Config, run: Run) -> Tensor:
    if config.smallest_crop < 1:
        x = resized_crop(x, run, config.smallest_crop)
    return colour_view(x, run, config.colour, blur=0.2) if config.colour else x


def _module(model: Any) -> nn.Module:
    assert isinstance(model, nn.Module)
    return model


def _prepare(run: Run, teachers: Sequence[Encoder], student: Encoder, data: Images, config: Config) -> Match:
    """Check the roles and find where tokens are read; a fresh ladder."""
    require(len(teachers) >= 1, "give at least one teacher", RoleError)
    run.check(Encoder, data, teachers=list(teachers), student=student)
    image = to_device(first_batch(data, ("image",)), run.device)["image"]
    own, *theirs = (token_places(_module(model), image) for model in (student, *teachers))
    for where in theirs:
        resize_patches(torch.zeros(1, where.patches, 1), own.patches)
    blocks = own.blocks if config.ladder == "all" else own.blocks[-1:]
    ladder = Ladder(own.width, [w.width for w in theirs], len(blocks), config.hidden, config.last_hidden,
                    config.std)
    statistics = nn.ModuleList(nn.ModuleDict({kind: Standardiser(w.width) for kind in ("cls", "patch")})
                               for w in theirs)
    return Match(own, blocks, theirs, ladder.to(run.device), statistics.to(run.device))


def tiny() -> dict[str, Any]:
    torch.manual_seed(0)
    first = SmallViT(1, 3, 8, 4, width=8, depth=1, heads=2)
    second = SmallViT(1, 0, 8, 2, width=4, depth=2, heads=2)
    student = SmallViT(1, 0, 8, 4, width=4, depth=2, heads=2)
    return {"teachers": [first, second], "student": student, "data": TensorSet(image=torch.rand(12, 1, 8, 8) * 2 - 1),
            "config": Config(steps=4, batch=4, lr=1e-3, hidden=4, last_hidden=6)}


# -------------------------------------------------------------------- the embedded experiment

TAUGHT = ("shape", "colour", "texture")
"""What the three teachers were trained on, over which means and the worst are taken; the position is taught by none."""


class Features(nn.Module):
    """The features of a small transformer in place of its classes."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, image: Tensor) -> Tensor:
        model: Any = self.model
        return model.features(image)


def experiment(run: Run) -> dict[str, dict[str, float]]:
    """Three teachers, each of which knows one factor of the same pictures, and a student as big as one of them; linear
    probes of the features on all four factors (1,500 pictures to fit them, 1,000 to test)."""
    teachers = [factor_teacher(name).to(run.device) for name in TAUGHT]
    data = shape_factors(4000, seed=20_000 + run.seed).without(*FACTORS)
    train, test = shape_factors(1500, seed=30_000), shape_factors(1000, seed=40_000)

    def scores(model: nn.Module) -> dict[str, float]:
        first, second = (extract(Features(model), part, device=run.device) for part in (train, test))
        labels, wanted = ({name: part.data[name] for name in FACTORS} for part in (train, test))
        tasks = probe_tasks(first, second, labels, wanted)
        run.picture("linear probes", tasks_chart(tasks))
        taught = [tasks[name] for name in TAUGHT]
        return {**tasks, "mean": sum(taught) / len(taught), "worst task": min(taught)}

    def student(loud: int | None = None, **changes: Any) -> Callable[[], dict[str, float]]:
        config = dataclasses.replace(EMBEDDED, **changes)

        def measure() -> dict[str, float]:
            each = [louder(t) if i == loud else t for i, t in enumerate(teachers)]
            run.begin()
            new = SmallViT(3, 0, 16, depth=3).to(run.device)
            match = fit(each, new, data, config, run)
            near = similarities(match, each, new, test.image[:500].to(run.device), config.standardise)
            return {**scores(new), **{f"similarity, {name}": v for name, v in zip(TAUGHT, near, strict=True)},
                    "least similarity": min(near), "mean similarity": sum(near) / len(near)}

        return measure

    naive: dict[str, Any] = {"ladder": "last", "last_hidden": 0, "loss": "mse", "drop": 0.0, "standardise": False}
    return run.arms(
        {**{f"teacher of {name}": partial(scores, t) for name, t in zip(TAUGHT, teachers, strict=True)},
         "naive": student(**naive),
         "unic": student(),
         "no dropping": student(drop=0.0)},
        extended={"no ladder": student(ladder="last"),
                  "class tokens only": student(patch=0.0),
                  "naive, one teacher x 10": student(loud=1, **naive),
                  "unic, one teacher x 10": student(loud=1)})


def tasks_chart(tasks: dict[str, float]) -> Any:
    """A figure of what a linear probe reaches on every task; the line is chance."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4, 2))
    axes = figure.add_subplot()
    axes.barh(list(tasks), [100 * v for v in tasks.values()])
    axes.axvline(25, color="black", linewidth=0.8)
    axes.set_xlim(0, 100)
    axes.invert_yaxis()
    axes.set_xlabel("% right")
    return figure


def louder(teacher: nn.Module, factor: float = 10.0) -> nn.Module:
    """A copy whose tokens are multiplied by `factor` (its classes are not used)."""
    loud: Any = copy.deepcopy(teacher)
    with torch.no_grad():
        loud.norm.weight.mul_(factor)
        loud.norm.bias.mul_(factor)
    return loud


@torch.no_grad()
def similarities(match: Match, teachers: Sequence[nn.Module], student: nn.Module, image: Tensor,
                 standardise: bool = True) -> list[float]:
    """Mean cosine similarity of what the ladder says with each teacher's (standardised) tokens."""
    with frozen(student, *teachers), ExitStack() as stack:
        mine = stack.enter_context(taps(student, match.blocks))
        ends = [stack.enter_context(taps(t, [w.end])) for t, w in zip(teachers, match.theirs, strict=True)]
        for model in (student, *teachers):
            model(image)
        targets = match.targets([tap[w.end] for tap, w in zip(ends, match.theirs, strict=True)])
        wanted = match.standardised(targets) if standardise else targets
        said = match.ladder([match.own.split(mine[block]) for block in match.blocks])
        return [similarity_of(s, f).item() for s, f in zip(said, wanted, strict=True)]
