"""The tables of README.md, generated from the catalog and results/: `python -m stillhouse.report.tables README.md`."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from stillhouse import catalog
from stillhouse.errors import StoreError
from stillhouse.store import write_text

LEADERBOARD = "digits"


def systems_table() -> str:
    """Built systems by family with what their claims came to, and how many are planned."""
    lines = []
    for family, title in catalog.FAMILIES.items():
        members = [s for s in catalog.systems().values() if s.family == family]
        built = [s for s in members if s.built]
        lines.append(f"**{title}** ({len(built)} of {len(members)} built)\n")
        if not built:
            continue
        lines += ["| system | what it moves | claims | paper |", "|---|---|---|---|"]
        lines += [f"| `{s.slug}` | {s.moves} | {_claims(s)} | [{s.title} ({s.year})](https://arxiv.org/abs/{s.arxiv}) |"
                  for s in built]
        lines.append("")
    return "\n".join(lines)


def _claims(system: catalog.System) -> str:
    outcome = system.outcome
    if outcome is None:
        return "not measured"
    verdicts = [c["verdict"] for c in outcome["claims"] if c["verdict"] != "report"]
    return ", ".join(f"{v} {verdicts.count(v)}" for v in ("holds", "leans", "fails") if v in verdicts)


def leaderboard() -> str:
    """The committed comparison of classifiers: its picture, and a row an entrant with the mean over the seeds."""
    folder = catalog.results_folder() / "comparisons" / LEADERBOARD
    found = json.loads((folder / "comparison.json").read_text(encoding="utf-8"))
    file = "trade" if "students" in found else "comparison"
    picture = f"![{found['title']}](results/comparisons/{LEADERBOARD}/{file}.png)"
    columns = list(found.get("students", {"accuracy": None}))
    rows = [f"{found['sentence']} {len(found['seeds'])} paired seeds, mean ± half the 95% interval; from the best by "
            f"{found.get('student', 'the student')}.", "", picture, "",
            "| | " + " | ".join(columns) + " | training seconds |", "|---|" + "---|" * (len(columns) + 1)]
    for arm, values in found["arms"].items():
        of_each = [s[arm]["accuracy"] for s in found["students"].values()] if "students" in found else [
            values["accuracy"]]
        name = f"*{arm}*" if arm in found["baselines"] else f"`{arm}`"
        rows.append(f"| {name} | " + " | ".join(_percent(v) for v in of_each)
                    + f" | {_mean(values['training seconds']):.1f} |")
    return "\n".join(rows)


def _mean(values: list[Any]) -> float:
    seen = [v for v in values if v is not None]
    return sum(seen) / max(1, len(seen))


def _percent(values: list[Any]) -> str:
    from stillhouse.evaluate.claims import interval

    mean, low, high = interval([100 * v for v in values if v is not None])
    return f"{mean:.1f} ± {(high - low) / 2:.1f}"


TABLES: dict[str, Callable[[], str]] = {"systems": systems_table, "leaderboard": leaderboard}
"""What stands in README.md between <!-- NAME:begin --> and <!-- NAME:end -->."""


def with_tables(text: str) -> str:
    """`text` with what stands between the markers replaced. Raises StoreError where a marker is missing."""
    for name, table in TABLES.items():
        first, last = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
        before, begin, rest = text.partition(first)
        _, end, after = rest.partition(last)
        if not begin or not end:
            raise StoreError(f"the markers {first} and {last} are not both there, in that order")
        text = f"{before}{first}\n{table()}\n{last}{after}"
    return text


if __name__ == "__main__":
    for name in sys.argv[1:]:
        write_text(name, with_tables(Path(name).read_text(encoding="utf-8")))
