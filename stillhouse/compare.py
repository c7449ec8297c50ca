"""Systems side by side on a ground that they share: one table, one picture, paired seeds."""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stillhouse import catalog
from stillhouse.errors import ConfigError, require
from stillhouse.evaluate.claims import interval
from stillhouse.store import cache_folder, write_text
from stillhouse.verify import FLOORS, WORKERS, Job, json_number, source_hash, work

BASELINE = "baseline "
Arms = dict[str, dict[str, list[float | None]]]


def common_ground(slugs: Sequence[str], ground: str | None = None) -> str:
    """The ground that all of these systems stand on: the one named, or the first they share.

    Raises UnknownNameError for an unknown or planned system, ConfigError where they share no ground, saying which of
    them stands where.
    """
    entrants = [catalog.find_built(slug) for slug in dict.fromkeys(slugs)]
    require(len(entrants) >= 1, "name at least one system to compare with the baselines of its ground")
    stands = "; ".join(f"{s.slug} on {', '.join(s.grounds) or 'none: ' + (s.moves or s.title)}" for s in entrants)
    shared = [name for name in entrants[0].grounds if all(name in s.grounds for s in entrants)]
    if ground is not None:
        require(ground in shared, f"these systems do not all stand on the ground '{ground}' ({stands})")
        return ground
    require(bool(shared), f"these systems share no ground, so a table of them would mean nothing ({stands}). `still "
            "show SLUG` says what each moves into what.")
    return shared[0]


def compare(slugs: Sequence[str], seeds: Sequence[int], ground: str | None = None, workers: int = WORKERS
            ) -> dict[str, Any]:
    """Run the systems and the ground's baselines with paired seeds; what each reached, as `comparison.json` holds it.

    Finished runs are taken from the cache until a source changes. Raises what `common_ground` raises,
    MissingExtraError, or StillError where a run failed.
    """
    require(len(seeds) >= 1, "give at least one seed")
    name = common_ground(slugs, ground)
    entrants = [catalog.find(slug) for slug in dict.fromkeys(slugs)]
    for system in entrants:
        catalog.load(system.slug)
    from stillhouse.zoo.grounds import GROUNDS

    place = GROUNDS[name]
    rows = [*(BASELINE + b for b in place.baselines), *(s.slug for s in entrants)]
    jobs = {(student, row): [_job(row, name, seed, student) for seed in seeds] for student in place.students
            for row in rows}
    work([job for of_row in jobs.values() for job in of_row], workers, "stillhouse.compare")
    students: dict[str, Arms] = {student: {} for student in place.students}
    for (student, row), of_row in jobs.items():
        each = [json.loads(job.outcome.read_text(encoding="utf-8")) for job in of_row]
        students[student][row.removeprefix(BASELINE)] = {m: [e.get(m) for e in each] for m in each[0]}
    arms = students[place.main]
    headline = next(iter(place.better))
    sign = 1 if place.better[headline] == "higher" else -1

    def rank(arm: str) -> float:
        seen = [v for v in arms[arm][headline] if v is not None]
        return -sign * sum(seen) / len(seen) if seen else float("inf")

    order = sorted(arms, key=rank)
    comparison = {"title": place.title, "ground": name, "sentence": place.sentence, "seeds": list(seeds),
                  "better": place.better, "baselines": list(place.baselines), "arms": {arm: arms[arm] for arm in order}}
    if len(students) > 1:
        comparison["student"] = place.main
        comparison["students"] = {student: {arm: found[arm] for arm in order} for student, found in students.items()}
    return comparison


def gains(comparison: dict[str, Any], arm: str) -> tuple[float, float, float]:
    """By how much `arm` beats the last baseline in the first metric: mean and 95% interval over paired seeds; above
    0 is better."""
    headline, direction = next(iter(comparison["better"].items()))
    reference = comparison["arms"][comparison["baselines"][-1]][headline]
    sign = 1 if direction == "higher" else -1
    pairs = zip(comparison["arms"][arm][headline], reference, strict=True)
    return interval([sign * (a - b) for a, b in pairs if a is not None and b is not None])


def draw(comparison: dict[str, Any]) -> Any:
    """A matplotlib figure with one panel per metric: every seed a faint dot, mean and 95% interval over them."""
    from matplotlib.figure import Figure

    arms, metrics = comparison["arms"], list(comparison["better"])
    figure = Figure(figsize=(3.1 * len(metrics) + 2, 0.42 * len(arms) + 1.3), layout="constrained")
    axes = figure.subplots(1, len(metrics), sharey=True, squeeze=False)[0]
    for axis, metric in zip(axes, metrics, strict=True):
        for y, (arm, values) in enumerate(arms.items()):
            seen = [v for v in values.get(metric, []) if v is not None]
            if not seen:
                continue
            mean, low, high = interval(seen)
            colour = "#8a9099" if arm in comparison["baselines"] else "#1d66bd"
            axis.plot(seen, [y] * len(seen), "o", color=colour, alpha=0.25, markersize=4)
            axis.errorbar([mean], [y], xerr=[[mean - low], [high - mean]] if len(seen) > 1 else None, fmt="o",
                          color=colour, capsize=3)
        axis.set_title(f"{metric} ({comparison['better'][metric]} is better)", fontsize=9)
        axis.grid(axis="x", alpha=0.3)
    axes[0].set_yticks(range(len(arms)), list(arms))
    axes[0].set_ylim(len(arms) - 0.5, -0.5)
    figure.suptitle(comparison["title"])
    return figure


