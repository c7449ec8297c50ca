"""Stillhouse: published systems of distillation and learning without labels, on one set of shared parts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

__version__ = "0.1.0"


def load(folder: Path | str, arch: str | None = None) -> Any:
    """The result of a finished run, ready for use; see `stillhouse.deploy.targets.load`."""
    from stillhouse.deploy.targets import load as read

    return read(folder, arch)
