"""How one student learns from several teachers: one after another, all at once, or from each apart and averaged."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, Literal

from torch import nn

from stillhouse.errors import require
from stillhouse.recipes.federated import average
from stillhouse.run import Run

Order = Literal["sequential", "parallel", "soup"]
ORDERS = ("sequential", "parallel", "soup")

Lesson = Callable[[nn.Module, Sequence[Any], int], None]
"""lesson(student, teachers, steps) trains the student in place."""


def several_teachers(student: nn.Module, teachers: Sequence[Any], steps: int, lesson: Lesson, run: Run,
                     order: Order = "sequential") -> nn.Module:
    """Train the student in place with every teacher; `steps` are shared out evenly among the lessons.

    "sequential": one teacher after another, each lesson from where the one before ended. "parallel": one lesson with
    all teachers. "soup": a copy of the student for every teacher, whose weights and buffers are averaged at the end
    (Wortsman et al. 2022). Raises ConfigError for another word.
    """
    require(order in ORDERS, f"order is one of {', '.join(ORDERS)}, not {order!r}")
    if order == "parallel" or len(teachers) == 1:
        lesson(student, teachers, steps)
        return student
    parts = [steps * (i + 1) // len(teachers) - steps * i // len(teachers) for i in range(len(teachers))]
    copies = []
    for i, (teacher, count) in enumerate(zip(teachers, parts, strict=True)):
        learner = copy.deepcopy(student) if order == "soup" else student
        with run.scope(f"teacher {i}"):
            lesson(learner, [teacher], count)
        copies.append(learner)
    if order == "soup":
        average(student, copies, [1] * len(copies))
    return student
