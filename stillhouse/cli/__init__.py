"""The command `still`. Nothing imports torch until it has to."""

from __future__ import annotations

import os
import sys
import textwrap
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import tyro
from tyro.conf import FlagCreatePairsOff

from stillhouse import __version__
from stillhouse.cli.caching import cache
from stillhouse.cli.choosing import advise
from stillhouse.cli.exporting import export
from stillhouse.cli.listing import list_systems, show
from stillhouse.cli.measuring import compare, report, tour, verify
from stillhouse.cli.models import taps
from stillhouse.cli.running import run, run_help
from stillhouse.cli.using import evaluate, predict
from stillhouse.errors import ConfigError, StillError, UnknownNameError


def main(argv: Sequence[str] | None = None) -> None:
    """Entry of the command line; leaves with 0, 1 (it failed), 2 (wrong usage) or 130 (interrupted)."""
    words = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in words
    words = [w for w in words if w != "--debug"]
    try:
        _dispatch(words)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader of a pipe, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (Exception, KeyboardInterrupt) as error:
        if debug:
            traceback.print_exc()
        sys.exit(_explain(error))


def _explain(error: BaseException) -> int:
    """Print one paragraph about `error`; the exit status."""
    if isinstance(error, KeyboardInterrupt):
        print(f"still: {error or 'interrupted'}", file=sys.stderr)
        return 130
    text = str(error)
    if not isinstance(error, StillError):
        text = f"{type(error).__name__}: {text} (this was not foreseen; --debug shows where it happened)"
    print(textwrap.fill(f"still: {text}", 100, break_long_words=False, break_on_hyphens=False), file=sys.stderr)
    return 2 if isinstance(error, UnknownNameError | ConfigError) else 1


def _dispatch(words: list[str]) -> None:
    if words[:1] == ["run"] and len(words) > 1 and not words[1].startswith("-"):
        run(words[1], words[2:])
        return
    tyro.extras.subcommand_cli_from_dict(
        COMMANDS, args=words or ["--help"], prog="still", config=(FlagCreatePairsOff,),
        description="Published systems of distillation and learning without labels, on your models and data.")


def version() -> None:
    """Print the version."""
    print(__version__)


COMMANDS: dict[str, Callable[..., Any]] = {
    "list": list_systems, "show": show, "advise": advise, "run": run_help, "predict": predict, "eval": evaluate,
    "export": export, "cache": cache, "taps": taps, "verify": verify, "compare": compare, "report": report,
    "tour": tour, "version": version,
}
