"""What a run keeps on disk: per stage its checkpoints, its final state and its log; per run its identity.

    run.json                          system, config, seed, fingerprints, versions
    stages/<stage>/step-…-<digest>.safetensors   the last two checkpoints of a stage in progress
    stages/<stage>/done-<digest>.safetensors     what a finished stage leaves
    stages/<stage>/log.jsonl          one line per logged step
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any
from urllib.parse import quote

from stillhouse.errors import DamagedFileError, ResumeError, StoreError
from stillhouse.store import find_checked, load_checked, save_checked, write_text

logger = logging.getLogger("stillhouse")
KEPT = 2


def place(folder: Path, path: Iterable[str]) -> Path:
    """The folder of a stage path; names are quoted, so none can leave `folder`."""
    where = folder / "stages"
    for name in path:
        where = where / (quote(name, safe=" ,=+()") if name not in (".", "..") else quote(name).replace(".", "%2E"))
    return where


class StageRecord:
    """The files of one stage."""

    def __init__(self, folder: Path):
        self.folder = folder

    def load_done(self, say: Callable[[str], None]) -> dict[str, Any] | None:
        return self._newest("done", say)

    def load_checkpoint(self, say: Callable[[str], None]) -> dict[str, Any] | None:
        return self._newest("step", say)

    def _newest(self, stem: str, say: Callable[[str], None]) -> dict[str, Any] | None:
        for path in reversed(find_checked(self.folder, stem)):
            try:
                return load_checked(path)
            except DamagedFileError as error:
                say(f"{error}; going back to the one before it, or to the start of the stage")
                path.unlink(missing_ok=True)
        return None

    def save_checkpoint(self, k: int, tree: dict[str, Any]) -> None:
        save_checked(self.folder, f"step-{k:012d}", tree)
        for old in find_checked(self.folder, "step")[:-KEPT]:
            old.unlink(missing_ok=True)

    def save_done(self, tree: dict[str, Any]) -> None:
        new = save_checked(self.folder, "done", tree)
        for old in [*find_checked(self.folder, "done"), *find_checked(self.folder, "step")]:
            if old != new:
                old.unlink(missing_ok=True)

    def drop(self, say: Callable[[str], None], names: Iterable[str]) -> None:
        """Leave some held objects out of the final state, once nothing later can need them."""
        tree = self.load_done(say)
        if tree is not None:
            tree["held"] = {n: v for n, v in tree["held"].items() if n not in set(names)}
            self.save_done(tree)

    @property
    def log(self) -> Path:
        return self.folder / "log.jsonl"

    def append(self, lines: list[dict[str, Any]]) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with self.log.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(line) + "\n" for line in lines)
        except OSError as error:
            raise StoreError(f"cannot write the log {self.log}: {error}") from error

    def log_length(self) -> int:
        return self.log.stat().st_size if self.log.exists() else 0

    def cut_log(self, length: int) -> None:
        if self.log_length() > length:
            with self.log.open("rb+") as file:
                file.truncate(length)


def identify(folder: Path, identity: dict[str, Any], resume: bool | None) -> None:
    """Write or compare `run.json`.

    `resume` True expects a run there, False expects none, None takes what there is. Raises ResumeError naming the
    first thing that differs.
    """
    path = folder / "run.json"
    identity = json.loads(json.dumps(identity))
    if not path.exists():
        if resume:
            raise ResumeError(f"there is no run in {folder} to resume (no run.json); give the folder of an earlier run")
        write_text(path, json.dumps(identity, indent=1))
        return
    if resume is False:
        raise ResumeError(f"{folder} already holds a run; continue it with --resume {folder}, or choose another --out")
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ResumeError(f"{path} is damaged ({error}); start a new run in another folder") from error
    for name in ("system", "config", "seed", "fingerprint", "precision"):
        was, now = saved.get(name), identity.get(name)
        if was == now:
            continue
        if isinstance(was, dict) and isinstance(now, dict):
            part = next(k for k in {**was, **now} if was.get(k) != now.get(k))
            name, was, now = f"{name}.{part}", was.get(part), now.get(part)
        raise ResumeError(f"the run in {folder} cannot be resumed: {name} was {was!r} and is now {now!r}. Give the "
                          "same as before, or start a new run in another folder.")
