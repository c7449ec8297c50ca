"""AMD: a large vision transformer is distilled into a slice of itself by way of a teacher assistant, whose size is
found in one joint training of all candidates.

The heads and hidden units u of the teacher are ranked once, by I(u) = E_x |dL_x / dg_u| at the gate g_u = 1. Candidate
c keeps the first units, until its share of the parameters is s_c: the candidates are nested. All of them train on one
set of weights, which starts as the teacher's, with

    L = 1/M sum_c [ CE(y, p_c) + lambda1 T^2 KL(p_T || p_c) + lambda2 MSE(h_T, h_c) ],     h: last hidden states.

With P the accuracy on held-out pictures and S the share of parameters the assistant is the candidate of the largest

    NPSD_c = -max(P_T - P_c, 0) / (S_T - S_c),

of equals the smallest. It is cut out, trained on against the teacher, and its own first units become the student, which
it teaches by the same loss.

Han et al. 2024, "AMD: Automatic Multi-step Distillation of Large-scale Vision Models". No code was released: weights,
number of candidates and the discrete form of NPSD are ours; ranking and joint training follow its predecessor MiniDisc
(Zhang et al. 2022), whose criterion P_c + lambda (1 - S_c) can be chosen. Deviations: the width of the residual stream
stays, so that hidden states compare without projection; embeddings, norms and the head therefore bound the scales that
can be reached (an error says where). A student of another architecture can be given for the last step.
"""

from __future__ import annotations

import copy
import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from stillhouse.data.digits import digits
from stillhouse.data.sets import TensorSet
from stillhouse.errors import RoleError, require
from stillhouse.evaluate.claims import Claim
from stillhouse.evaluate.classification import accuracy
from stillhouse.evaluate.cost import parameters
from stillhouse.measures.scales import first_choice, npsd, tradeoff
from stillhouse.models.vit import SmallViT
from stillhouse.parts.nested import Nested, Slice, least_share, slice_of
from stillhouse.protocols import Classifier, LabelledImages
from stillhouse.recipes import nested, supervised
from stillhouse.recipes.architecture_choice import reinitialised
from stillhouse.recipes.views import random_view
from stillhouse.run import Run, begin, frozen
from stillhouse.zoo.classifiers import digits_classifier

NUMBER = 49

CLAIMS = [
    Claim("AMD beats training the student from scratch on the labels",
          lambda a: a["amd"]["accuracy"] - a["scratch"]["accuracy"]),
    Claim("AMD is at most half a point below distilling the teacher directly into the same slice for as many steps",
          lambda a: a["amd"]["accuracy"] - a["direct"]["accuracy"] + 0.005),
    Claim("the joint training of all candidates takes less than 40 % of the time of trying every chain",
          lambda a: 0.4 - a["amd"]["search seconds"] / a["exhaustive"]["seconds"]),
    Claim("AMD beats direct distillation", lambda a: a["amd"]["accuracy"] - a["direct"]["accuracy"], report=True),
    Claim("the assistant of the largest NPSD is at least as good as that of the smallest",
          lambda a: a["amd"]["accuracy"] - a["worst assistant"]["accuracy"], report=True),
    Claim("AMD is at most half a point below the best of all chains",
          lambda a: a["amd"]["accuracy"] - a["exhaustive"]["accuracy"] + 0.005, report=True),
    Claim("the last hidden states help", lambda a: a["amd"]["accuracy"] - a["no hidden states"]["accuracy"],
          report=True),
    Claim("the logits help", lambda a: a["amd"]["accuracy"] - a["no logits"]["accuracy"], report=True),
    Claim("shared weights are as good as candidates with weights of their own",
          lambda a: a["amd"]["accuracy"] - a["separate candidates"]["accuracy"], report=True),
    Claim("the ranking helps", lambda a: a["amd"]["accuracy"] - a["random ranking"]["accuracy"], report=True),
    Claim("NPSD chooses better than MiniDisc's trade-off",
          lambda a: a["amd"]["accuracy"] - a["trade-off"]["accuracy"], report=True),
    Claim("the assistant that is found beats one of the middle scale (TAKD)",
          lambda a: a["amd"]["accuracy"] - a["hand-made assistant"]["accuracy"], report=True),
]


