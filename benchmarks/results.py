"""What was measured: medians, quartiles and ratios, as lines, as the table of the guide, and as a picture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"


def spread(values: list[float]) -> tuple[float, float, float]:
    """Lower quartile, median, upper quartile."""
    low, middle, high = np.quantile(np.asarray(values, dtype=float), [0.25, 0.5, 0.75])
    return float(low), float(middle), float(high)


def ratios(result: dict[str, Any]) -> dict[str, tuple[float, float, float]]:
    """Quartiles of ours / other, repeat by repeat, for every other arm."""
    arms = result["arms"]
    return {name: spread([a / b for a, b in zip(arms["ours"], other, strict=True)])
            for name, other in arms.items() if name != "ours"}


def lines(result: dict[str, Any]) -> list[str]:
    """A result for a terminal."""
    found = [f"{result['name']} ({result['note']})"]
    for name, values in result["arms"].items():
        low, middle, high = spread(values)
        found.append(f"  {name:12} {middle:9.4g} {result['unit']} ({low:.4g} to {high:.4g})")
    found += [f"  ours / {name}: {m:.3f} ({low:.3f} to {high:.3f})" for name, (low, m, high) in ratios(result).items()]
    return found


def table(results: list[dict[str, Any]]) -> str:
    """The results as a Markdown table: medians, and the median of the ratios with its quartiles."""
    rows = ["| Measured | Stillhouse | beside | its figure | ratio (quartiles) |", "|---|---|---|---|---|"]
    for result in results:
        middles = {name: f"{float(f'{spread(values)[1]:.3g}'):g} {result['unit']}"
                   for name, values in result["arms"].items()}
        for name, (low, middle, high) in ratios(result).items():
            rows.append(f"| {result['name']} | {middles['ours']} | {name} | {middles[name]} | {middle:.2f} "
                        f"({low:.2f} to {high:.2f}) |")
    return "\n".join(rows)


def page(text: str, measured: dict[str, Any]) -> str:
    """The guide's text with the table between its marks written anew."""
    head, _, rest = text.partition(BEGIN)
    _, _, tail = rest.partition(END)
    return f"{head}{BEGIN}\n{measured['machine']}\n\n{table(measured['results'])}\n{END}{tail}"


def draw(results: list[dict[str, Any]], file: Path) -> None:
    """The ratios as a picture: a dot for the median, a bar from quartile to quartile, a line at 1."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [(f"{result['name']}\nbeside {name}", *found, result["unit"].endswith("/s"))
            for result in results for name, found in ratios(result).items()]
    figure, axes = plt.subplots(figsize=(8, 1 + 0.55 * len(rows)), layout="constrained")
    for place, (_, low, middle, high, more) in enumerate(reversed(rows)):
        colour = "tab:blue" if (middle >= 1) == more or abs(middle - 1) < 0.05 else "tab:orange"
        axes.plot([low, high], [place, place], color=colour, linewidth=3, alpha=0.5)
        axes.plot([middle], [place], "o", color=colour)
        axes.annotate(f"{middle:.2f}", (middle, place), xytext=(0, 7), textcoords="offset points", ha="center",
                      fontsize=8)
    axes.axvline(1, color="grey", linewidth=1)
    axes.set_yticks(range(len(rows)), [row[0] for row in reversed(rows)], fontsize=8)
    axes.set_ylim(-0.6, len(rows) - 0.3)
    axes.set_xlim(left=0)
    axes.set_xlabel("Stillhouse / the other (time and memory: lower is better; pictures a second: higher is better)")
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=120)
    plt.close(figure)


def read(file: Path) -> dict[str, Any]:
    """What `python -m benchmarks` wrote."""
    return json.loads(file.read_text(encoding="utf-8"))
