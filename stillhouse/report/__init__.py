"""The report: one self-contained HTML page about the systems, their measured claims and the runs in a folder."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from stillhouse import __version__, catalog
from stillhouse.errors import StoreError
from stillhouse.evaluate.claims import interval
from stillhouse.report.charts import curve, dots, forest
from stillhouse.store import write_text

MOST_PICTURES = 24


def write_report(folder: Path | str, out: Path | str) -> Path:
    """Write the page to `out`: all systems with verdicts, the outcome of each measured one, and every run found in
    `folder` (itself a run, or holding some) with its curves and pictures. Nothing is fetched when it is opened.

    Raises StoreError where `folder` does not exist or `out` cannot be written.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise StoreError(f"there is no folder {folder}; give the folder of a run, or one with runs in it")
    environment = Environment(loader=PackageLoader("stillhouse.report", "."), autoescape=True,
                              undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    entries = list(catalog.systems().values())
    page = environment.get_template("page.html").render(
        version=__version__, systems=entries, families=catalog.FAMILIES,
        built=sum(s.built for s in entries),
        cards=[_card(s) for s in entries if s.built],
        comparisons=[{**c, "charts": charts_of(c["arms"])}
                     for c in map(_read, sorted(folder.rglob("comparison.json")))],
        summaries=[_read(path) for path in sorted(folder.rglob("summary.json"))],
        runs=[_run(path.parent) for path in sorted(folder.rglob("run.json"))])
    return write_text(out, page)


def _read(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise StoreError(f"{path} is damaged: {error}") from error


def _card(system: catalog.System) -> dict[str, Any]:
    """What the page shows of a built system: its claims, its arms and its pictures."""
    outcome = system.outcome
    verdicts = [c["verdict"] for c in outcome["claims"]] if outcome else []
    return {"system": system, "outcome": outcome, "charts": charts_of(outcome["arms"]) if outcome else {},
            "counts": {v: verdicts.count(v) for v in ("holds", "leans", "fails")},
            "forest": forest(outcome["claims"]) if outcome else "",
            "pictures": [(title, _data_uri(path)) for title, path in system.pictures.items()],
            "seconds": sum(outcome["seconds"]) / max(len(outcome["seconds"]), 1) if outcome else 0.0}


def charts_of(arms: dict[str, dict[str, list[float | None]]]) -> dict[str, Markup]:
    """One chart per metric, all arms in it."""
    charts = {}
    for metric in dict.fromkeys(m for values in arms.values() for m in values):
        rows = []
        for arm, values in arms.items():
            seen = [v for v in values.get(metric, []) if v is not None]
            if seen:
                rows.append((arm, *interval(seen)))
        charts[metric] = dots(rows)
    return charts


def _run(folder: Path) -> dict[str, Any]:
    identity = _read(folder / "run.json")
    pictures = sorted(folder.glob("stages/**/pictures/*.png"))
    return {
        "name": folder.name, "system": identity.get("system", ""), "seed": identity.get("seed"),
        "curves": list(_curves(folder)),
        "pictures": [(_words(p.relative_to(folder / "stages")), _data_uri(p)) for p in pictures[:MOST_PICTURES]],
    }


def _words(path: Path) -> str:
    parts = [unquote(part).removeprefix("arm ") for part in path.with_suffix("").parts if part != "pictures"]
    return " / ".join(parts)


def _data_uri(path: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()


def _curves(folder: Path) -> Iterator[tuple[str, Markup]]:
    """One picture per stage and term, all arms in it."""
    series: dict[tuple[str, str], dict[str, list[tuple[float, float]]]] = {}
    for log in sorted(folder.glob("stages/**/log.jsonl")):
        arm = next((unquote(p).removeprefix("arm ") for p in log.parts if p.startswith("arm ")), "")
        for line in log.read_text(encoding="utf-8").splitlines():
            entry = json.loads(line)
            for name, value in entry.items():
                if name in ("stage", "k") or "k" not in entry or "|" in name or not isinstance(value, int | float):
                    continue
                if math.isfinite(value):
                    series.setdefault((entry["stage"], name), {}).setdefault(arm, []).append((entry["k"], value))
    for (stage, name), arms in series.items():
        if any(len(points) > 2 for points in arms.values()):
            yield f"{stage}: {name}", curve(arms)
