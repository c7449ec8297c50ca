"""The contract test that every system passes, for yours too: `check_system(distill)`."""

from __future__ import annotations

import dataclasses
import inspect
import math
import sys
import tempfile
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from stillhouse import protocols
from stillhouse.data.sets import TensorSet
from stillhouse.errors import Interrupted, StillError
from stillhouse.protocols import modules_of
from stillhouse.run import Run, fingerprint
from stillhouse.store import digest_of

Inputs = Callable[[], dict[str, Any]]
TRAINED = {"student", "scenes"}


def check_system(distill: Callable[..., Any], inputs: Inputs | None = None, most_steps: int = 60,
                 device: str = "cpu") -> None:
    """Assert what every system promises, on tiny untrained inputs.

    `inputs()` gives fresh, deterministic arguments for `distill` (all but `run`) with a config of a few steps; if it is
    left out, the `tiny()` of the system's module is used, or inputs are built from the role annotations.

    On another `device` than "cpu" the models are moved there and deterministic algorithms are asked for.

    Checked: loss terms are finite; every model but the student comes back as it was (weights, buffers, modes,
    `requires_grad`, hooks) and no gradient is left anywhere; data sets are unchanged; a run that is stopped after every
    single step and resumed with new objects ends bit for bit like an undisturbed one; a finished run gives the same
    again; empty data, data that is not finite and labels that no class exists for are refused before any step.

    Raises AssertionError saying which promise is broken.
    """
    make = inputs or getattr(sys.modules[distill.__module__], "tiny", None) or (lambda: build_inputs(distill))

    def moved() -> dict[str, Any]:
        given = make()
        for module in modules_of(given):
            module.to(device)
        return given

    options = {"quiet": True, "device": device, "deterministic": device != "cpu"}
    with tempfile.TemporaryDirectory() as folder:
        expected = _undisturbed(distill, moved, Path(folder) / "undisturbed", options)
        _resumed(distill, moved, Path(folder) / "resumed", expected, most_steps, options)
    _refuses(distill, moved, options)


def build_inputs(distill: Callable[..., Any]) -> dict[str, Any]:
    """Tiny untrained inputs from the annotations of `distill`'s roles, for pictures of 1 x 8 x 8 in 4 classes."""
    torch.manual_seed(0)
    makers: dict[Any, Callable[[], Any]] = {
        protocols.Classifier: lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 4)),
        protocols.Encoder: lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 8)),
        protocols.Network: lambda: lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 4)),
        protocols.Images: lambda: TensorSet(image=torch.randn(22, 1, 8, 8)),
        protocols.LabelledImages: lambda: TensorSet(image=torch.randn(22, 1, 8, 8), label=torch.arange(22) % 4),
        protocols.AnyImages: lambda: TensorSet(image=torch.randn(22, 1, 8, 8), label=torch.arange(22) % 4),
    }
    hints = typing.get_type_hints(distill)
    given: dict[str, Any] = {}
    for name, parameter in inspect.signature(distill).parameters.items():
        if name == "run":
            continue
        if name == "config":
            given[name] = _short(parameter.default)
            continue
        kind = hints.get(name)
        options = typing.get_args(kind) or (kind,)
        maker = next((makers[option] for option in (kind, *options) if option in makers), None)
        if maker is not None:
            given[name] = maker()
        elif parameter.default is inspect.Parameter.empty:
            raise StillError(f"cannot build a tiny '{name}' from its annotation {kind}; give check_system(distill, "
                             "inputs=…), or define tiny() in the system's module")
    return given


def _short(config: Any) -> Any:
    small = {"steps": 4, "epochs": 2, "batch": 8}
    return dataclasses.replace(config, **{f.name: small[f.name] for f in dataclasses.fields(config) if f.name in small})


def target_tree(target: Any) -> Any:
    """What a target consists of: a module's state, or the content of the files that its `save` writes."""
    if isinstance(target, nn.Module):
        return dict(target.state_dict())
    if isinstance(target, Tensor):
        return target
    if isinstance(target, dict):
        return {str(k): target_tree(v) for k, v in target.items()}
    if isinstance(target, list | tuple):
        return [target_tree(v) for v in target]
    assert hasattr(target, "save"), f"a target needs save(folder); {type(target).__name__} has none"
    with tempfile.TemporaryDirectory() as folder:
        target.save(folder)
        files = sorted(p for p in Path(folder).rglob("*") if p.is_file())
        assert files, f"{type(target).__name__}.save wrote nothing"
        return {str(p.relative_to(folder)): _content(p) for p in files}


