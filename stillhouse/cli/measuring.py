"""`still verify`, `compare`, `report` and `tour`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tyro.conf import Positional

from stillhouse import catalog
from stillhouse.cli import tables
from stillhouse.cli.words import Slug
from stillhouse.errors import ConfigError, StillError


def verify(slugs: Positional[tuple[Slug, ...]] = (), all: bool = False, seeds: int = 5, first_seed: int = 0,
           full: bool = False, workers: int = 2, out: Path | None = None) -> None:
    """Measure the claims of systems over several seeds and write the outcomes to results/.

    Finished seeds and arms are kept in the cache, so an interrupted verification goes on where it was.

    Args:
        slugs: the systems to verify
        all: every built system
        seeds: how many seeds
        first_seed: the first of them; outcomes are written only from 0 (use 100 and up while tuning)
        full: the extended arms as well
        workers: worker processes, one thread each
        out: folder of the outcomes instead of results/
    """
    from stillhouse.verify import verify as measure

    names = [s.slug for s in catalog.systems().values() if s.built] if all else list(slugs)
    if not names:
        raise ConfigError("name at least one system, or give --all")
    if seeds < 1:
        raise ConfigError(f"--seeds must be 1 or more, not {seeds}")
    where = out or (catalog.results_folder() if first_seed == 0 else None)
    outcomes = measure(names, range(first_seed, first_seed + seeds), full, where, workers)
    for outcome in outcomes:
        _print_outcome(outcome)
    if any(outcome["crashed"] for outcome in outcomes):
        raise StillError("some arms crashed; their messages are above")


def _print_outcome(outcome: dict[str, Any]) -> None:
    from rich.table import Table

    from stillhouse.evaluate.claims import interval

    console = tables.console()
    console.print(f"\n[bold]{outcome['slug']}[/]: {tables.coloured(outcome['verdict'])}, seeds {outcome['seeds']}, "
                  f"{sum(outcome['seconds']) / len(outcome['seconds']):.0f} s a seed")
    metrics = list(dict.fromkeys(m for values in outcome["arms"].values() for m in values))
    table = Table("arm", *metrics, box=None, pad_edge=False)
    for arm, values in outcome["arms"].items():
        cells = []
        for m in metrics:
            seen = [v for v in values.get(m, []) if v is not None]
            mean, low, high = interval(seen) if seen else (0.0, 0.0, 0.0)
            cells.append(f"{mean:.4g} ± {(high - low) / 2:.2g}" if seen else "")
        table.add_row(arm, *cells)
    console.print(table)
    for claim in outcome["claims"]:
        slack = " ".join("nan" if v is None else f"{v:.3g}" for v in claim["slack"])
        console.print(f"  {tables.coloured(claim['verdict'])}: {tables.plain(claim['sentence'])} (slack {slack})")
    for where, text in outcome["crashed"].items():
        console.print(f"  [red]crashed[/] {where}: {tables.plain(text)}")


def compare(slugs: Positional[tuple[Slug, ...]], seeds: int = 3, ground: str | None = None, workers: int = 2,
            out: Path | None = None) -> None:
    """Compare systems that share a ground: the same models, data, budget and measures; one table and one picture.

    Baselines of the ground enter too. Systems that share no ground are refused, with the reason.

    Args:
        slugs: the systems to compare
        seeds: how many paired seeds
        ground: the ground, where the systems share several
        workers: worker processes, one thread each
        out: folder of the picture and the figures; default: runs/compare-GROUND
    """
    from stillhouse.compare import compare as measure
    from stillhouse.compare import write

    if seeds < 1:
        raise ConfigError(f"--seeds must be 1 or more, not {seeds}")
    comparison = measure(slugs, range(seeds), ground, workers)
    picture = write(comparison, out or Path("runs") / f"compare-{comparison['ground']}")
    _print_comparison(comparison)
    print(f"picture: {picture}")


def _print_comparison(comparison: dict[str, Any]) -> None:
    from rich.table import Table

    from stillhouse.compare import gains
    from stillhouse.evaluate.claims import interval

    console, (headline, *_) = tables.console(), comparison["better"]
    console.print(f"\n[bold]{comparison['title']}[/]. {comparison['sentence']} Seeds {comparison['seeds']}.\n")
    reference = comparison["baselines"][-1]
    table = Table("", *comparison["better"], f"{headline}: better than {reference} by", box=None, pad_edge=False)
    for arm, values in comparison["arms"].items():
        cells = []
        for metric in comparison["better"]:
            mean, low, high = interval([v for v in values.get(metric, []) if v is not None])
            cells.append(f"{mean:.4g} ± {(high - low) / 2:.2g}")
        gain, low, high = gains(comparison, arm)
        table.add_row(arm, *cells, "" if arm == reference else f"{gain:.3g} ({low:.3g} to {high:.3g})")
    console.print(table)


def report(folder: Positional[Path] = Path("runs"), out: Path | None = None) -> None:
    """Write one self-contained HTML page about the systems, their outcomes and the runs in a folder.

    Args:
        folder: a run folder, or a folder of run folders
        out: the page to write; default: report.html in that folder
    """
    from stillhouse.report import write_report

    print(f"report: {write_report(folder, out or folder / 'report.html')}")


def tour(out: Path = Path("runs/tour"), seed: int = 0, quiet: bool = False) -> None:
    """The main job on the embedded digits, a short tour through the other built systems, and a report.

    Args:
        out: folder for the runs and the report
        seed: seed of everything random
        quiet: no progress
    """
    from stillhouse.tour import tour as go

    go(out, seed, quiet)


