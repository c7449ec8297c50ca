"""`still advise`: which system fits."""

from __future__ import annotations

import sys
import textwrap
from typing import Any, get_args

from stillhouse.advice import QUESTIONS, Architecture, Data, Goal, Labels, Need, Situation, Task, Teacher
from stillhouse.advice import advise as find
from stillhouse.cli import tables
from stillhouse.errors import ConfigError


def advise(goal: Goal | None = None, task: Task | None = None, teacher: Teacher | None = None,
           labels: Labels | None = None, architecture: Architecture | None = None, data: Data | None = None,
           size: float | None = None, steps: int | None = None, has: tuple[Need, ...] = (), model: str = "",
           folder: str = "", most: int = 3) -> None:
    """Say which systems fit what you have and want, why, and the command for each. Without flags it asks.

    Args:
        goal: what you want
        task: what the data is
        teacher: open (its weights are there), api (behind an endpoint) or none
        labels: how many labels there are
        architecture: same as the teacher's, or any
        data: whether there is data to train on
        size: wanted part of the teacher's size, e.g. 0.25
        steps: wanted number of sampling steps
        has: what else is there: clip, clients, domains, long-tail, wrong-labels, several, sources, trained, residual
        model: the teacher, as it is to stand in the commands
        folder: the data, as it is to stand in the commands
        most: how many systems at most
    """
    given: dict[str, Any] = {"goal": goal, "task": task, "teacher": teacher, "labels": labels,
                             "architecture": architecture, "data": data}
    if goal is None or task is None:
        if not sys.stdin.isatty():
            raise ConfigError(f"give --goal ({', '.join(get_args(Goal))}) and --task ({', '.join(get_args(Task))})")
        given = {name: value or _ask(name) for name, value in given.items()}
    answer = find(Situation(**given, size=size, steps=steps, has=has), most, model, folder)
    console = tables.console()
    for place, advice in enumerate(answer.fitting, 1):
        system = advice.system
        console.print(f"\n[bold]{place}. {system.slug}[/]  {tables.plain(system.title)} ({system.year})  "
                      f"{tables.coloured(system.verdict)}")
        for line in (advice.why, *(f"but: {caution}" for caution in advice.cautions)):
            print(textwrap.fill(line, 100, initial_indent="   ", subsequent_indent="   "))
        print(f"   {advice.command}")
    if not answer.fitting:
        print("No built system fits all of that.")
    if answer.nearly:
        print("\nNearly:")
        for system, lacking in answer.nearly:
            print(textwrap.fill(f"{system.slug}: {lacking}", 100, initial_indent="   ", subsequent_indent="     "))
    first = answer.fitting[0].system.slug if answer.fitting else answer.nearly[0][0].slug
    print(f"\nWhat each needs and how it was measured: still show {first}. A small demonstration: still run {first}")


def _ask(name: str) -> str | None:
    """One question with numbered answers; an empty answer leaves it open, where that is possible."""
    question, answers = QUESTIONS[name]
    words = list(answers)
    print(f"\n{question}")
    for i, word in enumerate(words, 1):
        print(f"  {i}  {answers[word]}")
    needed = name in ("goal", "task")
    while True:
        said = input(f"number{'' if needed else ', or nothing'}: ").strip()
        if not said and not needed:
            return None
        if said in words:
            return said
        if said.isdigit() and 1 <= int(said) <= len(words):
            return words[int(said) - 1]
        print(f"  one of 1 to {len(words)}, please")