def draw_trade(comparison: dict[str, Any]) -> Any:
    """A matplotlib figure of a comparison with students of several sizes: the first metric against the parameters of
    the result, a line an arm, and against the seconds of training with the student that ranks."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    headline, direction = next(iter(comparison["better"].items()))
    figure = Figure(figsize=(13, 6.5), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    taught = [arm for arm, values in comparison["arms"].items() if _mean(values["training seconds"]) > 0.1]
    colours = _colours(taught)
    for arm in comparison["arms"]:
        sizes = [found[arm] for found in comparison["students"].values()]
        if arm not in taught:
            for axis in axes:
                axis.axhline(_mean(sizes[0][headline]), color="#8a9099", linestyle=":", label=arm)
            continue
        given = arm in comparison["baselines"]
        look: dict[str, Any] = {"color": "#555b66" if given else colours[arm], "markersize": 5, "elinewidth": 0.6,
                                "markerfacecolor": "white" if arm == "student alone" else None}
        spreads = [interval([v for v in s[headline] if v is not None]) for s in sizes]
        axes[0].errorbar([_mean(s["parameters"]) for s in sizes], [m for m, _, _ in spreads],
                         yerr=[(high - low) / 2 for _, low, high in spreads], fmt="s--" if given else "o-", label=arm,
                         **look)
        ranking = comparison["arms"][arm]
        mean, low, high = interval([v for v in ranking[headline] if v is not None])
        seconds = _mean(ranking["training seconds"])
        axes[1].errorbar([seconds], [mean], yerr=[(high - low) / 2], fmt="s" if given else "o", **look)
        axes[1].annotate(arm, (seconds, mean), xytext=(6, 3), textcoords="offset points", fontsize=8)
    for axis, label in zip(axes, ("parameters of the result", f"training seconds on one core, {comparison['student']}"),
                           strict=True):
        axis.set_xscale("log")
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.set_xlabel(label)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel(f"{headline} ({direction} is better), mean and 95% interval of {len(comparison['seeds'])} seeds")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", fontsize=9)
    figure.suptitle(comparison["title"])
    return figure


def _mean(values: Sequence[float | None]) -> float:
    seen = [v for v in values if v is not None]
    return sum(seen) / max(1, len(seen))


def _colours(arms: list[str]) -> dict[str, Any]:
    from matplotlib import colormaps

    return {arm: colormaps["turbo"](0.05 + 0.9 * i / max(1, len(arms) - 1)) for i, arm in enumerate(arms)}


def write(comparison: dict[str, Any], folder: Path) -> Path:
    """`comparison.json` and `comparison.png` in `folder`, and `trade.png` where students of several sizes were
    distilled; the path of the picture that says most."""
    write_text(folder / "comparison.json", json.dumps(comparison, indent=1, ensure_ascii=False) + "\n")
    picture = folder / "comparison.png"
    draw(comparison).savefig(picture, dpi=130)
    if "students" in comparison:
        picture = folder / "trade.png"
        draw_trade(comparison).savefig(picture, dpi=110)
    return picture


def _job(row: str, ground: str, seed: int, student: str = "") -> Job:
    source = "" if row.startswith(BASELINE) else catalog.find(row).hash + json.dumps(catalog.find(row).grounds[ground])
    digest = hashlib.blake2b((source + source_hash(FLOORS)).encode(), digest_size=8).hexdigest()
    size = f" {student}".rstrip().replace(" ", "-")
    folder = cache_folder() / "compare" / f"{ground}-{row.replace(' ', '-')}{size}-{digest}" / f"seed-{seed}"
    return Job(row, seed, False, folder, words=("--ground", ground, "--student", student))


def run_entrant(row: str, ground: str, seed: int, folder: Path, student: str = "") -> dict[str, float | None]:
    """One system or baseline on a ground with one seed and one of its students, in a resumable run."""
    from stillhouse.run import Run
    from stillhouse.zoo.grounds import GROUNDS, baseline, enter

    place = GROUNDS[ground]
    options = place.students[student or place.main]
    with Run.open(folder, system=row, seed=seed, quiet=True, resume=None) as run:
        if row.startswith(BASELINE):
            name = row.removeprefix(BASELINE)
            arms = run.arms({name: lambda: baseline(place, name, run, options)})
        else:
            name = row
            entry = catalog.find(row).grounds[ground]
            own = {**options, **entry.get("options", {})}
            arms = run.arms({name: lambda: enter(place, catalog.load(row), run, entry.get("config"), own)})
    return {metric: json_number(value) for metric, value in arms[name].items()}


def main() -> None:
    """A worker: `python -m stillhouse.compare SLUG SEED FOLDER --ground NAME [--student SIZE]`."""
    parser = argparse.ArgumentParser(prog="stillhouse.compare", description="one entrant of a comparison, one seed")
    parser.add_argument("slug")
    parser.add_argument("seed", type=int)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--ground", required=True)
    parser.add_argument("--student", default="")
    given = parser.parse_args()
    import torch

    torch.set_num_threads(1)
    job = Job(given.slug, given.seed, False, given.folder)
    if job.seed < 0:
        raise ConfigError(f"a seed is 0 or more, not {job.seed}")
    write_text(job.outcome, json.dumps(run_entrant(job.slug, given.ground, job.seed, job.folder,
                                                        given.student)))


if __name__ == "__main__":
    main()
