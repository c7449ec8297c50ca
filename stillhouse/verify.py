"""Measuring the claims: arms with paired seeds, each seed a resumable run in a worker process of its own."""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from tqdm import tqdm

from stillhouse import catalog
from stillhouse.errors import ConfigError, StillError, require
from stillhouse.evaluate.claims import judge, worst
from stillhouse.store import cache_folder, write_text

WORKERS = 2
MOST_PICTURES = 6
LARGEST = 400_000
FLOORS = ("measures", "parts", "data", "models", "diffusion", "run", "evaluate", "recipes", "zoo")
THREADS = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE",
           "TOKENIZERS_PARALLELISM": "false"}
VERSIONED = ("stillhouse", "torch", "numpy", "scikit-learn", "scipy", "transformers", "diffusers", "torch_geometric")


@dataclass(frozen=True)
class Job:
    """One system and seed, and where its run lives."""

    slug: str
    seed: int
    full: bool
    folder: Path
    hash: str = ""
    words: tuple[str, ...] = ()  # further arguments of its worker

    @property
    def outcome(self) -> Path:
        return self.folder / ("full.json" if self.full else "core.json")


def verify(slugs: Sequence[str], seeds: Sequence[int], full: bool, out: Path | None = None,
           workers: int = WORKERS) -> list[dict[str, Any]]:
    """Run the embedded experiments of these systems and judge their claims.

    Finished seeds are taken from the cache, started ones go on where they were; a changed source of the system or of
    the floors below it starts afresh. With `out`, each outcome is written to `out/<slug>.json`, unless one of the same
    source with more arms or seeds is there already. Raises UnknownNameError, MissingExtraError, or StillError where a
    worker failed as a whole.
    """
    require(len(seeds) >= 1, "give at least one seed")
    jobs = []
    for slug in slugs:
        system = catalog.find_built(slug)
        catalog.load(system.slug)
        base = runs_folder(system)
        jobs += [Job(system.slug, seed, full, base / f"seed-{seed}", system.hash) for seed in seeds]
    work(jobs, workers)
    outcomes = []
    for slug in dict.fromkeys(job.slug for job in jobs):
        outcome = summarise(slug, [job for job in jobs if job.slug == slug])
        outcomes.append(outcome)
        if out is not None and _keep(outcome, out / f"{slug}.json"):
            keep_pictures(next(job.folder for job in jobs if job.slug == slug), out / slug)
    return outcomes


def runs_folder(system: catalog.System) -> Path:
    """Where the runs of a system lie in the cache: another folder whenever its source or a floor's changes."""
    digest = hashlib.blake2b((system.hash + source_hash(FLOORS)).encode(), digest_size=8).hexdigest()
    return cache_folder() / "verify" / f"{system.slug}-{digest}"


def source_hash(floors: Sequence[str]) -> str:
    """A hash of all modules on these floors."""
    h = hashlib.blake2b(digest_size=8)
    for floor in floors:
        for path in sorted((catalog.PACKAGE / floor).rglob("*.py")):
            h.update(path.read_bytes())
    return h.hexdigest()


def summarise(slug: str, jobs: Sequence[Job]) -> dict[str, Any]:
    """The outcome of one system over its seeds, as it is committed."""
    module, system = catalog.load(slug), catalog.find(slug)
    each = [json.loads(job.outcome.read_text(encoding="utf-8")) for job in jobs]
    judged = [judge(claim, [_numbers(e["arms"]) for e in each]) for claim in module.CLAIMS]
    names = list(dict.fromkeys(arm for e in each for arm in e["arms"]))
    arms: dict[str, dict[str, list[float | None]]] = {}
    for arm in names:
        metrics = dict.fromkeys(m for e in each for m in e["arms"].get(arm, {}))
        arms[arm] = {m: [e["arms"].get(arm, {}).get(m) for e in each] for m in metrics}
    return {
        "slug": slug,
        "number": system.number,
        "verdict": worst([o.verdict for o in judged]),
        "seeds": [job.seed for job in jobs],
        "full": all(job.full for job in jobs),
        "claims": [{"sentence": o.sentence, "verdict": o.verdict, "mean": json_number(o.mean),
                    "interval": [json_number(v) for v in o.interval], "slack": [json_number(v) for v in o.slack]}
                   for o in judged],
        "arms": arms,
        "crashed": {f"seed {job.seed}, {arm}": text for job, e in zip(jobs, each, strict=True)
                    for arm, text in e["crashed"].items()},
        "seconds": [round(e["seconds"], 1) for e in each],
        "versions": _versions(),
        "hash": jobs[0].hash,
    }


