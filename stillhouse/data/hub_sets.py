"""Data sets of `datasets`: folders that it saved, folders of parquet files, and names of the hub in the local cache."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from stillhouse.data.embedded import parse_options
from stillhouse.data.rows import Source, from_table, open_parquet, the_library
from stillhouse.errors import DataError, UnknownNameError, require

SPLIT = re.compile(r"(.+?)-\d{5}-of-\d{5}$")
USUAL = ("train", "test", "validation", "valid", "val", "dev", "unlabelled", "unsupervised")


def open_hub_set(text: str) -> Source:
    """The rows of `hf:NAME_OR_FOLDER[:split=…,config=…]`; nothing is downloaded and no code of a data set is run.

    A folder was written by `save_to_disk`, or holds parquet files, those of a `config` in a subfolder of that name. Of
    several splits "train" is read unless another is named. Raises UnknownNameError for what is not there, DataError
    for a script or a damaged folder, MissingExtraError without `datasets`.
    """
    name, _, rest = text.removeprefix("hf:").partition(":")
    options = parse_options(rest, "split") if rest else {}
    unknown = set(options) - {"split", "config"}
    require(not unknown, f"a data set of hf: has no option '{next(iter(unknown), '')}'; it has split, config",
            UnknownNameError)
    folder = Path(name).expanduser()
    datasets = the_library()
    if not folder.exists():
        folder = _cached(name)
    require(folder.is_dir(), f"{folder} is no folder; give it without hf: if it is a file", DataError)
    split = None if options.get("split") is None else str(options["split"])
    if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
        require("config" not in options, f"{folder} was written by save_to_disk and has no configs", UnknownNameError)
        table = _saved(datasets, folder, split)
    else:
        table = _parquet(folder, split, options.get("config"))
    return from_table(table, text, folder)


def _cached(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    bring = f"hf download {name} --repo-type dataset --local-dir {Path(name).name}"
    try:
        return Path(snapshot_download(name, repo_type="dataset", local_files_only=True))
    except (OSError, ValueError, HFValidationError) as error:
        raise UnknownNameError(f"there is no folder {name} (seen from {Path.cwd()}), and no data set of that name in "
                               "the cache of the hub; nothing is downloaded here. Bring it where there is internet: "
                               f"{bring}, then give hf:{Path(name).name}") from error


def _saved(datasets: Any, folder: Path, split: str | None) -> Any:
    try:
        found = datasets.load_from_disk(str(folder))
    except Exception as error:
        raise DataError(f"{folder} is damaged or only partly there: {type(error).__name__}: {error}") from error
    if not isinstance(found, dict):
        own = str(found.split) if found.split is not None else None
        require(split is None or split == own, f"{folder} holds one split{f', {own}' if own else ''}, not '{split}'",
                UnknownNameError)
        return found
    return found[_chosen(list(found), split, folder)]


def _parquet(folder: Path, split: str | None, config: Any) -> Any:
    root = folder if config is None else folder / str(config)
    paths = sorted(p for p in root.rglob("*.parquet") if p.is_file())
    if not paths:
        scripts = sorted(p.name for p in folder.glob("*.py"))
        require(not scripts, f"{folder} is a script ({', '.join(scripts)}): it would run code of its own, which is "
                "refused. Load it once where you trust it and write it with save_to_disk(folder)", DataError)
        inner = ", ".join(sorted(p.name for p in folder.iterdir() if p.is_dir())) or "none"
        raise DataError(f"there are no parquet files in {root}, and it was not written by save_to_disk; its folders "
                        f"are: {inner}")
    outside = [p for p in paths if not _within(p, folder)]
    require(not outside, f"{(outside or [root])[0]} leads outside of its folder", DataError)
    groups: dict[str, list[Path]] = {}
    for path in paths:
        groups.setdefault(_split_of(path), []).append(path)
    if not any(name in USUAL for name in groups):
        groups = {"train": paths}
    return open_parquet(groups[_chosen(list(groups), split, root)])


def _within(path: Path, folder: Path) -> bool:
    """Whether a file lies in a folder; one in the cache of the hub is a link to its store of files."""
    real = path.resolve()
    home = folder.resolve()
    return real.is_relative_to(home) or (home.parent.name == "snapshots" and real.is_relative_to(home.parent.parent))


def _split_of(path: Path) -> str:
    found = SPLIT.match(path.stem)
    name = found[1] if found else path.stem
    return path.parent.name if name not in USUAL and path.parent.name in USUAL else name


def _chosen(splits: list[str], split: str | None, folder: Path) -> str:
    if split is None:
        split = splits[0] if len(splits) == 1 else "train"
    require(split in splits, f"{folder} has no split '{split}'; it has {', '.join(splits)} (hf:…:split={splits[0]})",
            UnknownNameError)
    return split