@dataclass(frozen=True)
class Config:
    steps: int = 40_000  # optimiser steps of all phases: about 100 epochs of CIFAR at this batch
    batch: int = 128  # pictures a step
    joint: float = 0.2  # part of the steps in which the candidates train together
    assistant: float = 0.3  # part of the steps in which the chosen one trains on; the student has the rest
    scale: float = 0.1  # share of the teacher's parameters that the student has
    candidates: tuple[float, ...] = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)  # s_c; (1.0,): no assistant at all
    along: bool = True  # the student's own slice trains with the candidates, without being one
    search: Literal["joint", "exhaustive"] = "joint"  # one training of all, or every chain to its end, the best of them
    sharing: Literal["shared", "separate"] = "shared"  # candidates on one set of weights, or each on its own
    sampling: Literal["all", "sandwich"] = "all"  # candidates of a step: all, or smallest, largest and a random one
    selector: Literal["npsd", "tradeoff", "worst"] = "npsd"  # largest NPSD, P + lambda (1 - S), or smallest NPSD
    small: float = 0.2  # lambda of the trade-off
    ranking: Literal["taylor", "random"] = "taylor"  # what orders the units
    pictures: int = 1024  # labelled pictures that the importance is measured on
    temperature: float = 1.0  # T
    ce: float = 1.0  # weight of the cross-entropy with the labels
    kd: float = 1.0  # lambda1
    hidden: float = 1.0  # lambda2
    path: str = ""  # module of the last hidden states; empty: the deepest block
    optimizer: Literal["adamw", "sgd"] = "adamw"  # AdamW, or SGD with momentum 0.9
    lr: float = 5e-4  # peak learning rate of candidates and assistant; a cosine to 0
    student_lr: float = 1e-3  # of the student
    warmup: float = 0.05  # part of a phase in which it rises
    weight_decay: float = 0.05  # of AdamW
    clip: float | None = 5.0  # largest global norm of the gradient
    view: float = 0.0  # strength of random shifts, turns and light changes; 0: the pictures as they come
    cache: bool = False  # keep what each teacher says of all pictures in memory; for pictures as they come

    def __post_init__(self) -> None:
        self.phase(self.steps), self.phase(self.steps, self.student_lr)
        require(self.joint >= 0 <= self.assistant and self.joint + self.assistant <= 1, "joint and assistant are parts "
                f"of the steps, together at most 1; got {self.joint} and {self.assistant}")
        require(0 < self.scale < 1 and bool(self.candidates), f"scale lies between 0 and 1, not {self.scale}, and "
                "there is at least one candidate")
        alone = self.candidates == (1.0,)
        require(alone or all(self.scale < c < 1 for c in self.candidates), "candidates lie between the student's scale "
                f"({self.scale}) and 1, or are (1.0,), the teacher itself; got {self.candidates}")
        require(list(self.candidates) == sorted(set(self.candidates)), "candidates are given in ascending order, each "
                f"once; got {self.candidates}")
        for name, known in (("search", ("joint", "exhaustive")), ("sharing", ("shared", "separate")),
                            ("sampling", ("all", "sandwich")), ("selector", ("npsd", "tradeoff", "worst")),
                            ("ranking", ("taylor", "random"))):
            require(getattr(self, name) in known, f"{name} is one of {', '.join(known)}, not {getattr(self, name)!r}")
        require(not (self.cache and self.view), "what a teacher says of random views cannot be kept: set view or cache "
                "to 0")
        require(self.student_lr > 0, f"student_lr must be above 0, not {self.student_lr}")
        require(self.pictures >= 1 and min(self.small, self.view) >= 0, "pictures must be 1 or more, and small and "
                "view not negative")

    def phase(self, steps: int, lr: float | None = None) -> nested.Config:
        """The training of one phase."""
        return nested.Config(steps, self.batch, self.optimizer, lr or self.lr, self.warmup, self.weight_decay,
                             self.temperature, self.ce, self.kd, self.hidden, self.clip, self.cache)


