"""Embedded sets by name, with options after a colon."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any

from stillhouse.data.densities import gauss2d
from stillhouse.data.digits import corrupted_digits, digits
from stillhouse.data.grammar import grammar
from stillhouse.data.label_shift import dirichlet_proportions, draw_domains, with_styles
from stillhouse.data.sets import TensorSet
from stillhouse.data.shapes import coloured_names, coloured_shapes, shapes
from stillhouse.data.tones import tones
from stillhouse.errors import ConfigError, DataError, UnknownNameError, require


def _motifs(split: str = "train", n: int | None = None, seed: int = 0) -> TensorSet:
    from stillhouse.data.graphs import motifs

    return motifs(split, n, seed)


def _domain_digits(split: str = "train", n: int = 4000, size: int = 8, classes: int = 5, domains: int = 8,
                   alpha: float = 0.5, condition: float = 8.0, styles: int = 0, seed: int = 0) -> TensorSet:
    W = dirichlet_proportions(classes, domains, alpha, condition, seed)
    drawn = draw_domains(digits(size, split), W, n, seed, noise=0.05).without("label")
    return with_styles(drawn, styles, 2.0, seed, seed) if styles else drawn


def _coloured_shapes(n: int = 1280, seed: int = 0, size: int = 32, background: Any = "texture", hue: float = 30.0,
                     base: bool = False) -> TensorSet:
    drawn = coloured_shapes(n, seed, size, background, hue)
    return drawn.select((drawn.label < len(coloured_names()) // 2).nonzero().flatten()) if base else drawn


EMBEDDED: dict[str, Callable[..., TensorSet]] = {
    "coloured-shapes": _coloured_shapes,
    "coloured-shape-names": lambda: TensorSet(name=coloured_names()),
    "digits": lambda split="train", size=8: digits(size, split),
    "corrupted-digits": lambda split="unlabelled", size=8, n=250, seed=0: corrupted_digits(n, size, split, seed),
    "domain-digits": _domain_digits,
    "gauss2d": lambda n=4096, std=0.15, seed=0: gauss2d(n, std=std, seed=seed),
    "grammar": lambda split="train", n=800, seed=0: grammar(split, n, seed),
    "motifs": _motifs,
    "shapes": lambda n=1000, seed=0, size=32, background="plain", hue=0.0: shapes(n, seed, size, background=background,
                                                                                  hue=hue),
    "tones": lambda n=1500, seed=0, noise=0.1, seconds=1.0: tones(n, seed, noise, seconds),
}
"""Embedded sets by name, with the options that may follow the name."""


def embedded_name(text: str) -> str | None:
    """The embedded set that a string names, None if it names none."""
    head = text.split(":", 1)[0]
    if head in EMBEDDED:
        return head
    base = re.sub(r"\d+$", "", head)
    return base if base in ("digits", "corrupted-digits") else None


def read_embedded(text: str, size: int | None = None) -> TensorSet:
    """An embedded set by its name, its options after a colon: `digits16:test`, `gauss2d:n=1000,seed=1`.

    Raises UnknownNameError for another name or option.
    """
    name = embedded_name(text)
    if name is None:
        raise UnknownNameError(f"there is no embedded set '{text}'; there are {', '.join(EMBEDDED)}")
    head, _, rest = text.partition(":")
    make = EMBEDDED[name]
    known = inspect.signature(make).parameters
    options = parse_options(rest, "split") if rest else {}
    if head != name:
        options["size"] = int(head.removeprefix(name))
    if size is not None and "size" in known:
        options.setdefault("size", size)
    for option in options:
        require(option in known, f"'{name}' has no option '{option}'; it has {', '.join(known)}", UnknownNameError)
    for option in set(options) - {"split"}:
        words = isinstance(known[option].default, str)
        require(words or isinstance(options[option], int | float), f"'{option}' of '{name}' is a number, not "
                f"{options[option]!r}", DataError)
    return make(**options)


def parse_options(text: str, first: str | None = None) -> dict[str, Any]:
    """`a=1,b=x` as a dict: whole numbers, numbers, true/false/none, else strings. `first` names a value without `=`.

    Raises ConfigError for anything else.
    """
    options: dict[str, Any] = {}
    for i, part in enumerate(text.split(",")):
        name, equals, value = part.strip().partition("=")
        if not equals and i == 0 and first is not None and name:
            name, value = first, name
        elif not (equals and name.strip().isidentifier() and value.strip()):
            raise ConfigError(f"'{part}' is not an option of the form name=value (in '{text}')")
        require(name.strip() not in options, f"'{name.strip()}' is given twice in '{text}'")
        options[name.strip()] = _literal(value.strip())
    return options


def _literal(value: str) -> Any:
    words = {"true": True, "false": False, "none": None}
    if value.lower() in words:
        return words[value.lower()]
    for kind in (int, float):
        try:
            return kind(value)
        except ValueError:
            continue
    return value
