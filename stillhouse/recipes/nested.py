"""Distillation between a model and slices of it: one slice at a time, or many nested ones on one set of weights."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from stillhouse.data.sets import TensorSet, column, fetch
from stillhouse.errors import RoleError, require
from stillhouse.measures.divergences import kl
from stillhouse.parts.nested import Kept, Nested, Slice, groups, sliced, taylor
from stillhouse.parts.regressors import Regressor
from stillhouse.parts.stages import feature_map, stages_of
from stillhouse.parts.taps import taps
from stillhouse.recipes.supervised import View, check_training, optimizer_for
from stillhouse.run import Run, frozen, set_lr
from stillhouse.run.reading import to_device
from stillhouse.run.schedules import warmup_cosine


@dataclass(frozen=True)
class Config:
    steps: int = 1000  # optimiser steps
    batch: int = 64  # pictures a step
    optimizer: Literal["sgd", "adamw"] = "adamw"  # SGD with momentum 0.9, or AdamW
    lr: float = 1e-3  # peak learning rate; a cosine to 0
    warmup: float = 0.05  # part of the steps in which the learning rate rises
    weight_decay: float = 0.05  # lambda
    temperature: float = 1.0  # T
    ce: float = 1.0  # weight of the cross-entropy with the labels
    kd: float = 1.0  # lambda1, weight of T^2 KL between the softened probabilities
    hidden: float = 1.0  # lambda2, weight of the mean squared error of the last hidden states
    clip: float | None = None  # largest global norm of the gradient
    cache: bool = False  # ask the teacher once for every picture and keep its answers in memory; for fixed pictures

    def __post_init__(self) -> None:
        check_training(self.steps, self.batch, self.lr, self.warmup, self.weight_decay)
        require(min(self.ce, self.kd, self.hidden) >= 0 < max(self.ce, self.kd, self.hidden), "ce, kd and hidden must "
                "not be negative, and one of them above 0")
        require(self.temperature > 0, f"temperature must be above 0, not {self.temperature}")
        require(self.clip is None or self.clip > 0, f"clip is a norm above 0, not {self.clip}")


def composite(target: tuple[Tensor, Tensor | None], said: tuple[Tensor, Tensor | None], label: Tensor, config: Config
              ) -> dict[str, Float[Tensor, ""]]:
    """The terms of L = ce CE(y, p) + lambda1 T^2 KL(p_T || p) + lambda2 MSE(h_T, h), without those of weight 0.

    `target` and `said` are logits and last hidden states of teacher and student.
    """
    terms = {}
    if config.ce:
        terms["ce"] = config.ce * F.cross_entropy(said[0], label)
    if config.kd:
        terms["kd"] = config.kd * kl(target[0], said[0], config.temperature)
    if config.hidden:
        assert target[1] is not None and said[1] is not None
        terms["hidden"] = config.hidden * F.mse_loss(said[1], target[1])
    return terms


def last_hidden(model: nn.Module, image: Tensor, path: str = "") -> tuple[str, tuple[int, ...]]:
    """Where the last hidden states of a model are read, and their shape without the batch: at `path`; by default at the
    output of the block that its last perceptron or attention belongs to, or of its deepest stage where it has none.

    Raises RoleError where nothing is found, UnknownNameError for a path that the model does not have.
    """
    if not path and (known := groups(model, none=True)):
        path = list(known)[-1].rpartition(".")[0]
    found = stages_of(model, image, [path] if path else ())
    require(bool(found), f"no hidden states were found in {type(model).__name__}; name their module", RoleError)
    return list(found.items())[-1]


def first_pictures(data: Any, run: Run) -> Tensor:
    """Two pictures, on the run's device."""
    return to_device(fetch(data, range(min(2, len(data)))), run.device)["image"]


class Targets:
    """What a frozen teacher says of a batch: logits, and last hidden states where `path` names them.

    `data` is what a loop goes through: the labelled set or, with `cache`, the same pictures with the answers, which are
    then computed once. Use it as a context manager.
    """

    def __init__(self, teacher: nn.Module, path: Sequence[str], labelled: Any, config: Config, run: Run, name: str):
        self.teacher, self.path, self.data = teacher, list(path), labelled
        self._held = contextlib.ExitStack()
        if config.cache:
            with self:
                kept = run.once(f"{name}: targets", lambda: self._all(labelled, run.device))
            self.data = TensorSet(image=column(labelled, "image"), label=column(labelled, "label"),
                                  **{n: v.cpu() for n, v in kept.items()})

    def __enter__(self) -> Targets:
        self._held.enter_context(frozen(self.teacher))
        self._taps = self._held.enter_context(taps(inner(self.teacher), self.path))
        return self

    def __exit__(self, *error: Any) -> None:
        self._held.close()

    @torch.no_grad()
    def __call__(self, batch: Mapping[str, Any], x: Tensor) -> tuple[Tensor, Tensor | None]:
        """`x` is the view of the batch's pictures that the student gets."""
        if "logits" in batch:
            return batch["logits"], batch.get("hidden")
        return self.teacher(x), self._taps[self.path[0]] if self.path else None

    def _all(self, labelled: Any, device: torch.device) -> dict[str, Tensor]:
        found: dict[str, list[Tensor]] = {"logits": [], "hidden": []}
        for i in range(0, len(labelled), 128):
            x = fetch(labelled, range(i, min(i + 128, len(labelled))))["image"].to(device)
            for name, value in zip(found, self({}, x), strict=True):
                if value is not None:
                    found[name].append(value.cpu())
        return {name: torch.cat(values) for name, values in found.items() if values}


def inner(model: nn.Module) -> nn.Module:
    """The network itself, of which a `Slice` is a cut."""
    return model.model if isinstance(model, Slice) else model


