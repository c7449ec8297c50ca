"""Models and data for the roles of a system, from the words on the command line."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Sequence
from typing import Any

from stillhouse.errors import RoleError


def resolve_roles(module: Any, wanted: dict[str, inspect.Parameter], given: dict[str, str],
                  options: Any) -> dict[str, Any]:
    """Models and data for the roles, from what was typed."""
    absent = [n for n, p in wanted.items() if p.default is inspect.Parameter.empty and n not in given]
    if absent:
        raise RoleError(f"these roles are needed too: {', '.join('--' + n for n in absent)}. `still show "
                        f"{module.__name__.rpartition('.')[2].replace('_', '-')}` says what each must offer.")

    from stillhouse import protocols
    from stillhouse.data.readers import read_data
    from stillhouse.hub.models import resolve_model
    from stillhouse.zoo import MODELS

    hints = typing.get_type_hints(module.distill)
    resolved: dict[str, Any] = {}
    for name, text in given.items():
        kinds = [k for k in (hints[name], *typing.get_args(hints[name])) if k is not type(None)]
        several = any(typing.get_origin(k) in (list, tuple, typing.get_origin(Sequence[int])) for k in kinds)
        inner = [a for k in kinds for a in typing.get_args(k)] if several else kinds
        kind = next((k for k in inner if _is_data(k) or k in protocols.PROBES or k == protocols.Network), inner[0])
        texts = text.split(",") if several else [text]
        if _is_data(kind):
            tokenizer = tokenizer_of(given, options) if kind is protocols.TokenPairs else None
            values = [read_data(t, kind, size=options.size, limit_broken=options.limit_broken, tokenizer=tokenizer,
                                conditional=options.conditional)
                      for t in texts]
        elif inspect.isclass(kind) and hasattr(kind, "load") and kind not in protocols.PROBES:
            values = [kind.load(t) for t in texts]
        else:
            values = [resolve_model(t, kind, arch=options.arch, zoo=MODELS, seed=options.seed) for t in texts]
        resolved[name] = values if several else values[0]
    return resolved


def tokenizer_of(given: dict[str, str], options: Any) -> Any:
    """The tokenizer named by --tokenizer, or that of the first model given as hf:…; None if there is neither."""
    named = [options.tokenizer] if options.tokenizer else [
        text.removeprefix("hf:") for text in given.values() if text.startswith("hf:")]
    if not named:
        return None
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(named[0], local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise RoleError(f"there is no tokenizer in {named[0]} ({str(error).splitlines()[0]}); give --tokenizer FOLDER"
                        ) from error


def _is_data(kind: Any) -> bool:
    from stillhouse.protocols import OFFERS

    return kind in OFFERS


def move(kwargs: dict[str, Any], device: Any) -> None:
    from stillhouse.protocols import modules_of

    for value in kwargs.values():
        for module in modules_of(value):
            module.to(device)
