"""What a stage holds by reference: collected into a tree for a checkpoint, restored in place from one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from stillhouse.errors import ResumeError
from stillhouse.store import pack


class State:
    """A namespace of numbers, strings, None and tensors (or lists and dicts of them) that outlives a step."""

    def __init__(self, **values: Any):
        pack(values)
        self.__dict__.update(values)

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"run.state has no '{name}'; give it a first value: run.state({name}=…)")

    def state_dict(self) -> dict[str, Any]:
        return dict(self.__dict__)

    def load_state_dict(self, values: dict[str, Any]) -> None:
        for name, value in values.items():
            old = self.__dict__.get(name)
            self.__dict__[name] = value.to(old.device) if isinstance(old, Tensor) else value


def validate(held: dict[str, Any]) -> None:
    """Raise TypeError for what cannot be held by reference."""
    for name, value in held.items():
        if isinstance(value, dict):
            validate({f"{name}[{k!r}]": v for k, v in value.items()})
        elif isinstance(value, list | tuple):
            validate({f"{name}[{i}]": v for i, v in enumerate(value)})
        elif not (value is None or isinstance(value, Tensor) or hasattr(value, "state_dict")):
            raise TypeError(
                f"run.loop cannot hold {name}={value!r} ({type(value).__name__}): it is copied, not referred to, so a "
                f"resumed run would lose it. Use s = run.state({name.split('[')[0]}=…) and hold state=s."
            )


def collect(value: Any) -> Any:
    """The tree that `restore` needs to bring `value` back."""
    if value is None or isinstance(value, Tensor):
        return value
    if isinstance(value, dict):
        return {k: collect(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [collect(v) for v in value]
    return value.state_dict()


def restore(value: Any, saved: Any, name: str) -> None:
    """Bring the object `value` into the `saved` state, in place."""
    if value is None:
        return
    try:
        if isinstance(value, Tensor):
            with torch.no_grad():
                value.copy_(saved)
        elif isinstance(value, dict):
            for k, v in value.items():
                restore(v, saved[k], f"{name}[{k!r}]")
        elif isinstance(value, list | tuple):
            for i, v in enumerate(value):
                restore(v, saved[i], f"{name}[{i}]")
        else:
            value.load_state_dict(saved)
    except (RuntimeError, KeyError, IndexError, ValueError) as error:
        raise ResumeError(f"the saved state of '{name}' does not fit the object given now: {error}. Was the model or "
                          "the code changed since? Start a new run in another folder.") from error


def is_optimizer(value: Any) -> bool:
    return isinstance(value, torch.optim.Optimizer)