def mimic(
    teacher: nn.Module,
    student: nn.Module,
    labelled: Any,
    config: Config,
    run: Run,
    name: str = "mimic",
    view: View | None = None,
    paths: tuple[str, str] = ("", ""),
) -> nn.Module:
    """Train `student` in place on the composite loss, in the stage `name`; the teacher is frozen, both see one view.

    `paths` name the last hidden states of teacher and student (`last_hidden`). Where their shapes differ
    a `Regressor` brings the student's to the teacher's.
    """
    shapes = [last_hidden(inner(m), first_pictures(labelled, run), p)
              for m, p in zip((teacher, student), paths, strict=True)] if config.hidden else []
    t_path, s_path = ([path] for path, _ in shapes) if shapes else ([], [])
    differ = bool(shapes) and shapes[0][1] != shapes[1][1]
    bridge = Regressor(shapes[1][1], shapes[0][1]).to(run.device) if differ else nn.Identity()
    optimizer = optimizer_for([*student.parameters(), *bridge.parameters()], config.optimizer, config.lr,
                              config.weight_decay)
    student.train()
    with Targets(teacher, t_path, labelled, config, run, name) as targets, taps(inner(student), s_path) as h_s:
        for batch in run.loop(name, targets.data, batch=config.batch, steps=config.steps, student=student,
                              bridge=bridge, drop_last=len(labelled) >= config.batch, optimizer=optimizer):
            set_lr(optimizer, config.lr * warmup_cosine(run.progress, config.warmup))
            x = view(batch["image"]) if view else batch["image"]
            target = targets(batch, x)
            if differ:
                assert target[1] is not None
                target = target[0], feature_map(target[1])
            z = student(x)
            said = z, bridge(h_s[s_path[0]]) if s_path else None
            run.update(optimizer, clip=config.clip, **composite(target, said, batch["label"], config))
    return student


def jointly(
    teacher: nn.Module,
    net: nn.Module,
    candidates: Sequence[Kept],
    labelled: Any,
    config: Config,
    run: Run,
    sampling: Literal["all", "sandwich"] = "all",
    name: str = "joint",
    view: View | None = None,
    path: str = "",
) -> nn.Module:
    """Train the slices `candidates` of `net`, smallest first, on one set of weights, in place, by the composite loss.

    In a step the teacher answers once, every candidate ("sandwich": the smallest, the largest and a random one between)
    makes a forward and a backward pass, and the sum of their losses is divided by their number. `net` is a copy of the
    teacher, or a list of models, one for each candidate, that share nothing (an `nn.ModuleList`).
    """
    apart = isinstance(net, nn.ModuleList)
    optimizer = optimizer_for(net.parameters(), config.optimizer, config.lr, config.weight_decay)
    at = [last_hidden(teacher, first_pictures(labelled, run), path)[0]] if config.hidden else []
    net.train()
    with Targets(teacher, at, labelled, config, run, name) as targets:
        for batch in run.loop(name, targets.data, batch=config.batch, steps=config.steps, net=net, optimizer=optimizer,
                              drop_last=len(labelled) >= config.batch):
            set_lr(optimizer, config.lr * warmup_cosine(run.progress, config.warmup))
            x = view(batch["image"]) if view else batch["image"]
            target = targets(batch, x)
            chosen = sandwich(len(candidates), run) if sampling == "sandwich" else list(range(len(candidates)))
            losses = []
            for c in chosen:
                model: nn.Module = net[c] if isinstance(net, nn.ModuleList) else net
                with taps(model, at) as h_c, sliced(model, {} if apart else candidates[c]):
                    said = model(x), h_c[at[0]] if at else None
                loss = torch.stack(list(composite(target, said, batch["label"], config).values())).sum()
                run.backward(loss / len(chosen), into=optimizer)
                losses.append(loss.detach())
            run.step(optimizer, clip=config.clip)
            run.log(smallest=losses[0], largest=losses[-1])
    return net


def sandwich(n: int, run: Run) -> list[int]:
    """The smallest, the largest and a random one of n candidates, in ascending order; all where there are two."""
    return sorted({0, n - 1, run.shared_randint(1, n - 1) if n > 2 else 0})


def ranking(teacher: nn.Module, labelled: Any, config: Config, run: Run, pictures: int = 1024,
            kind: Literal["taylor", "random"] = "taylor") -> Nested:
    """The teacher's units, ranked once by their first-order importance for the cross-entropy of `pictures` labelled
    pictures, or at random. Kept by the run."""
    def importance() -> dict[str, Tensor]:
        found = taylor(teacher, (to_device(fetch(labelled, range(i, min(i + 64, most))), run.device)
                                 for i in range(0, most, 64)), _each_loss)
        if kind == "random":
            found = {path: torch.rand(len(value), dtype=torch.double) for path, value in found.items()}
        return {str(i): value for i, value in enumerate(found.values())}

    most = min(pictures, len(labelled))
    with frozen(teacher):
        kept = run.once("importance", importance)
        return Nested(teacher, [kept[str(i)].cpu() for i in range(len(kept))])


def _each_loss(model: Any, batch: Mapping[str, Any]) -> Float[Tensor, " batch"]:
    return F.cross_entropy(model(batch["image"]), batch["label"], reduction="none")


def scores(model: nn.Module, candidates: Sequence[Kept], measure: Callable[[nn.Module], float]) -> list[float]:
    """`measure` of every candidate: of slices of one model, or of models of their own."""
    made = []
    for c, kept in enumerate(candidates):
        one: nn.Module = model[c] if isinstance(model, nn.ModuleList) else model
        with torch.no_grad(), sliced(one, {} if isinstance(model, nn.ModuleList) else kept):
            made.append(measure(one))
    return made
