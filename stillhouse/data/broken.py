"""Files and rows that cannot be read: counted, named, left out below a limit."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from stillhouse.data.sets import TensorSet
from stillhouse.errors import DataError

SHOWN = 3


class LeftOut(UserWarning):
    """Some files or rows of a data set could not be read and are left out."""


@dataclass(frozen=True)
class Summary:
    """What became of the files or rows of a data set: how many there were, and why some are left out.

    `broken` maps the name of a file or row to the reason.
    """

    total: int
    broken: Mapping[Any, str] = field(default_factory=dict)
    what: str = "rows"

    @property
    def read(self) -> int:
        return self.total - len(self.broken)

    def __str__(self) -> str:
        if not self.broken:
            return f"all {self.total} {self.what} can be read"
        named = "; ".join(list(self.broken.values())[:SHOWN]) + ("; …" if len(self.broken) > SHOWN else "")
        return f"{len(self.broken)} of {self.total} {self.what} cannot be read: {named}"


class ReadSet(TensorSet):
    """A set in memory that knows what was left out when it was read."""

    def __init__(self, found: Summary | None = None, **fields: Tensor | list):
        super().__init__(**fields)
        self.found = found or Summary(self.length)
        self.classes: tuple[str, ...] = ()

    def summary(self) -> Summary:
        return self.found


def tolerate(found: Summary, limit: float, advice: str = "Repair or delete them") -> None:
    """Warn of what is broken, or raise DataError if it is more than the part `limit` of all."""
    if not found.broken:
        return
    if len(found.broken) > limit * found.total:
        raise DataError(f"{found}. {advice}, or raise limit_broken (now {limit}), the part that may be left out")
    warnings.warn(f"{found}. They are left out", LeftOut, stacklevel=4)
