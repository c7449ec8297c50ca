"""Models and data for the roles of a system, from the words on the command line."""

from __future__ import annotations

import inspect
import re
import typing
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from stillhouse.errors import ConfigError, RoleError

RATE = 16000
"""Samples a second that sounds are brought to, unless a folder is given with another: FOLDER:rate=8000."""


def resolve_roles(module: Any, wanted: dict[str, inspect.Parameter], given: dict[str, str],
                  options: Any) -> dict[str, Any]:
    """Models and data for the roles, from what was typed."""
    absent = [n for n, p in wanted.items() if p.default is inspect.Parameter.empty and n not in given]
    if absent:
        raise RoleError(f"these roles are needed too: {', '.join('--' + n for n in absent)}. `still show "
                        f"{module.__name__.rpartition('.')[2].replace('_', '-')}` says what each must offer.")

    from torch import nn

    from stillhouse import protocols
    from stillhouse.data.readers import takes_columns
    from stillhouse.hub.latents import text_to_image_among
    from stillhouse.hub.models import fit_role, resolve_model
    from stillhouse.hub.smaller import by_words
    from stillhouse.zoo import MODELS

    if options.columns and not any(takes_columns(text) for text in given.values()):
        raise ConfigError(f"--columns goes with a table or arrays, not with {', '.join(given.values())}")
    hints = typing.get_type_hints(module.distill)
    resolved: dict[str, Any] = {}
    members = {name: _members(hints[name]) for name in given}
    later = {name: 2 * any(map(_is_data, inner)) + _is_smaller(given[name]) for name, (_, inner) in members.items()}
    for name, text in sorted(given.items(), key=lambda item: later[item[0]]):
        several, inner = members[name]
        kind = next((k for k in inner if _is_data(k) or k in protocols.PROBES or k == protocols.Network), inner[0])
        if protocols.CausalLM in inner and any(protocols.TokenPairs in kinds for _, kinds in members.values()):
            kind = protocols.CausalLM
        if text.partition(":")[0] in ("cache", "api") and protocols.TopKTeacher in inner:
            kind = protocols.TopKTeacher
        texts = re.split(r",(?![a-z_]+=)", text) if several else [text]
        if _is_smaller(text):
            if kind not in protocols.PROBES or not isinstance(resolved.get("teacher"), nn.Module):
                raise RoleError(f"--{name} {text} makes a smaller model of the role teacher's architecture; "
                                + ("give --teacher as one model" if kind in protocols.PROBES else
                                   "this role needs something else"))
            values = [fit_role(by_words(text, resolved["teacher"], options.seed), kind, text)]
        elif _is_data(kind):
            latent = text_to_image_among(list(resolved.values()))
            read = _read if latent is None else partial(_for_latents, latent)
            values = [read(t, kind, given, options) for t in texts]
        elif inspect.isclass(kind) and hasattr(kind, "load") and kind not in protocols.PROBES:
            values = [kind.load(t) for t in texts]
        else:
            values = [resolve_model(t, kind, arch=options.arch, zoo=MODELS, seed=options.seed) for t in texts]
        resolved[name] = values if several else values[0]
    return resolved


def _members(hint: Any) -> tuple[bool, list[Any]]:
    """Whether a role takes several, and the kinds that one of them may have."""
    kinds = [k for k in (hint, *typing.get_args(hint)) if k is not type(None)]
    several = any(typing.get_origin(k) in (list, tuple, typing.get_origin(Sequence[int])) for k in kinds)
    return several, [a for k in kinds for a in typing.get_args(k)] if several else kinds


def _for_latents(model: Any, text: str, kind: Any, given: dict[str, str], options: Any) -> Any:
    """Data for a model of latents that is conditioned on text: its own embeddings of prompts, its latents of pictures.
    """
    from stillhouse.hub.latents import encoded, prompts
    from stillhouse.protocols import Conditions, Samples

    if kind is Conditions and text.endswith(".txt"):
        return prompts(text, model)
    data = _read(text, kind, given, options)
    return encoded(data, model) if kind is Samples else data


def _read(text: str, kind: Any, given: dict[str, str], options: Any) -> Any:
    """One data set, and a line about what of it could not be read."""
    from stillhouse.data.broken import LeftOut
    from stillhouse.data.readers import parse_columns, read_data, takes_columns
    from stillhouse.data.text_files import TEXT_ROLES
    from stillhouse.protocols import SpeechData

    columns = parse_columns(options.columns) if options.columns else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LeftOut)
        data = read_data(text, kind, size=options.size, limit_broken=options.limit_broken,
                         tokenizer=tokenizer_of(given, options) if kind in TEXT_ROLES else None,
                         conditional=options.conditional, columns=columns if takes_columns(text) else None,
                         length=options.length, rate=RATE if kind is SpeechData else None)
    found = data.summary() if hasattr(data, "summary") else None
    if found is not None and found.broken:
        print(f"{text}: {found}. They are left out")
    return data


def tokenizer_of(given: dict[str, str], options: Any) -> Any:
    """The tokenizer named by --tokenizer, or that of the first model given as hf:…; None if there is neither."""
    named = [options.tokenizer] if options.tokenizer else [
        text.removeprefix("hf:").partition(":")[0] for text in given.values()
        if text.startswith("hf:") and not _is_saved_set(text)]
    if not named:
        return None
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(named[0], local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise RoleError(f"there is no tokenizer in {named[0]} ({str(error).splitlines()[0]}); give --tokenizer FOLDER"
                        ) from error


def _is_saved_set(text: str) -> bool:
    """Whether hf:… names a folder in which there is no model."""
    folder = Path(text.removeprefix("hf:").partition(":")[0]).expanduser()
    return ":split=" in text or (folder.is_dir() and not any(
        (folder / name).is_file() for name in ("config.json", "tokenizer.json", "tokenizer_config.json")))


def _is_smaller(text: str) -> bool:
    return text.partition(":")[0] == "smaller"


def _is_data(kind: Any) -> bool:
    from stillhouse.protocols import OFFERS

    return isinstance(kind, type) and kind in OFFERS


def move(kwargs: dict[str, Any], device: Any) -> None:
    from stillhouse.protocols import modules_of

    for value in kwargs.values():
        for module in modules_of(value):
            module.to(device)
