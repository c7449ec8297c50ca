"""What several commands share: a system's name as an argument, and its roles as `distill` declares them."""

from __future__ import annotations

import inspect
import typing
from typing import Annotated, Any

from tyro.conf import arg

Slug = Annotated[str, arg(metavar="SLUG", help="name of a system, as `still list` shows it")]


def roles(module: Any) -> dict[str, inspect.Parameter]:
    parameters = inspect.signature(module.distill).parameters
    return {name: p for name, p in parameters.items() if name not in ("config", "run")}


def kind(parameter: inspect.Parameter) -> str:
    return str(parameter.annotation).removesuffix(" | None").removeprefix("stillhouse.protocols.")


def offers(module: Any, role: str) -> str:
    """First line of the docstring of the protocol that a role is annotated with."""
    hint = typing.get_type_hints(module.distill)[role]
    kinds = [k for k in (hint, *typing.get_args(hint)) if getattr(k, "__module__", "") == "stillhouse.protocols"]
    return (inspect.getdoc(kinds[0]) or "").splitlines()[0] if kinds else ""
