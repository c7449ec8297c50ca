"""Things that take long to make and never change: built on first use, kept under the user's cache folder."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from filelock import FileLock

from stillhouse.errors import DamagedFileError, StoreError
from stillhouse.run.seeds import preserved
from stillhouse.store import cache_folder, digest_of, find_checked, load_checked, save_checked


def cached(name: str, recipe: dict[str, Any], build: Callable[[], Any]) -> Any:
    """The tree that `build()` returns, kept in a file whose name is the hash of `recipe`.

    `recipe` must say everything the result depends on (sizes, seeds, steps, a version for the code). Safe when
    several processes ask at once: one builds, the others wait. A damaged file is rebuilt, and said so.

    Raises StoreError where the cache folder cannot be written.
    """
    folder = cache_folder() / "zoo" / f"{name}-{digest_of(recipe)}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / "lock")
        lock.acquire()
    except OSError as error:
        raise StoreError(f"cannot use the cache folder {folder}: {error}; set STILLHOUSE_CACHE to a writable one"
                         ) from error
    try:
        for path in find_checked(folder, "entry"):
            try:
                return load_checked(path)
            except DamagedFileError as error:
                print(f"{error}; building {name} again", file=sys.stderr)
                path.unlink(missing_ok=True)
        with preserved():
            entry = build()
        return load_checked(save_checked(folder, "entry", entry))
    finally:
        lock.release()
