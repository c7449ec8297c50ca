"""Where rows come from: a JSONL, CSV or parquet file, a `datasets` table. Rows that are not fine say why."""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stillhouse import store
from stillhouse.errors import DataError, MissingExtraError, require

ENDINGS = (".jsonl", ".csv", ".tsv", ".parquet")
LONGEST = 1 << 30


@dataclass(frozen=True)
class Source:
    """Rows that can be read again and again.

    name: what error messages call it. folder: where paths in it lead from. columns: their names. bytes: on disk.
    read: gives (name of the row, the row, or why it cannot be read). digest: a hash of the content.
    table: a `datasets.Dataset` for random access where there is one. what: "lines" or "rows".
    """

    name: str
    folder: Path
    columns: tuple[str, ...]
    bytes: int
    read: Callable[[], Iterator[tuple[str, dict[str, Any] | str]]]
    digest: Callable[[], str]
    table: Any = None
    what: str = "rows"


def open_rows(path: Path) -> Source:
    """The rows of a file. Raises DataError for one without rows or damaged, MissingExtraError without `datasets`."""
    if path.suffix.lower() == ".parquet":
        return from_table(open_parquet([path]), path, path.parent)
    lines = path.suffix.lower() == ".jsonl"

    def read() -> Iterator[tuple[str, dict[str, Any] | str]]:
        return _json_lines(path) if lines else _csv_rows(path)

    first: str | None = None
    columns: tuple[str, ...] = ()
    for name, row in read():
        first = first or name
        if isinstance(row, dict):
            columns = tuple(row)
            break
    require(first is not None, f"{path} has no {'lines' if lines else 'rows'}", DataError)
    require(bool(columns), f"nothing in {path} can be read. {first}: {row if first else ''}", DataError)
    return Source(str(path), path.parent, columns, path.stat().st_size, read, lambda: file_digest([path]),
                  what="lines" if lines else "rows")


def from_table(table: Any, name: Path | str, folder: Path) -> Source:
    """The rows of a `datasets.Dataset`; pictures and sounds in it are not decoded. Raises DataError if it is empty."""
    import datasets

    require(len(table) > 0, f"{name} has no rows", DataError)
    table = table.with_format(None)
    for column, feature in table.features.items():
        if isinstance(feature, datasets.Image | datasets.Audio):
            table = table.cast_column(column, type(feature)(decode=False))

    def read() -> Iterator[tuple[str, dict[str, Any] | str]]:
        for number, row in enumerate(table):
            yield f"row {number}", row

    key = f"{table._fingerprint} {len(table)}".encode()
    sizes = [Path(file["filename"]).stat().st_size for file in table.cache_files] or [table.data.nbytes]
    return Source(str(name), folder, tuple(table.column_names), sum(sizes), read,
                  lambda: hashlib.blake2b(key, digest_size=8).hexdigest(), table)


def open_parquet(paths: Sequence[Path]) -> Any:
    """Parquet files as one `datasets.Dataset`, memory-mapped from a copy in the cache folder."""
    datasets = the_library()
    shown = datasets.is_progress_bar_enabled()
    try:
        datasets.disable_progress_bars()
        return datasets.Dataset.from_parquet([str(p.resolve()) for p in paths],
                                             cache_dir=str(store.cache_folder() / "tables"))
    except Exception as error:
        cause = error.__cause__ or error
        raise DataError(f"{paths[0]} is damaged or no parquet file: {type(cause).__name__}: {cause}") from error
    finally:
        if shown:
            datasets.enable_progress_bars()


def the_library() -> Any:
    """`datasets`. Raises MissingExtraError without it."""
    try:
        import datasets
    except ImportError as error:
        raise MissingExtraError("parquet files and data sets of the hub need datasets; install it with: pip install "
                                "'stillhouse[data]'") from error
    return datasets


def mapped_names(source: Source, columns: Mapping[str, str] | None) -> dict[str, str]:
    """Field name -> column, of all columns, with `columns` on top. Raises DataError for a column that is not there."""
    for column in (columns or {}).values():
        require(column in source.columns, f"there is no column '{column}' in {source.name}; there are "
                f"{', '.join(source.columns)}", DataError)
    return {**{column: column for column in source.columns}, **(columns or {})}


def file_digest(paths: Sequence[Path]) -> str:
    """blake2b of the names and bytes of files."""
    h = hashlib.blake2b(digest_size=8)
    for path in paths:
        h.update(path.name.encode())
        with path.open("rb") as file:
            while chunk := file.read(1 << 22):
                h.update(chunk)
    return h.hexdigest()


def _json_lines(path: Path) -> Iterator[tuple[str, dict[str, Any] | str]]:
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            if not raw.strip():
                continue
            try:
                row = json.loads(raw.decode("utf-8-sig" if number == 1 else "utf-8"))
            except ValueError as error:
                row = str(error)
                yield f"line {number}", row
                continue
            yield f"line {number}", row if isinstance(row, dict) else (
                f"a JSON object is expected, not {type(row).__name__}")


def _csv_rows(path: Path) -> Iterator[tuple[str, dict[str, Any] | str]]:
    csv.field_size_limit(LONGEST)
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        reader = csv.reader(file, delimiter="\t" if path.suffix.lower() == ".tsv" else ",")
        try:
            header = next(reader, [])
        except csv.Error as error:
            raise DataError(f"{path} is no CSV file: {error}") from error
        require(len(set(header)) == len(header), f"{path} has two columns of one name: {', '.join(header)}", DataError)
        while True:
            try:
                row = next(reader, None)
            except csv.Error as error:
                yield f"line {reader.line_num}", str(error)
                continue
            if row is None:
                return
            name = f"line {reader.line_num}"
            if not row:
                continue
            if len(row) != len(header):
                yield name, f"it has {len(row)} values for {len(header)} columns ({', '.join(header)})"
            elif not all(map(_encodable, row)):
                yield name, "it is no text in UTF-8"
            else:
                yield name, dict(zip(header, row, strict=True))


def _encodable(text: str) -> bool:
    try:
        text.encode()
        return True
    except UnicodeEncodeError:
        return False
