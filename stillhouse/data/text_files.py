"""Texts from disk, as they are or as token ids; what is too large for memory is tokenised once into mapped files."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stillhouse import store
from stillhouse.data import arrays
from stillhouse.data.arrays import MappedSet
from stillhouse.data.broken import ReadSet, Summary, tolerate
from stillhouse.data.rows import Source, file_digest, mapped_names, open_rows
from stillhouse.data.sets import TensorSet
from stillhouse.data.text import pack_pairs, pack_plain, plain_ids, tokenised_targets, tokenised_texts
from stillhouse.errors import DataError, require
from stillhouse.protocols import LabelledTexts, SourceTargets, Texts, TokenPairs

TEXT_ROLES = (TokenPairs, Texts, LabelledTexts, SourceTargets)
FORMS: dict[Any, tuple[tuple[str, ...], ...]] = {
    None: (("prompt", "response"), ("source", "target"), ("text", "label"), ("text",)),
    TokenPairs: (("prompt", "response"), ("text",)),
    Texts: (("text",),),
    LabelledTexts: (("text", "label"),),
    SourceTargets: (("source", "target"),),
}
"""Which columns make the texts of a role: the first of these that are all there."""
CHUNK = 512


def text_form(role_kind: Any, names: Mapping[str, str]) -> tuple[str, ...] | None:
    """The fields of texts that a table gives to a role, None where it has no texts for it."""
    return next((form for form in FORMS.get(role_kind, ()) if set(form) <= set(names)), None)


def read_texts(source: Source, form: Sequence[str], names: Mapping[str, str], *, role_kind: Any = None,
               tokenizer: Any = None, length: int = 512, limit_broken: float = 0.0) -> Any:
    """The texts of a table: lists in memory, tokenised where a tokenizer is given; from more than
    `stillhouse.data.arrays.IN_MEMORY` bytes the tokens are kept in files of the cache folder and mapped.

    Raises DataError for rows without a text, more of them than `limit_broken`, and an empty table.
    """
    broken: dict[str, str] = {}
    if tokenizer is not None and source.bytes > arrays.IN_MEMORY:
        return _stored(source, form, names, role_kind, tokenizer, length, limit_broken)
    rows = list(_good(source, form, names, broken))
    found = Summary(len(rows) + len(broken), broken, f"{source.what} of {source.name}")
    _judge(found, form, limit_broken)
    fields: dict[str, Any] = {field: [row[i] for row in rows] for i, field in enumerate(form)}
    classes: tuple[str, ...] = ()
    if "label" in fields:
        fields["label"], classes = numbered(fields["label"], source.name)
        classes = classes or class_names(source, names["label"])
    data = ReadSet(found, **fields)
    data.classes = classes
    return data if tokenizer is None else tokenised(data, tokenizer, length, role_kind=role_kind)


def read_jsonl(path: Path | str, limit_broken: float = 0.0) -> TensorSet:
    """Lists `prompt` and `response`, `source` and `target`, or `text` (and `label`), from a file with one JSON object a
    line; empty lines are skipped.

    Raises DataError, with the line's number, for what is no JSON object, a missing or empty field, in more than
    `limit_broken` of the lines, and for a file without lines.
    """
    source = open_rows(Path(path).expanduser())
    names = mapped_names(source, None)
    return read_texts(source, text_form(None, names) or ("prompt", "response"), names, limit_broken=limit_broken)


def text_source(path: Path, lines: bool = False) -> Source:
    """Documents as rows with a `text`: a .txt file or the .txt files of a folder (searched to any depth), each one
    text, or with `lines` one text a line. Raises DataError where there are none."""
    paths = sorted(p for p in path.rglob("*.txt") if p.is_file()) if path.is_dir() else [path]
    require(bool(paths), f"{path} holds no .txt files", DataError)

    def read() -> Iterator[tuple[str, dict[str, Any] | str]]:
        for file in paths:
            name = str(file.relative_to(path)) if path.is_dir() else file.name
            if not lines:
                try:
                    yield name, {"text": file.read_text(encoding="utf-8-sig")}
                except (OSError, ValueError) as error:
                    yield name, f"{type(error).__name__}: {error}"
                continue
            with file.open("rb") as raw:
                for number, line in enumerate(raw, start=1):
                    try:
                        text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
                    except ValueError as error:
                        yield f"{name}, line {number}", str(error)
                        continue
                    if text:
                        yield f"{name}, line {number}", {"text": text}

    return Source(str(path), path, ("text",), sum(p.stat().st_size for p in paths), read,
                  lambda: f"{file_digest(paths)}-{lines}", what="lines" if lines else "texts")


def read_names(path: Path | str) -> TensorSet:
    """Class names from a text file, one a line in the order of the labels; empty lines are skipped.

    Raises DataError for a file without names.
    """
    path = Path(path).expanduser()
    try:
        names = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except ValueError as error:
        raise DataError(f"{path} is no text in UTF-8: {error}") from error
    require(bool(names), f"{path} holds no class names; write one a line", DataError)
    return TensorSet(name=names)


def tokenised(data: Any, tokenizer: Any, length: int = 512, prompt_length: int | None = None,
              role_kind: Any = None) -> TensorSet:
    """Texts as token ids for their role, by a `transformers` tokenizer: by default as TokenPairs.

    Prompt and response go into one sequence of at most `length` tokens, the prompt into at most `prompt_length` (half
    of them by default); plain `text` is joined and cut into windows of `length`. For Texts, LabelledTexts and
    SourceTargets every text becomes a row of its own.
    """
    form = next(form for form in (*FORMS.get(role_kind, ()), *FORMS[None]) if set(form) <= set(data.fields))
    packed = _packed([data.data[field] for field in form], form, tokenizer, length, role_kind, prompt_length)
    kept = ReadSet(data.summary() if hasattr(data, "summary") else None, **packed.data)
    kept.classes = getattr(data, "classes", ())
    return kept


def numbered(labels: Sequence[Any], name: str) -> tuple[Tensor, tuple[str, ...]]:
    """Labels as int64 [n]: whole numbers as they are, names as their place among the sorted names (the second result).

    Raises DataError for a mixture, and for numbers below 0.
    """
    try:
        whole = [int(label) for label in labels if not isinstance(label, bool) and float(label) == int(label)]
    except (TypeError, ValueError):
        whole = []
    if len(whole) == len(labels):
        require(min(whole) >= 0, f"{name} has negative labels; number the classes from 0, and leave unlabelled samples "
                "to a file of their own", DataError)
        return torch.tensor(whole), ()
    strange = next((label for label in labels if not isinstance(label, str | bool)), None)
    require(strange is None, f"the labels of {name} must be whole numbers or names, one has {strange!r}", DataError)
    classes = sorted({str(label) for label in labels})
    place = {label: i for i, label in enumerate(classes)}
    return torch.tensor([place[str(label)] for label in labels]), tuple(classes)


def class_names(source: Source, column: str) -> tuple[str, ...]:
    """The names that a `datasets` table gives to its labels."""
    feature = None if source.table is None else source.table.features.get(column)
    return tuple(getattr(feature, "names", None) or ())


def _good(source: Source, form: Sequence[str], names: Mapping[str, str],
          broken: dict[str, str]) -> Iterator[tuple[Any, ...]]:
    """The values of `form`, row by row; what cannot be used goes into `broken`."""
    for name, row in source.read():
        why = row if isinstance(row, str) else _why_not(row, form, names)
        if why:
            broken[name] = f"{name}: {why}"
        else:
            yield tuple(row[names[field]] for field in form)  # type: ignore[index]


def _why_not(row: Mapping[str, Any], form: Sequence[str], names: Mapping[str, str]) -> str | None:
    absent = [f for f in form if names.get(f, f) not in row]
    if absent:
        return f"'{', '.join(absent)}' is missing (there is {', '.join(row)})"
    empty = [f for f in form if f != "label" and not (isinstance(row[names[f]], str) and row[names[f]].strip())]
    if empty:
        return f"'{', '.join(empty)}' must be a text that is not empty"
    return "it has no label" if "label" in form and row[names["label"]] in (None, "", -1) else None


def _judge(found: Summary, form: Sequence[str], limit_broken: float) -> None:
    require(found.total > 0, f"the {found.what.replace(' of ', ' ', 1)} are none: it is empty", DataError)
    example = ", ".join(f'"{field}": "…"' for field in form)
    tolerate(found, limit_broken, f"A row has texts like {{{example}}}. Repair or delete them")
    require(found.read > 0, f"none of the {found.what} can be used", DataError)


def _packed(columns: Sequence[Any], form: Sequence[str], tokenizer: Any, length: int, role_kind: Any,
            prompt_length: int | None = None) -> TensorSet:
    if tuple(form) == ("prompt", "response"):
        return pack_pairs(list(zip(*columns, strict=True)), tokenizer, length, prompt_length or length // 2)
    if tuple(form) == ("source", "target"):
        return tokenised_targets(list(zip(*columns, strict=True)), tokenizer, length)
    if role_kind in (Texts, LabelledTexts):
        return tokenised_texts(columns[0], tokenizer, length, columns[1] if len(columns) > 1 else None)
    return pack_plain(columns[0], tokenizer, length)


# ---------------------------------------------------------------------------------- larger than memory


def _stored(source: Source, form: Sequence[str], names: Mapping[str, str], role_kind: Any, tokenizer: Any, length: int,
            limit_broken: float) -> MappedSet:
    """The tokens of a corpus from the files of an earlier reading, or read now: written aside, then renamed."""
    plain = tuple(form) == ("text",) and role_kind in (None, TokenPairs)
    key = store.digest_of(source.digest(), {f: names[f] for f in form}, plain, tokenizer_key(tokenizer), length,
                          length=16)
    where = store.cache_folder() / "texts" / key
    if not (where / "corpus.json").is_file():
        where.parent.mkdir(parents=True, exist_ok=True)
        aside = where.with_name(f".{key}.{os.getpid()}.tmp")
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir()
        try:
            _write(aside, source, form, names, role_kind, tokenizer, length, plain)
            if not where.exists():
                aside.rename(where)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    about = json.loads((where / "corpus.json").read_text(encoding="utf-8"))
    found = Summary(about["total"], about["broken"], f"{source.what} of {source.name}")
    _judge(found, form, limit_broken)
    fields = {name: torch.from_numpy(np.memmap(where / f"{name}.bin", np.dtype(kind), "c", shape=tuple(shape)))
              for name, (kind, shape) in about["fields"].items()}
    data = MappedSet(fields, dict.fromkeys(fields, Tensor.long), found)
    data.classes = tuple(about["classes"]) or (class_names(source, names["label"]) if "label" in form else ())
    return data


def _write(where: Path, source: Source, form: Sequence[str], names: Mapping[str, str], role_kind: Any, tokenizer: Any,
           length: int, plain: bool) -> None:
    """Append the packed rows to one file a field, and describe them in corpus.json, which comes last."""
    broken: dict[str, str] = {}
    labels: list[Any] = []
    read = done = 0
    rest: list[int] = []
    rows = _good(source, form, names, broken)
    fields: dict[str, tuple[str, list[int]]] = {}
    while chunk := list(islice(rows, CHUNK)):
        read += len(chunk)
        if plain:
            rest += [token for (text,) in chunk for token in plain_ids(text, tokenizer)]
            cut = len(rest) // length * length
            ids = torch.tensor(rest[:cut]).view(-1, length)
            rest = rest[cut:]
            packed = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "target_mask": torch.ones_like(ids)}
        else:
            texts = [field for field in form if field != "label"]
            columns = [[row[form.index(field)] for row in chunk] for field in texts]
            packed = _packed(columns, texts, tokenizer, length, role_kind).data
            labels += [row[form.index("label")] for row in chunk] if "label" in form else []
        pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        done += len(packed["input_ids"])
        for name, value in packed.items():
            kind = "int8" if name.endswith("_mask") else "int32"
            filler = {"input_ids": pad or 0, "target_ids": -100}.get(name, 0)
            wide = torch.nn.functional.pad(value, (0, length - value.shape[1]), value=filler)
            with (where / f"{name}.bin").open("ab") as file:
                file.write(wide.numpy().astype(kind).tobytes())
            fields[name] = kind, [done, length]
    require(read > 0, f"none of {source.name} can be used: {next(iter(broken.values()), 'it is empty')}", DataError)
    require(done > 0, f"{len(rest)} tokens of plain text do not fill one window of {length}", DataError)
    classes: tuple[str, ...] = ()
    if labels:
        numbers, classes = numbered(labels, source.name)
        (where / "label.bin").write_bytes(numbers.numpy().astype("int64").tobytes())
        fields["label"] = "int64", [done]
    store.write_text(where / "corpus.json", json.dumps(
        {"total": read + len(broken), "broken": broken, "fields": fields, "classes": classes}))


def tokenizer_key(tokenizer: Any) -> str:
    """A hash of what decides the tokens of a text."""
    fast = getattr(tokenizer, "backend_tokenizer", None)
    said: Any = sorted(tokenizer.get_vocab().items())
    if fast is not None:  # its truncation and padding are those of the last call
        said = sorted((k, v) for k, v in json.loads(fast.to_str()).items() if k not in ("truncation", "padding"))
    special = (type(tokenizer).__name__, tokenizer.eos_token_id, tokenizer.pad_token_id)
    return hashlib.blake2b(f"{special} {said}".encode(), digest_size=8).hexdigest()
