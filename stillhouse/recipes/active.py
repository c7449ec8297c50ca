"""Active learning in rounds: a student says what it is unsure of, a teacher of which only the answers are known labels
it, the student is trained on all that is labelled by then."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from stillhouse.data.mining import pictures
from stillhouse.data.sets import TensorSet, column, fetch
from stillhouse.errors import ConfigError, require
from stillhouse.measures.divergences import signed_cross_entropy
from stillhouse.parts.black_box import BlackBox
from stillhouse.recipes.supervised import View, optimizer_for
from stillhouse.run import Run, set_lr
from stillhouse.run.schedules import warmup_cosine


class Query(NamedTuple):
    """Which points to ask for: positions in the pool; if `partner` is given, the picture that is asked for is
    share x + (1 - share) x_partner."""

    positions: Int[Tensor, " n"]
    partner: Int[Tensor, " n"] | None = None
    share: Float[Tensor, " n"] | None = None


Choose = Callable[[Int[Tensor, " free"], Int[Tensor, " asked"]], Query]
"""choose(free, asked): what to ask for next of the `free` positions of the pool, those `asked` for before known."""


class Acquired(NamedTuple):
    """The student, what was asked for (positions in the pool, round after round), and the answers as logits."""

    student: nn.Module
    positions: Int[Tensor, " n"]
    answers: Float[Tensor, "n classes"]


def parts_of(steps: int, parts: int) -> list[int]:
    """`steps` shared out evenly."""
    return [steps * (i + 1) // parts - steps * i // parts for i in range(parts)]


def learn_in_rounds(student: nn.Module, labelled: Any, pool: Any, teacher: BlackBox, choose: Choose, rounds: int,
                    config: Any, run: Run, view: View | None = None) -> Acquired:
    """Train on the labels; then, `rounds` times, choose, ask, and train on labels and answers alike.

    `config` has steps (of all trainings together), batch, optimizer, lr, warmup, weight_decay, and `restart`: whether
    every training begins from the weights that the student came with. The loss is the cross-entropy with the label, or
    with softmax(answer). What was chosen and answered is kept by the run, so that a resumed one asks for nothing twice.
    """
    start = copy.deepcopy(student.state_dict())
    label = column(labelled, "label")
    parts: list[tuple[Any, Tensor | None]] = [(labelled, None)]
    asked = torch.zeros(0, dtype=torch.long)
    answers: list[Tensor] = []
    for r, steps in enumerate(parts_of(config.steps, rounds + 1)):
        if r:
            found = run.once(f"queries of round {r}", partial(_asked, teacher, pool, choose, asked, run))
            positions = found["positions"].cpu()
            asked = torch.cat([asked, positions])
            answers.append(found["answers"].to(run.device))
            parts.append((TensorSet(image=found["image"].cpu()), None) if "image" in found else (pool, positions))
            if config.restart:
                student.load_state_dict(start)
        data = pictures(*parts)
        given = F.one_hot(label, teacher.classes or -1).float().to(run.device)
        targets = torch.cat([given, *(z.softmax(-1) for z in answers)])
        optimizer = optimizer_for(student.parameters(), config.optimizer, config.lr, config.weight_decay)
        student.train()
        for batch in run.loop(f"round {r}", data, batch=config.batch, steps=steps, student=student,
                              optimizer=optimizer, drop_last=len(data) >= config.batch):
            set_lr(optimizer, config.lr * warmup_cosine(run.progress, config.warmup))
            logits = student(view(batch["image"]) if view else batch["image"])
            run.update(optimizer, ce=signed_cross_entropy(targets[batch["index"]], logits))
    return Acquired(student, asked, torch.cat(answers).cpu() if answers else torch.zeros(0, teacher.classes or 0))


def _asked(teacher: BlackBox, pool: Any, choose: Choose, asked: Tensor, run: Run) -> dict[str, Tensor]:
    free = torch.ones(len(pool), dtype=torch.bool)
    free[asked] = False
    query = choose(free.nonzero().flatten(), asked)
    require(bool(free[query.positions].all()) and len(query.positions.unique()) == len(query.positions),
            "a point was chosen twice", ConfigError)
    image = read(pool, query.positions)
    mixed: dict[str, Tensor] = {}
    if query.partner is not None and query.share is not None:
        share = query.share.to(image).view(-1, *[1] * (image.dim() - 1))
        mixed["image"] = image = share * image + (1 - share) * read(pool, query.partner)
    return {"positions": query.positions, "answers": ask(teacher, image, run.device), **mixed}


def read(data: Any, positions: Int[Tensor, " n"]) -> Float[Tensor, "n ..."]:
    """The pictures of a set at these positions."""
    return fetch(data, positions.tolist())["image"]


def ask(teacher: BlackBox, image: Float[Tensor, "n ..."], device: torch.device | str = "cpu", batch: int = 256
        ) -> Float[Tensor, "n classes"]:
    """The teacher's answers, on the CPU, asked for `batch` pictures at a time."""
    return torch.cat([teacher(image[i : i + batch].to(device)).float().cpu() for i in range(0, len(image), batch)])
