"""The leaves of the survey's map (Gou et al. 2021): for each kind of knowledge, each scheme and each kind of algorithm
one method that stands for it, what it needs, and a selector that matches needs with what there is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from stillhouse.data.sets import fetch
from stillhouse.errors import RoleError, UnknownNameError, require
from stillhouse.hub.architectures import built_by
from stillhouse.parts.ensembles import Ensemble
from stillhouse.parts.packed import QuantizedModel
from stillhouse.parts.quantizers import encode, few_bits
from stillhouse.parts.stages import stages_of
from stillhouse.recipes import (
    adversarial,
    architecture_choice,
    data_free,
    kd,
    knowledge,
    lifelong,
    mutual,
    self_exits,
    supervised,
)
from stillhouse.run import Run
from stillhouse.run.reading import to_device

Gives = Literal["everything", "probabilities", "labels"]

NEEDS = {
    "labels": "labelled pictures",
    "answers": "a teacher over the same classes",
    "probabilities": "a teacher that gives class probabilities, not labels alone",
    "features": "a teacher whose inner features can be read",
    "gradients": "a teacher that gradients pass through",
    "stages": "a student in which at least two stages are found",
    "several teachers": "two teachers or more",
    "second modality": "pictures with a second modality (`other`) that the teacher sees",
    "factory": "a factory of networks like the student (`network`)",
    "candidates": "factories of two candidates or more",
    "known classes": "classes that the student knows already (`old`)",
}
"""What a method may ask for."""


@dataclass(frozen=True)
class Settings:
    """What all leaves are trained with."""

    steps: int
    batch: int
    optimizer: Literal["sgd", "adamw", "lars"]
    lr: float
    warmup: float
    weight_decay: float
    temperature: float
    alpha: float
    bits: int
    generator: int
    old: tuple[int, ...]


Roles = Mapping[str, Any]
"""student, and what there is of labelled, teacher, teachers, network, candidates and view."""


@dataclass(frozen=True)
class Leaf:
    """One method. `passes` are a step's forward and backward passes in units of the student's own on labels, a
    teacher's forward pass counted as one third, whatever its size."""

    sentence: str
    source: str
    knowledge: tuple[str, ...]
    scheme: str
    needs: tuple[str, ...]
    passes: float
    train: Callable[[Roles, Settings, Run], Any]
    algorithms: tuple[str, ...] = ()


def _training(s: Settings) -> dict[str, Any]:
    return {"steps": s.steps, "batch": s.batch, "optimizer": s.optimizer, "lr": s.lr, "warmup": s.warmup,
            "weight_decay": s.weight_decay}


def _labels(roles: Roles, s: Settings, run: Run) -> nn.Module:
    return supervised.train(roles["student"], roles["labelled"], supervised.Config(**_training(s)), run,
                            roles.get("view"))


def _response(roles: Roles, s: Settings, run: Run, **changes: Any) -> nn.Module:
    config = kd.Config(**_training(s), temperature=s.temperature, alpha=s.alpha, **changes)
    return kd.distill(roles["teacher"], roles["student"], roles["labelled"], config, run, roles.get("view"))


def _matched(kind: Any, weight: float) -> Callable[[Roles, Settings, Run], nn.Module]:
    """Response knowledge and that of `kind`, whose weight brings it to the order of the others."""
    def train(roles: Roles, s: Settings, run: Run) -> nn.Module:
        config = knowledge.Config(**_training(s), temperature=s.temperature, ce=1 - s.alpha, kd=s.alpha, kind=kind,
                                  weight=weight)
        return knowledge.distill(roles["teacher"], roles["student"], roles["labelled"], config, run, roles.get("view"))

    return train


def _mutual(roles: Roles, s: Settings, run: Run) -> nn.Module:
    peer = roles["network"]().to(run.device)
    config = mutual.Config(**_training(s))
    return mutual.train([roles["student"], peer], roles["labelled"], config, run, roles.get("view"))[0]


