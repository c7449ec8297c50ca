"""Which of the built systems fits what one has and wants. The rules are the catalog's, read without torch."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from stillhouse import catalog
from stillhouse.errors import ConfigError, require

Goal = Literal["smaller", "better", "fewer-steps", "features", "clusters", "fewer-data", "density", "scene"]
Task = Literal["images", "text", "speech", "graphs", "points"]
Teacher = Literal["open", "api", "none"]
Labels = Literal["none", "few", "all"]
Architecture = Literal["same", "any"]
Data = Literal["yes", "none"]
Need = Literal["clip", "clients", "domains", "long-tail", "wrong-labels", "several", "sources", "trained", "residual"]

GOALS = {
    "smaller": "a smaller or faster model",
    "better": "the same model, more accurate",
    "fewer-steps": "a diffusion model that samples in a few steps",
    "features": "an encoder learned without labels",
    "clusters": "classes found without labels",
    "fewer-data": "a small data set that stands for a big one",
    "density": "a model with exact likelihoods and samples",
    "scene": "3-D scenes or pictures drawn from a diffusion model, without data",
}
TASKS = {"images": "pictures", "text": "text", "speech": "speech and sound", "graphs": "graphs",
         "points": "vectors of numbers"}
TEACHERS = {"open": "a model whose weights are there", "api": "a model behind an endpoint", "none": "no teacher"}
LABELS = {"none": "no labels", "few": "labels for a few samples", "all": "labels for all samples"}
ARCHITECTURES = {"same": "the student has the teacher's architecture", "any": "it may have another"}
DATA = {"yes": "data to train on", "none": "none"}
NEEDS = {"clip": "a CLIP or SigLIP as teacher, and one as student", "clients": "data that stays with several clients",
         "domains": "pictures from several sources", "long-tail": "classes of very unequal size",
         "wrong-labels": "labels of which many are wrong", "several": "two teachers or more",
         "sources": "models that were made for other tasks", "trained": "a student that is trained already",
         "residual": "a residual network whose shortcuts are to go"}

QUESTIONS: dict[str, tuple[str, dict[str, str]]] = {
    "goal": ("What do you want?", GOALS), "task": ("What is the data?", TASKS),
    "teacher": ("What teaches?", TEACHERS), "data": ("Is there data to train on?", DATA),
    "labels": ("How many labels are there?", LABELS), "architecture": ("What may the student be?", ARCHITECTURES),
}
"""What `still advise` asks, and the answers with their meanings."""


@dataclass(frozen=True)
class Situation:
    """What one has and wants. None says that it does not matter; `size` is the wanted part of the teacher's size, in
    (0, 1], `steps` the wanted calls of a sampler, `has` what is there beside (`NEEDS`)."""

    goal: Goal
    task: Task
    teacher: Teacher | None = None
    labels: Labels | None = None
    architecture: Architecture | None = None
    data: Data | None = None
    size: float | None = None
    steps: int | None = None
    has: tuple[Need, ...] = ()

    def __post_init__(self) -> None:
        for name, kind in (("goal", Goal), ("task", Task), ("teacher", Teacher), ("labels", Labels),
                           ("architecture", Architecture), ("data", Data)):
            value = getattr(self, name)
            optional = name not in ("goal", "task")
            require((optional and value is None) or value in get_args(kind), f"{name} is one of "
                    f"{', '.join(get_args(kind))}, not {value!r}")
        require(self.size is None or 0 < self.size <= 1, f"size is a part of the teacher's size, above 0 and at most "
                f"1, not {self.size}")
        require(self.steps is None or self.steps >= 1, f"steps must be 1 or more, not {self.steps}")
        unknown = set(self.has) - set(get_args(Need))
        require(not unknown, f"'{min(unknown, default='')}' is none of {', '.join(get_args(Need))}")


@dataclass(frozen=True)
class Advice:
    """A system that fits: how well (`score`, more is better), why, what stands against it, and the command."""

    system: catalog.System
    score: float
    why: str
    cautions: tuple[str, ...] = ()
    command: str = ""


@dataclass(frozen=True)
class Answer:
    """The systems that fit, best first, and those that would fit but for one thing, with that thing."""

    fitting: list[Advice] = field(default_factory=list)
    nearly: list[tuple[catalog.System, str]] = field(default_factory=list)


AXES = ("teacher", "labels", "architecture", "data")
MEANING = {"teacher": TEACHERS, "labels": LABELS, "architecture": ARCHITECTURES, "data": DATA}
VERDICTS = {"holds": 2.0, "leans": 1.0}


def advise(situation: Situation, most: int = 3, model: str = "", data: str = "") -> Answer:
    """The built systems for a situation. `model` and `data` stand in the commands for the teacher and the data.

    Raises ConfigError where no built system has this goal for this kind of data, naming what there is.
    """
    rules = [(s, s.advice) for s in catalog.systems().values() if s.built and s.advice]
    same_goal = [(s, rule) for s, rule in rules if situation.goal in rule["goals"]]
    candidates = [(s, rule) for s, rule in same_goal if situation.task in rule["tasks"]]
    if not candidates:
        tasks = sorted({task for _, rule in same_goal for task in rule["tasks"]})
        goals = sorted({goal for _, rule in rules if situation.task in rule["tasks"] for goal in rule["goals"]})
        raise ConfigError(f"no built system gives {GOALS[situation.goal]} for {TASKS[situation.task]} yet; built are "
                          f"--goal {situation.goal} for {', '.join(tasks) or 'nothing'}, and for {situation.task} "
                          f"--goal {', '.join(goals) or 'nothing'}")
    answer = Answer()
    for system, rule in candidates:
        against = _against(situation, rule)
        if not against:
            answer.fitting.append(_advice(system, rule, situation, model, data))
        elif len(against) == 1:
            answer.nearly.append((system, against[0]))
    answer.fitting.sort(key=lambda a: (-a.score, a.system.number))
    del answer.fitting[most:]
    return answer


def _against(situation: Situation, rule: dict[str, Any]) -> list[str]:
    """What the system needs that is not there."""
    found = []
    for axis in AXES:
        given = getattr(situation, axis)
        if given is not None and not _accepted(axis, given, rule[axis]):
            found.append(f"it needs {MEANING[axis][rule[axis][0]]}")
    if situation.steps is not None and "steps" in rule and situation.steps > rule["steps"][1]:
        found.append(f"it is made for {rule['steps'][0]} to {rule['steps'][1]} steps")
    return found + [f"it needs {NEEDS[need]}" for need in rule.get("needs", ()) if need not in situation.has]


def _accepted(axis: str, given: str, accepted: list[str]) -> bool:
    """More than is needed does no harm: a teacher, labels or data may be left unused, and an architecture kept."""
    if axis == "labels":
        order = get_args(Labels)
        return order.index(given) >= min(order.index(v) for v in accepted)
    return given in accepted or axis == "architecture" or (given != "none" and "none" in accepted)


def _advice(system: catalog.System, rule: dict[str, Any], situation: Situation, model: str, data: str) -> Advice:
    verdict = system.verdict.split(" ")[0]
    score = VERDICTS.get(verdict, 0.0)
    score += sum(getattr(situation, axis) in rule[axis] for axis in AXES if getattr(situation, axis) is not None)
    score += 2 * len(rule.get("needs", ()))
    cautions = [] if verdict == "holds" else [f"in miniature its claims come out as: {verdict or 'not measured'}"]
    for name in ("size", "steps"):
        wanted, span = getattr(situation, name), rule.get(name)
        if wanted is not None and span is not None:
            fits = span[0] <= wanted <= span[1]
            score += fits
            if not fits:
                cautions.append(f"it is at home at a {name} of {span[0]} to {span[1]}, not {wanted}")
    if situation.architecture == "any" and rule["architecture"] == ["same"]:
        cautions.append("the student keeps the teacher's architecture")
    return Advice(system, score, rule["when"], tuple(cautions), _command(rule["command"], situation, model, data))


def _command(text: str, situation: Situation, model: str, data: str) -> str:
    """The command of a rule: parts in brackets only where what they name is there, and the words one has given."""
    absent = {"TEACHER": situation.teacher == "none", "DATA": situation.data == "none",
              "LABELLED": situation.labels in ("none", None)}
    for part in re.findall(r" \[[^]]*\]", text):
        dropped = any(gone and re.search(rf"\b{word}\b", part) for word, gone in absent.items())
        text = text.replace(part, "" if dropped else f" {part[2:-1]}")
    if not model and situation.teacher == "api":
        model = "api:URL:model=NAME,tokenizer=FOLDER"
    size = "" if situation.size is None else f":fraction={situation.size:g}"
    words = {"TEACHER": model, "DATA": data, "STUDENT": f"smaller{size}" if situation.architecture == "same" else ""}
    return re.sub(r"\b(TEACHER|DATA|STUDENT)\b", lambda m: words[m[1]] or m[1], text)