EMBEDDED = Config(steps=200, batch=64, joint=0.1, assistant=0.1, candidates=(0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8),
                  pictures=256, temperature=2.0, hidden=0.3, lr=3e-3, student_lr=1e-2, weight_decay=1e-4,
                  cache=True)
DIRECT: dict[str, Any] = {"temperature": 3.0, "hidden": 0.5}  # best for a student without an assistant
SCRATCH_LR = 3e-3  # best of 3e-3, 6e-3 and 1e-2 for a student that starts at random


def distill(
    teacher: Classifier,
    labelled: LabelledImages,
    validation: LabelledImages,
    student: Classifier | None = None,
    config: Config = Config(),
    run: Run | None = None,
) -> nn.Module | Slice:
    """Find an assistant, and give the student of `config.scale` that it taught, a `Slice` with the table of candidates.

    The teacher is a transformer or mixer of this library, transformers or timm (`parts.nested.groups`). `validation`
    decides among the candidates. A `student` of any kind takes the place of the slice, is trained and returned.
    """
    run = begin(run)
    job = Job(teacher, labelled, validation, student, config, run)
    with frozen(teacher):
        if config.candidates == (1.0,):
            return job.taught(slice_of(job.teacher), config.steps)
        if config.search == "exhaustive":
            return job.exhaustive()
        assistant, table = job.found()
        return job.chain(assistant, round(config.assistant * config.steps), table)