def work(jobs: Sequence[Job], workers: int, module: str = "stillhouse.verify") -> None:
    """Run every job that has no outcome yet in a worker process, `python -m module SLUG SEED FOLDER …`.

    Raises StillError where a worker failed as a whole; an interruption is passed on to the workers.
    """
    require(workers >= 1, f"workers must be 1 or more, not {workers}")
    waiting = [job for job in jobs if not job.outcome.is_file()]
    running: dict[subprocess.Popen[bytes], Job] = {}
    bar = tqdm(total=len(jobs), initial=len(jobs) - len(waiting), desc="seeds", disable=None)
    environment = {**os.environ, **THREADS}
    try:
        while waiting or running:
            while waiting and len(running) < workers:
                job = waiting.pop(0)
                job.folder.mkdir(parents=True, exist_ok=True)
                command = [sys.executable, "-m", module, job.slug, str(job.seed), str(job.folder), *job.words]
                with (job.folder / "output.txt").open("ab") as output:
                    child = subprocess.Popen([*command, *(["--full"] if job.full else [])], env=environment,
                                             stdout=output, stderr=output)
                running[child] = job
            time.sleep(0.1)
            for child in [c for c in running if c.poll() is not None]:
                job = running.pop(child)
                if child.returncode != 0 or not job.outcome.is_file():
                    tail = (job.folder / "output.txt").read_text(errors="replace").strip().splitlines()[-1:]
                    raise StillError(f"the worker for {job.slug}, seed {job.seed} stopped with exit status "
                                     f"{child.returncode}: {' '.join(tail)} (all of it in {job.folder}/output.txt)")
                bar.set_postfix_str(f"{job.slug} seed {job.seed}")
                bar.update()
    finally:
        for child in running:
            child.send_signal(signal.SIGINT)
        for child in running:
            child.wait()
        bar.close()


def run_seed(slug: str, seed: int, folder: Path, full: bool) -> dict[str, Any]:
    """Run the experiment of one system with one seed in `folder`, or continue it there; what its arms gave."""
    from stillhouse.run import Run

    module = catalog.load(slug)
    start = time.monotonic()
    options: dict[str, Any] = {"system": slug, "config": getattr(module, "EMBEDDED", None), "resume": None}
    with Run.open(folder, seed=seed, full=full, keep_going=True, quiet=True, **options) as run:
        arms = module.experiment(run)
    seconds = sum(run.seconds.values()) or time.monotonic() - start
    finite = {arm: {m: json_number(v) for m, v in metrics.items()} for arm, metrics in arms.items()}
    return {"arms": finite, "crashed": run.crashed, "seconds": seconds}


def keep_pictures(run: Path, out: Path) -> list[Path]:
    """Copy the pictures that the arms of a run drew into `out`, numbered and named by arm, in place of those there;
    at most `MOST_PICTURES`, none above `LARGEST` bytes."""
    drawn = sorted(run.glob("stages/**/pictures/*.png"), key=lambda p: p.stat().st_mtime_ns)
    found = [p for p in drawn if p.stat().st_size <= LARGEST][:MOST_PICTURES]
    shutil.rmtree(out, ignore_errors=True)
    kept = []
    for i, path in enumerate(found, 1):
        parts = [unquote(p).removeprefix("arm ") for p in path.relative_to(run / "stages").with_suffix("").parts]
        name = " - ".join(part for part in parts if part != "pictures").replace("/", "_")
        out.mkdir(parents=True, exist_ok=True)
        kept.append(Path(shutil.copyfile(path, out / f"{i} {name}.png")))
    return kept


def _keep(outcome: dict[str, Any], path: Path) -> bool:
    """Write an outcome, unless it would replace a larger one of the same source; whether it did."""
    runs = 0
    if path.is_file():
        old = json.loads(path.read_text(encoding="utf-8"))
        if old["hash"] == outcome["hash"] and (old["full"] > outcome["full"]
                                               or len(old["seeds"]) > len(outcome["seeds"])):
            print(f"{path} was left as it is: it holds more arms or seeds than this measurement", file=sys.stderr)
            return False
        same = old["hash"] == outcome["hash"] and old["arms"] == outcome["arms"]
        runs = old.get("runs", 1) - same
    write_text(path, json.dumps({**outcome, "runs": runs + 1}, indent=1, ensure_ascii=False) + "\n")
    return True


def _numbers(arms: dict[str, dict[str, float | None]]) -> dict[str, dict[str, float]]:
    return {arm: {m: math.nan if v is None else v for m, v in metrics.items()} for arm, metrics in arms.items()}


def json_number(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in VERSIONED:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def main() -> None:
    """A worker: `python -m stillhouse.verify SLUG SEED FOLDER [--full]`."""
    parser = argparse.ArgumentParser(prog="stillhouse.verify", description="run one seed of one experiment")
    parser.add_argument("slug")
    parser.add_argument("seed", type=int)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--full", action="store_true")
    given = parser.parse_args()
    import torch

    torch.set_num_threads(1)
    job = Job(given.slug, given.seed, given.full, given.folder)
    if job.seed < 0:
        raise ConfigError(f"a seed is 0 or more, not {job.seed}")
    write_text(job.outcome, json.dumps(run_seed(job.slug, job.seed, job.folder, job.full)))


if __name__ == "__main__":
    main()