def _exits(roles: Roles, s: Settings, run: Run) -> nn.Module:
    return self_exits.train(roles["student"], roles["labelled"], self_exits.Config(**_training(s)), run,
                            roles.get("view"))


def _several(roles: Roles, s: Settings, run: Run) -> nn.Module:
    return _response({**roles, "teacher": Ensemble(roles["teachers"])}, s, run)


def _adversarial(roles: Roles, s: Settings, run: Run) -> nn.Module:
    config = adversarial.Config(**_training(s), temperature=s.temperature, ce=1 - s.alpha, kd=s.alpha)
    return adversarial.distill(roles["teacher"], roles["student"], roles["labelled"], config, run, roles.get("view"))


def _data_free(roles: Roles, s: Settings, run: Run) -> nn.Module:
    shape: Any = tuple(fetch(roles["labelled"], [0])["image"].shape[1:])
    config = data_free.Config(**_training(s), shape=shape, width=s.generator)
    return data_free.distill(roles["teacher"], roles["student"], config, run)


def _quantized(roles: Roles, s: Settings, run: Run) -> QuantizedModel:
    student = roles["student"]
    with few_bits(student, s.bits, None) as names:
        _response(roles, s, run)
    weights = dict(student.named_parameters())
    return QuantizedModel(student, {name: encode(weights[name], 2**s.bits, None) for name in names})


def _lifelong(roles: Roles, s: Settings, run: Run) -> nn.Module:
    config = lifelong.Config(**_training(s), old=s.old)
    return lifelong.train(roles["student"], roles["labelled"], config, run, roles.get("view"))


def _searched(roles: Roles, s: Settings, run: Run) -> nn.Module:
    batch = to_device(fetch(roles["labelled"], range(min(s.batch, len(roles["labelled"])))), run.device)
    best, scores = architecture_choice.choose(roles["teacher"], roles["candidates"], batch["image"], run.seed)
    run.say(f"candidate {best} is chosen; scores {[round(v, 5) for v in scores.tolist()]}")
    return _response({**roles, "student": built_by(roles["candidates"][best]).to(run.device)}, s, run)


_KD = ("labels", "probabilities")
_FEATURES = (*_KD, "features", "stages")

LEAVES: dict[str, Leaf] = {
    "labels": Leaf("training on the labels, without any teacher", "", ("response",), "none", ("labels",), 1.0, _labels),
    "response": Leaf("softened probabilities", "Hinton et al. 2015", ("response",), "offline", ("labels", "answers"),
                     4 / 3, _response),
    "hint": Leaf("features of every stage through a regressor", "Romero et al. 2015", ("feature", "response"),
                 "offline", _FEATURES, 1.5, _matched("hint", 0.1)),
    "attention": Leaf("attention maps of every stage", "Zagoruyko and Komodakis 2017", ("feature", "response"),
                      "offline", _FEATURES, 1.4, _matched("attention", 30.0), ("attention",)),
    "nst": Leaf("what each channel is selective for", "Huang and Wang 2017", ("feature", "response"), "offline",
                _FEATURES, 1.5, _matched("nst", 30.0)),
    "fsp": Leaf("the flow between two stages", "Yim et al. 2017", ("relation", "response"), "offline", _FEATURES, 1.5,
                _matched("fsp", 10.0)),
    "rkd": Leaf("distances and angles among samples", "Park et al. 2019", ("relation", "response"), "offline",
                _FEATURES, 1.4, _matched("rkd", 10.0)),
    "sp": Leaf("similarities among samples", "Tung and Mori 2019", ("relation", "response"), "offline", _FEATURES, 1.4,
               _matched("sp", 300.0)),
    "graph": Leaf("the graph of a batch's samples", "Liu et al. 2019", ("relation", "response"), "offline", _FEATURES,
                  1.4, _matched("irg", 0.03), ("graph",)),
    "mutual": Leaf("two networks that teach each other", "Zhang et al. 2018", ("response",), "online",
                   ("labels", "factory"), 2.0, _mutual),
    "exits": Leaf("inner exits that learn from the last one", "Zhang et al. 2019", ("response", "feature"), "self",
                  ("labels", "stages"), 1.5, _exits),
    "several": Leaf("the mean answer of several teachers", "You et al. 2017", ("response",), "offline",
                    (*_KD, "several teachers"), 5 / 3, _several, ("multi-teacher",)),
    "adversarial": Leaf("a critic that tells features apart", "Wang et al. 2018", ("feature", "response"), "offline",
                        (*_KD, "features"), 1.5, _adversarial, ("adversarial",)),
    "cross-modal": Leaf("a teacher of another modality", "Gupta et al. 2016", ("response",), "offline",
                        (*_KD, "second modality"), 4 / 3, lambda r, s, run: _response(r, s, run, teacher_sees="other"),
                        ("cross-modal",)),
    "data-free": Leaf("pictures that a generator makes for the teacher", "Chen et al. 2019", ("response",), "offline",
                      ("probabilities", "features", "gradients"), 4.0, _data_free, ("data-free", "adversarial")),
    "quantized": Leaf("a student of few bits", "Polino et al. 2018", ("response",), "offline", _KD, 1.5, _quantized,
                      ("quantized",)),
    "lifelong": Leaf("new classes without forgetting the old ones", "Li and Hoiem 2016", ("response",), "self",
                     ("labels", "known classes"), 4 / 3, _lifelong, ("lifelong",)),
    "searched": Leaf("the candidate that is most like the teacher, untrained", "Dong et al. 2023",
                     ("response", "relation"), "offline", (*_KD, "features", "candidates"), 4 / 3, _searched,
                     ("nas",)),
}
"""One representative of every category, by name."""


