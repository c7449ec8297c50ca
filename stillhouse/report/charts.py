"""Charts as inline SVG: no script, no file, readable in the dark."""

from __future__ import annotations

import math
from typing import Any

from markupsafe import Markup

MOST_POINTS = 200
LABEL = 24
COLOURS = ("#2a78d6", "#c2571a", "#2f9e63", "#a43fb5", "#c7a008", "#5d6b7a", "#d6336c", "#0ca5a5")


def _short(text: str, most: int = LABEL) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"


def _number(value: float) -> str:
    return f"{value:.1e}" if 0 < abs(value) < 1e-4 else f"{value:.4g}"


def dots(rows: list[tuple[str, float, float, float]]) -> Markup:
    """One dot with its 95% interval per row (arm, mean, low, high), on the axis that the rows span."""
    rows = [(arm, mean, low if math.isfinite(low) else mean, high if math.isfinite(high) else mean)
            for arm, mean, low, high in rows]
    least, most = min((r[2] for r in rows), default=0.0), max((r[3] for r in rows), default=1.0)
    span = (most - least) or 1.0

    def x(value: float) -> float:
        return 156 + 224 * (value - least) / span

    parts = []
    for i, (arm, mean, low, high) in enumerate(rows):
        y = 12 + 20 * i
        parts.append(Markup(
            '<path class="rule" d="M150 {y}H386"/><text x="144" y="{t}" text-anchor="end">{arm}<title>{whole}</title>'
            '</text><path d="M{lo:.1f} {y}H{hi:.1f}"/><circle cx="{at:.1f}" cy="{y}" r="4.5"/>'
            '<text x="394" y="{t}">{value}</text>').format(
            y=y, t=y + 4, arm=_short(arm), whole=arm, lo=x(low), hi=x(high), at=x(mean), value=_number(mean)))
    return Markup('<svg class="dots" viewBox="0 0 440 {h}" role="img">{body}</svg>').format(
        h=20 * len(rows) + 6, body=Markup("").join(parts))


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


def forest(claims: list[dict[str, Any]]) -> Markup:
    """The slack of every claim with its 95% interval, each drawn in its own unit: right of the line it holds."""
    parts = [Markup('<path class="zero" d="M160 0V{h}"/>').format(h=18 * len(claims) + 4)]
    for i, claim in enumerate(claims):
        y = 12 + 18 * i
        if claim["mean"] is None:
            parts.append(Markup('<text x="166" y="{t}">crashed</text>').format(t=y + 4))
            continue
        low, high = (claim["mean"] if v is None else v for v in claim["interval"])
        unit = max(abs(low), abs(high)) or 1.0
        x0, x1, x = (160 + 150 * v / unit for v in (low, high, claim["mean"]))
        parts.append(Markup(
            '<g class="{kind}"><title>{sentence}: {mean} ({low} to {high})</title>'
            '<path d="M{x0:.1f} {y}H{x1:.1f}"/><circle cx="{x:.1f}" cy="{y}" r="4"/></g>').format(
            kind=claim["verdict"], sentence=claim["sentence"], mean=_number(claim["mean"]), low=_number(low),
            high=_number(high), x0=x0, x1=x1, x=x, y=y))
    return Markup('<svg class="forest" viewBox="0 0 320 {h}" role="img" aria-label="slack of the claims">{body}</svg>'
                  ).format(h=18 * len(claims) + 6, body=Markup("").join(parts))
