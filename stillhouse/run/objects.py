"""The user's objects, handed back as they came."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from stillhouse.protocols import modules_of
from stillhouse.store import digest_of


@contextlib.contextmanager
def frozen(*models: Any) -> Iterator[None]:
    """Eval mode and no `requires_grad` for all modules among `models`; both restored after, on exceptions too."""
    modules = [m for top in modules_of(*models) for m in top.modules()]
    modes = [(m, m.training) for m in modules]
    flags = [(p, p.requires_grad) for top in modules_of(*models) for p in top.parameters()]
    try:
        for top in modules_of(*models):
            top.eval().requires_grad_(False)
        yield
    finally:
        for module, training in modes:
            module.training = training
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def fingerprint(value: Any) -> str:
    """A short hash of a model's weights or a data set's content (its length and ends if it is not in memory)."""
    modules = list(modules_of(value))
    if modules:
        return digest_of([m.state_dict() for m in modules], length=16)
    if isinstance(value, list | tuple):
        return digest_of([fingerprint(part) for part in value], length=16)
    if hasattr(value, "data") and isinstance(value.data, dict):
        return digest_of(value.data, length=16)
    if hasattr(value, "__len__") and hasattr(value, "__getitem__"):
        ends = [dict(value[i]) for i in sorted({0, len(value) - 1})] if len(value) else []
        return digest_of([len(value), ends], length=16)
    return digest_of(repr(type(value)), length=16)
