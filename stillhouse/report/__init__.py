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
from stillhouse.store import write_text

MOST_POINTS = 200
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
        measured=[_measured(s, outcome) for s in entries if (outcome := s.outcome) is not None],
        summaries=[_read(path) for path in sorted(folder.rglob("summary.json"))],
        runs=[_run(path.parent) for path in sorted(folder.rglob("run.json"))])
    return write_text(out, page)


def _read(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise StoreError(f"{path} is damaged: {error}") from error


def _measured(system: catalog.System, outcome: dict[str, Any]) -> dict[str, Any]:
    metrics = list(dict.fromkeys(m for values in outcome["arms"].values() for m in values))
    table = {}
    for metric in metrics:
        rows = []
        for arm, values in outcome["arms"].items():
            seen = [v for v in values.get(metric, []) if v is not None]
            if seen:
                rows.append((arm, *interval(seen)))
        table[metric] = bars(rows)
    return {"system": system, "outcome": outcome, "bars": table,
            "seconds": sum(outcome["seconds"]) / max(len(outcome["seconds"]), 1)}


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


COLOURS = ("#2a78d6", "#c2571a", "#2f9e63", "#a43fb5", "#c7a008", "#5d6b7a", "#d6336c", "#0ca5a5")


def _number(value: float) -> str:
    return f"{value:.4g}"


def bars(rows: list[tuple[str, float, float, float]]) -> Markup:
    """Horizontal bars with 95% intervals as inline SVG; rows are (arm, mean, low, high)."""
    rows = [(arm, mean, low if math.isfinite(low) else mean, high if math.isfinite(high) else mean)
            for arm, mean, low, high in rows]
    largest = max((max(abs(low), abs(high)) for _, _, low, high in rows), default=0.0) or 1.0
    smallest = min((min(low, 0.0) for _, _, low, _ in rows), default=0.0)
    span = largest - smallest or 1.0

    def x(value: float) -> float:
        return 150 + 220 * (value - smallest) / span

    parts = []
    for i, (arm, mean, low, high) in enumerate(rows):
        y = 8 + 22 * i
        parts.append(Markup(
            '<text x="144" y="{t}" text-anchor="end">{arm}</text>'
            '<rect x="{x0:.1f}" y="{y}" width="{w:.1f}" height="12" rx="2"/>'
            '<path d="M{lo:.1f} {m}H{hi:.1f}M{lo:.1f} {a}V{b}M{hi:.1f} {a}V{b}"/>'
            '<text x="{end:.1f}" y="{t}">{value}</text>').format(
            t=y + 10, arm=arm, x0=min(x(0), x(mean)), y=y, w=max(abs(x(mean) - x(0)), 1), lo=x(low), hi=x(high),
            m=y + 6, a=y + 3, b=y + 9, end=x(max(high, 0)) + 6, value=_number(mean)))
    return Markup('<svg class="bars" viewBox="0 0 440 {h}" role="img">{body}</svg>').format(
        h=22 * len(rows) + 8, body=Markup("").join(parts))


def curve(arms: dict[str, list[tuple[float, float]]]) -> Markup:
    """Lines over steps as inline SVG, thinned to averages of neighbouring steps."""
    lines = {arm: _thinned(points) for arm, points in arms.items()}
    every = [point for points in lines.values() for point in points]
    x0, x1 = min(p[0] for p in every), max(p[0] for p in every)
    y0, y1 = min(p[1] for p in every), max(p[1] for p in every)
    width, height = (x1 - x0) or 1.0, (y1 - y0) or 1.0
    parts = []
    for i, (arm, points) in enumerate(lines.items()):
        path = " ".join(f"{40 + 350 * (x - x0) / width:.1f},{110 - 100 * (y - y0) / height:.1f}" for x, y in points)
        colour = COLOURS[i % len(COLOURS)]
        parts.append(Markup('<polyline points="{p}" style="stroke:{c}"><title>{arm}</title></polyline>').format(
            p=path, c=colour, arm=arm or "run"))
    legend = Markup(" ").join(Markup('<span style="color:{}">&#9632;</span> {}').format(COLOURS[i % len(COLOURS)], arm)
                              for i, arm in enumerate(lines) if arm)
    return Markup(
        '<svg class="curve" viewBox="-24 0 424 130" role="img">{body}<text x="36" y="16" text-anchor="end">{top}</text>'
        '<text x="36" y="112" text-anchor="end">{low}</text><text x="40" y="126">{first}</text>'
        '<text x="390" y="126" text-anchor="end">{last}</text></svg><p class="legend">{legend}</p>').format(
        body=Markup("").join(parts), top=_number(y1), low=_number(y0), first=_number(x0), last=_number(x1),
        legend=legend)


def _thinned(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    size = -(-len(points) // MOST_POINTS)
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    return [(g[-1][0], sum(p[1] for p in g) / len(g)) for g in groups]
