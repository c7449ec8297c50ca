"""The learning rates of a ground's entrants: `python -m benchmarks.tuning digits [SLUG…]`.

Everyone gets the same care: the learning rate it has, half and twice of it, then further in the direction in which it
grows better, as long as it does; each with seeds 100 to 102 and the ground's main student, judged by validation
pictures alone. The outcome is written to `results/comparisons/GROUND/tuning.json`; what it says goes into the catalog
(`grounds`) and the baselines of `stillhouse.zoo.grounds`, and a test compares them.
"""

from __future__ import annotations

import inspect
import json
import math
import statistics
import sys
from collections.abc import Callable
from typing import Any

from tqdm import tqdm

from stillhouse import catalog
from stillhouse.store import write_text

SEEDS = (100, 101, 102)
FURTHEST = 3  # doublings or halvings


def best_rate(score: Callable[[float], list[float]], start: float) -> dict[float, list[float]]:
    """Scores by learning rate, from `start` uphill by factors of two."""
    found = {lr: score(lr) for lr in (start / 2, start, start * 2)}
    for factor in (0.5, 2.0):
        for i in range(2, FURTHEST + 1):
            if chosen(found, start) != start * factor ** (i - 1):
                break
            lr = start * factor**i
            found[lr] = score(lr)
    return dict(sorted(found.items()))


def chosen(found: dict[float, list[float]], start: float) -> float:
    """The rate of the highest mean; among equals the one nearest to `start`."""
    return max(found, key=lambda lr: (statistics.mean(found[lr]), -abs(math.log(lr / start)), -lr))


def tune(ground_name: str, row: str) -> dict[str, Any]:
    """What one entrant or baseline has before and after, and its validation accuracies by learning rate."""
    from stillhouse.evaluate.classification import accuracy
    from stillhouse.parts.packed import QuantizedModel
    from stillhouse.run import Run
    from stillhouse.zoo.grounds import GROUNDS, config_on, distilled

    ground = GROUNDS[ground_name]
    options = ground.students[ground.main]
    if row in ground.baselines:
        start = inspect.signature(ground.baselines[row]).parameters["lr"].default

        def make(run: Run, roles: Any, lr: float) -> Any:
            return ground.baselines[row](run, roles, lr=lr)
    else:
        module, entry = catalog.load(row), catalog.find(row).grounds[ground_name]
        config = entry.get("config", {})
        start = config_on(ground, module, config).lr

        def make(run: Run, roles: Any, lr: float) -> Any:
            return distilled(ground, module, roles, run, {**config, "lr": lr})

    def score(lr: float) -> list[float]:
        scores = []
        for seed in SEEDS:
            run = Run(seed=seed, quiet=True).begin()
            roles = ground.roles(run, **options)
            target = make(run, roles, lr)
            model = target.model if isinstance(target, QuantizedModel) else target
            scores.append(accuracy(model, roles["validation"], device=run.device))
        return scores

    found = best_rate(score, start)
    return {"start": start, "lr": chosen(found, start), "accuracy": {f"{lr:g}": each for lr, each in found.items()}}


def main(ground: str, *rows: str) -> None:
    """Tune the rows named, or all, and write what came out."""
    import torch

    from stillhouse.zoo.grounds import GROUNDS

    torch.set_num_threads(1)
    path = catalog.results_folder() / "comparisons" / ground / "tuning.json"
    learning = [name for name, of in GROUNDS[ground].baselines.items() if "lr" in inspect.signature(of).parameters]
    entrants = [s.slug for s in catalog.systems().values() if s.built and ground in s.grounds]
    for row in tqdm(rows or [*learning, *entrants], desc="entrants", disable=None):
        found = tune(ground, row)
        known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        known[row] = found
        write_text(path, json.dumps(dict(sorted(known.items())), indent=1) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
