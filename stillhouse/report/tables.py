"""The tables of README.md, generated from the catalog and results/: `python -m stillhouse.report.tables README.md`."""

from __future__ import annotations

import sys
from pathlib import Path

from stillhouse import catalog
from stillhouse.errors import StoreError
from stillhouse.store import write_text

BEGIN, END = "<!-- systems:begin -->", "<!-- systems:end -->"


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


def with_tables(text: str) -> str:
    """`text` with what stands between the markers replaced. Raises StoreError where a marker is missing."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise StoreError(f"the markers {BEGIN} and {END} are not both there, in that order")
    return f"{before}{BEGIN}\n{systems_table()}\n{END}{after}"


if __name__ == "__main__":
    for name in sys.argv[1:]:
        write_text(name, with_tables(Path(name).read_text(encoding="utf-8")))