def _content(path: Path) -> Any:
    if path.suffix == ".safetensors":
        return load_file(path)
    return path.read_text(encoding="utf-8") if path.suffix == ".json" else path.read_bytes().hex()


def target_digest(target: Any) -> str:
    """A hash of everything a target is."""
    return digest_of(target_tree(target))


def _undisturbed(distill: Callable[..., Any], inputs: Inputs, folder: Path, options: dict[str, Any]) -> str:
    given = inputs()
    models = {n: m for n, v in given.items() if n not in TRAINED for m in [v] if list(modules_of(m))}
    before = {name: _condition(model) for name, model in models.items()}
    data = {n: fingerprint(v) for n, v in given.items() if isinstance(v, TensorSet)}
    with Run(folder, **options) as run:
        target = distill(**given, run=run)
    for line in run.history:
        for name, value in line.items():
            assert not isinstance(value, float) or math.isfinite(value), f"'{name}' is {value} in {line}"
    for name, model in models.items():
        now = _condition(model)
        broken = [part for part in now if now[part] != before[name][part]]
        assert not broken, f"'{name}' must come back as it was, but its {', '.join(broken)} changed"
    for name, value in given.items():
        for module in modules_of(value):
            left = [n for n, p in module.named_parameters() if p.grad is not None]
            assert not left, f"gradients are left on '{name}': {left[:3]}"
    for name, was in data.items():
        assert fingerprint(given[name]) == was, f"the data set '{name}' was changed"
    student = given.get("student")
    if isinstance(student, nn.Module) and isinstance(target, nn.Module) and target is not student:
        shared = {id(p) for p in student.parameters()} & {id(p) for p in target.parameters()}
        assert shared and hasattr(target, "save"), ("the student is trained in place and returned, alone or as a part "
                                                    "of a target with a save(folder)")
    return target_digest(target)


def _condition(model: Any) -> dict[str, Any]:
    modules = [m for top in modules_of(model) for m in top.modules()]
    tops = list(modules_of(model))
    return {
        "weights or buffers": digest_of([dict(m.state_dict()) for m in tops]),
        "train/eval flags": [m.training for m in modules],
        "requires_grad": [p.requires_grad for m in tops for p in m.parameters()],
        "hooks": [len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in modules],
    }


def _resumed(distill: Callable[..., Any], inputs: Inputs, folder: Path, expected: str, most_steps: int,
             options: dict[str, Any]) -> None:
    for _ in range(most_steps):
        with Run(folder, checkpoint_steps=1, **options) as run:
            run.stop()
            try:
                target = distill(**inputs(), run=run)
                break
            except Interrupted:
                continue
    else:
        raise AssertionError(f"more than {most_steps} steps; give check_system a config with fewer")
    assert target_digest(target) == expected, (
        "stopped and resumed after every step, the run ends differently: something outlives a step (a local variable, "
        "an optimizer, a queue) without being held by run.loop, or is drawn outside of the run's generators")
    with Run(folder, **options) as run:
        again = distill(**inputs(), run=run)
    assert target_digest(again) == expected, "a finished run, started again, gives another target"


def _refuses(distill: Callable[..., Any], inputs: Inputs, options: dict[str, Any]) -> None:
    for name, value in inputs().items():
        if not isinstance(value, TensorSet):
            continue
        bad = {"empty": value.select([])}
        floats = [n for n, v in value.data.items() if isinstance(v, Tensor) and v.is_floating_point()]
        if floats:
            broken = value.data[floats[0]].clone()
            broken[-1] = float("nan")
            bad["not finite"] = value.with_fields(**{floats[0]: broken})
        if "image" in value.data and value.data.get("label") is not None and name != "unlabelled":
            for y in (-1, 1000):
                label = value.data["label"].clone()
                label[-1] = y
                bad[f"labelled {y}"] = value.with_fields(label=label)
        for what, data in bad.items():
            run = Run(**options)
            try:
                distill(**{**inputs(), name: data}, run=run)
            except StillError as error:
                assert not run.begun, f"'{name}' that is {what} was refused only after work had begun"
                assert str(error), f"the error for '{name}' that is {what} says nothing"
            except Exception as error:
                raise AssertionError(f"'{name}' that is {what} gives {type(error).__name__} ({error}) instead of one "
                                     "of stillhouse.errors") from error
            else:
                raise AssertionError(f"'{name}' that is {what} was accepted")
