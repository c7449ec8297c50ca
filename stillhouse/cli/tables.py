"""How the commands print: tables, JSON, verdicts in colour."""

from __future__ import annotations

import json
import sys
from typing import Any


def console() -> Any:
    """A console that breaks no line of a table when its output is read by a program."""
    from rich.console import Console

    return Console() if sys.stdout.isatty() else Console(width=240)


def as_json(value: Any) -> str:
    return json.dumps(value, indent=1, ensure_ascii=False)


def plain(text: str) -> str:
    return text.replace("[", r"\[")


def coloured(verdict: str) -> str:
    colours = {"holds": "green", "leans": "yellow", "fails": "red"}
    return f"[{colours.get(verdict.split(' ')[0], 'dim')}]{verdict}[/]" if verdict else ""