def find(name: str) -> Leaf:
    """The leaf of that name. Raises UnknownNameError."""
    require(name in LEAVES, f"there is no leaf '{name}'; choose one of {', '.join(LEAVES)}", UnknownNameError)
    return LEAVES[name]


def there_is(roles: Roles, gives: Gives = "everything", old: tuple[int, ...] = ()) -> set[str]:
    """Which of `NEEDS` the user's models and data meet. `gives` says what the teacher answers with; one that is no
    nn.Module gives probabilities at most. Raises RoleError for another word."""
    require(gives in ("everything", "probabilities", "labels"), "a teacher gives 'everything', 'probabilities' or "
            f"'labels', not {gives!r}", RoleError)
    first = fetch(roles["labelled"], [0])
    found = {need for need, field in (("labels", "label"), ("second modality", "other")) if field in first}
    teacher = roles.get("teacher")
    if teacher is not None:
        found.add("answers")
        if gives != "labels":
            found.add("probabilities")
        if gives == "everything" and isinstance(teacher, nn.Module):
            found |= {"features", "gradients"}
    if len(roles.get("teachers") or ()) >= 2 and gives != "labels":
        found |= {"several teachers", "probabilities"}
    if roles.get("network") is not None:
        found.add("factory")
    if len(roles.get("candidates") or ()) >= 2:
        found.add("candidates")
    if old:
        found.add("known classes")
    student = roles["student"]
    home = next(student.parameters()).device
    if len(stages_of(student, to_device(first, home)["image"])) >= 2:
        found.add("stages")
    return found


def select(found: set[str]) -> tuple[list[str], dict[str, str]]:
    """The leaves whose needs are met, from the cheapest step to the dearest, and of the others what they lack."""
    refused = {}
    for name, leaf in LEAVES.items():
        lacking = [NEEDS[need] for need in leaf.needs if need not in found]
        if lacking:
            refused[name] = "it needs " + ", and ".join(lacking)
    return sorted((n for n in LEAVES if n not in refused), key=lambda n: LEAVES[n].passes), refused


def train(name: str, roles: Roles, settings: Settings, run: Run) -> Any:
    """Train `roles["student"]` (or the candidate that is chosen) by the leaf of that name; what comes out of it."""
    return find(name).train(roles, settings, run)