class Job:
    """The roles, checked, with the ranking and the candidates that follow from it; and the steps of the method."""

    def __init__(self, teacher: Any, labelled: Any, validation: Any, student: Any, config: Config, run: Run):
        self.teacher, self.labelled, self.validation, self.student = teacher, labelled, validation, student
        self.config, self.run = config, run
        self.view = (lambda x: random_view(x, run, config.view)) if config.view else None
        example = run.check(Classifier, labelled, labels=True, teacher=teacher, student=student)["image"]
        run.check(Classifier, validation, labels=True, teacher=teacher)
        least = least_share(teacher)
        require(config.scale > least, f"a student of {config.scale} is out of reach: without any head and hidden unit "
                f"{least:.3f} of this teacher's parameters are left, as the width of its residual stream stays. Give a "
                "larger scale, or a student of another width", RoleError)
        self.path = nested.last_hidden(teacher, example, config.path)[0] if config.hidden else ""
        self.order: Nested = nested.ranking(teacher, labelled, config.phase(0), run, config.pictures, config.ranking)
        self.units = [self.order.units(s) for s in config.candidates]
        self.kept = [self.order.kept(n) for n in self.units]
        self.small = self.order.kept(self.order.units(config.scale))

    def found(self) -> tuple[Slice, list[dict[str, float]]]:
        """The joint training, and the candidate that is chosen after it."""
        config, run = self.config, self.run
        trained = [*([self.small] if config.along else []), *self.kept]
        net: nn.Module = slice_of(self.teacher).model
        if config.sharing == "separate":
            net = nn.ModuleList([slice_of(self.teacher, kept).model for kept in trained])
        nested.jointly(self.teacher, net, trained, self.labelled, config.phase(round(config.joint * config.steps)),
                       run, config.sampling, view=self.view, path=self.path)
        rows = run.once("candidates", lambda: {
            "teacher": self.right(self.teacher), "candidates": nested.scores(net, trained, self.right)})
        table = self.table(rows["candidates"][-len(self.kept):], rows["teacher"])
        best = next(i for i, row in enumerate(table) if row["chosen"])
        if isinstance(net, nn.ModuleList):
            return Slice(net[best - len(self.kept)], self.kept[best]), table
        return slice_of(net, self.kept[best]), table

    def table(self, performance: list[float], of_teacher: float) -> list[dict[str, float]]:
        """Scale wanted and reached, parameters, performance and NPSD of every candidate, and whether it is chosen."""
        config = self.config
        p = torch.tensor(performance, dtype=torch.double)
        s = torch.tensor([self.order.share(n) for n in self.units], dtype=torch.double)
        derivative = npsd(p, s, of_teacher)
        best = first_choice({"npsd": derivative, "worst": -derivative, "tradeoff": tradeoff(p, s, config.small)}
                            [config.selector], s)
        table = [{"wanted": wanted, "scale": float(s[i]), "parameters": float(self.order.parameters[self.units[i]]),
                  "performance": float(p[i]), "npsd": float(derivative[i]), "chosen": float(i == best)}
                 for i, wanted in enumerate(config.candidates)]
        for row in table:
            self.run.log(**row)
        self.run.say(f"the assistant has {table[best]['scale']:.2f} of the teacher's parameters")
        self.run.picture("candidates", chart(table, of_teacher))
        return table

    def right(self, model: nn.Module) -> float:
        """P, the accuracy on the held-out pictures."""
        return accuracy(model, self.validation, device=self.run.device)

    def chain(self, assistant: Slice, steps: int, table: list[dict[str, float]]) -> nn.Module | Slice:
        """The assistant trains `steps` against the teacher, then it teaches."""
        config = self.config
        nested.mimic(self.teacher, assistant, self.labelled, config.phase(steps), self.run, "assistant", self.view,
                     (self.path, self.path))
        before = round(config.joint * config.steps) + round(config.assistant * config.steps)
        return self.taught(assistant, config.steps - before, table)

    def taught(self, assistant: Slice, steps: int, table: list[dict[str, float]] | None = None) -> nn.Module | Slice:
        """The student, by default the assistant's own first units, after `steps` of learning from the assistant."""
        student = assistant.smaller(self.small) if self.student is None else self.student
        nested.mimic(assistant, student, self.labelled, self.config.phase(steps, self.config.student_lr), self.run,
                     "student", self.view, (self.path, self.path if self.student is None else ""))
        if isinstance(student, Slice):
            student.table = table or []
        return student

    def exhaustive(self) -> nn.Module | Slice:
        """Every candidate in turn as assistant, its chain to the end; the student that is best on the held-out data."""
        config, students, given = self.config, [], self.student
        for i, kept in enumerate(self.kept):
            with self.run.scope(f"chain {i}"):
                self.student = copy_of(given)
                both = round(config.joint * config.steps) + round(config.assistant * config.steps)
                students.append(self.chain(slice_of(self.teacher, kept), both, []))
        rows = self.run.once("chains", lambda: [self.right(s) for s in students])
        best = max(range(len(rows)), key=lambda i: (rows[i], -i))
        found = students[best]
        if given is not None:
            given.load_state_dict(found.state_dict())
            return given
        assert isinstance(found, Slice)
        found.table = [{"wanted": wanted, "scale": self.order.share(n), "performance": rows[i],
                        "chosen": float(i == best)}
                       for i, (wanted, n) in enumerate(zip(config.candidates, self.units, strict=True))]
        return found


def copy_of(student: Any) -> Any:
    return None if student is None else copy.deepcopy(student)


