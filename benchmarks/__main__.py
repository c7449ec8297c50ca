"""`python -m benchmarks [NAME…] [--out FILE] [--commit]`: measure, print, write a JSON file and a picture beside it."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks import results
from stillhouse.store import write_text

HERE = Path(__file__).parent
NAMES = ("language", "steps", "reading")
QUICK: dict[str, dict[str, Any]] = {
    "language": {"sizes": (64, 2000, 32), "repeats": 3}, "steps": {"steps": 20, "small": True},
    "reading": {"repeats": 1}}


def measured(name: str, quick: bool = False) -> list[dict[str, Any]]:
    """The results of one benchmark; [] where it is not there."""
    options = dict(QUICK[name]) if quick else {}
    if name == "language":
        from benchmarks import language

        sizes = language.Sizes(*options.pop("sizes", language.FULL))
        return language.measure(sizes, **options)
    if name == "steps":
        from benchmarks import steps

        return steps.measure(**options)
    try:
        from benchmarks import reading
    except ImportError as error:
        print(f"reading is left out: {error}")
        return []
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    found = reading.measure(**options)
    torch.set_num_threads(threads)
    return [{"name": found["name"], "unit": found["unit"], "note": found["note"],
             "arms": {"ours": found["ours"], "bare": found["bare"]}}]


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", choices=[*NAMES, []], metavar="NAME", help=", ".join(NAMES))
    parser.add_argument("--out", type=Path, default=Path("runs/bench/bench.json"), help="where the figures go")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that all of it runs")
    parser.add_argument("--commit", action="store_true", help="write benchmarks/measured.json and the guide's table")
    given = parser.parse_args(words)
    if given.commit and (given.quick or given.names):
        parser.error("--commit takes all benchmarks at full size")
    torch.set_num_threads(min(2, os.cpu_count() or 1))
    found: list[dict[str, Any]] = []
    for name in given.names or NAMES:
        for result in measured(name, given.quick):
            print("\n".join(results.lines(result)), flush=True)
            found.append(result)
    machine = (f"Measured on a machine with {os.cpu_count()} cores ({platform.machine()}, no GPU used), "
               f"{torch.get_num_threads()} threads, PyTorch {torch.__version__.partition('+')[0]}, "
               f"Python {platform.python_version()}.")
    about = {"machine": machine, "results": found}
    write_text(given.out, json.dumps(about, indent=1))
    results.draw(found, given.out.with_suffix(".png"))
    print(f"written: {given.out} and {given.out.with_suffix('.png')}")
    if given.commit:
        write_text(HERE / "measured.json", json.dumps(_rounded(about), indent=1))
        guide = HERE.parent / "docs" / "guide" / "benchmarks.md"
        write_text(guide, results.page(guide.read_text(encoding="utf-8"), results.read(HERE / "measured.json")))
    return 0


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _rounded(part) for name, part in value.items()}
    if isinstance(value, list):
        return [_rounded(part) for part in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


if __name__ == "__main__":
    sys.exit(main())