def chart(table: list[dict[str, float]], of_teacher: float) -> Any:
    """Performance against scale, the chosen candidate marked."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 3.4), layout="constrained")
    axes = figure.subplots()
    axes.plot([row["scale"] for row in table] + [1.0], [row["performance"] for row in table] + [of_teacher], "o-")
    chosen = next(row for row in table if row["chosen"])
    axes.plot(chosen["scale"], chosen["performance"], "o", markersize=12, fillstyle="none", color="tab:orange")
    axes.annotate("assistant", (chosen["scale"], chosen["performance"]), xytext=(8, -14), textcoords="offset points")
    axes.set(xlabel="part of the teacher's parameters (1: the teacher)", ylabel="held-out accuracy")
    return figure


def tiny() -> dict[str, Any]:
    torch.manual_seed(0)
    image, label = torch.randn(20, 1, 8, 8), torch.arange(20) % 4
    return {"teacher": SmallViT(1, 4, 8, 4, width=8, depth=1, heads=2),
            "labelled": TensorSet(image=image[:12], label=label[:12]),
            "validation": TensorSet(image=image[12:], label=label[12:]),
            "config": Config(steps=6, batch=4, joint=0.34, assistant=0.34, scale=0.5, candidates=(0.7, 0.8, 0.9),
                             lr=0.01, student_lr=0.02, sampling="sandwich", view=1.0)}


# -------------------------------------------------------------------- the embedded experiment


def ground() -> dict[str, Any]:
    """Digits of 16 pixels: 1,000 labelled to learn from, as the teacher did, 200 others to choose by, 597 to test; a
    vision transformer of width 48 as teacher, 4 blocks with 4 heads and 192 hidden units each."""
    train = digits(16, "train")
    return {"teacher": digits_classifier("vit", 16, last=1000, steps=800, width=48, heads=4, mlp_ratio=4.0),
            "labelled": train.select(range(1000)), "validation": train.select(range(1000, 1200)),
            "test": digits(16, "test")}


def experiment(run: Run) -> dict[str, dict[str, float]]:
    """Every arm gives a student of the same size, after as many optimiser steps in all; those without an assistant
    spend them all on the student. Accuracy on 597 test pictures."""
    g = ground()
    teacher = g["teacher"].to(run.device)

    def measured(student: nn.Module) -> dict[str, float]:
        return {"accuracy": accuracy(student, g["test"], device=run.device), "parameters": float(parameters(student))}

    def arm(**changes: Any) -> Callable[[], dict[str, float]]:
        config = dataclasses.replace(EMBEDDED, **changes)

        def measure() -> dict[str, float]:
            start = time.monotonic()
            student: Any = distill(teacher, g["labelled"], g["validation"], None, config, run)
            seconds = time.monotonic() - start
            chosen: dict[str, float] = next((row for row in student.table if row["chosen"]), {})
            return {**measured(student), "seconds": seconds, "assistant": chosen.get("scale", 1.0)}

        return measure

    def amd() -> dict[str, float]:
        """As `distill`, with the time of the search taken."""
        run.begin()
        job = Job(teacher, g["labelled"], g["validation"], None, EMBEDDED, run)
        start = time.monotonic()
        assistant, table = job.found()
        searched = time.monotonic() - start
        middle = job.right(assistant)
        student: Any = job.chain(assistant, round(EMBEDDED.assistant * EMBEDDED.steps), table)
        return {**measured(student), "search seconds": searched, "seconds": time.monotonic() - start,
                "assistant": next(row["scale"] for row in table if row["chosen"]), "assistant before": middle,
                "assistant after": job.right(assistant)}

    def scratch() -> dict[str, float]:
        run.begin()
        job = Job(teacher, g["labelled"], g["validation"], None, dataclasses.replace(EMBEDDED, pictures=32), run)
        student = reinitialised(slice_of(teacher, job.order.kept(job.order.units(EMBEDDED.scale))), run.seed)
        c = EMBEDDED
        plain = supervised.Config(c.steps, c.batch, c.optimizer, SCRATCH_LR, c.warmup, c.weight_decay)
        return measured(supervised.train(student, g["labelled"], plain, run, job.view))

    middle = EMBEDDED.candidates[len(EMBEDDED.candidates) // 2]
    return run.arms(
        {"scratch": scratch,
         "direct": arm(candidates=(1.0,), **DIRECT),
         "amd": amd,
         "exhaustive": arm(search="exhaustive")},
        extended={"worst assistant": arm(selector="worst"),
                  "no hidden states": arm(hidden=0.0),
                  "no logits": arm(kd=0.0),
                  "separate candidates": arm(sharing="separate"),
                  "random ranking": arm(ranking="random"),
                  "trade-off": arm(selector="tradeoff"),
                  "hand-made assistant": arm(candidates=(middle,)),
                  "teacher": lambda: measured(teacher)})
