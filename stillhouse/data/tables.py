"""Rows of a table as a set of pictures, sounds, samples or tokens, decoded when they are asked for."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stillhouse import store
from stillhouse.data.arrays import field_values
from stillhouse.data.audio import fitted, read_sound, resampled
from stillhouse.data.broken import ReadSet, Summary, tolerate
from stillhouse.data.pictures import Header, coloured, decode, header, resized
from stillhouse.data.rows import Source, mapped_names
from stillhouse.data.sets import collate
from stillhouse.data.text_files import FORMS as TEXT_FORMS
from stillhouse.data.text_files import class_names, numbered, read_texts, text_form
from stillhouse.errors import DataError, StoreError, require
from stillhouse.protocols import (
    AnyImages,
    ClassNames,
    Conditions,
    DomainImages,
    Images,
    LabelledImages,
    LabelledTexts,
    Samples,
    SourceTargets,
    SpeechData,
    Texts,
    TokenPairs,
)

IMAGE = (("image",),)
FORMS: dict[Any, tuple[tuple[str, ...], ...]] = {
    Images: IMAGE,
    AnyImages: IMAGE,
    LabelledImages: (("image", "label"),),
    DomainImages: (("image", "domain"), ("image", "label")),
    Samples: (("x",), ("image",)),
    Conditions: (("condition",), ("label",)),
    SpeechData: (("audio",),),
    TokenPairs: (("input_ids",),),
    Texts: (("input_ids",),),
    LabelledTexts: (("input_ids", "label"),),
    SourceTargets: (("input_ids", "target_ids"),),
    ClassNames: (("name",), ("label",)),
    None: (("image",), ("audio",), ("x",), ("input_ids",), ("condition",), ("name",)),
}
"""Which columns make a data set of each role: the first of these that are all there."""
EXTRA = {"image": ("label", "domain", "other"), "audio": ("label",), "x": ("condition", "label"),
         "input_ids": ("attention_mask", "target_mask", "target_ids", "label")}
WHOLE = ("label", "domain")
PADS = {"input_ids": 0, "attention_mask": 0, "target_mask": 0, "target_ids": -100}


def read_table(source: Source, role_kind: Any = None, *, columns: Mapping[str, str] | None = None,
               size: int | None = None, channels: int | None = None, rate: int | None = None, tokenizer: Any = None,
               length: int = 512, limit_broken: float = 0.0, verify: int = 2000) -> Any:
    """What the columns of a table give to a role: texts (see `read_texts`), or a `TableSet`.

    `columns` says in which column a field is, where their names differ. `verify` rows are decoded before any work.
    Raises DataError for a column that is not there, broken rows above the limit, and pictures or sounds of several
    sizes without `size`.
    """
    names = mapped_names(source, columns)
    form = next((form for form in FORMS.get(role_kind, FORMS[None]) if set(form) <= set(names)), None)
    texts = text_form(role_kind, names)
    if form is None and texts is not None:
        return read_texts(source, texts, names, role_kind=role_kind, tokenizer=tokenizer, length=length,
                          limit_broken=limit_broken)
    if form is None:
        wanted = (*FORMS.get(role_kind, FORMS[None]), *TEXT_FORMS.get(role_kind, ()))
        role = "" if role_kind is None else f", which its role ({role_kind.__name__}) needs"
        missing = next((f for f in wanted[0] if f not in names), wanted[0][0])
        example = next((c for c in source.columns), "…")
        raise DataError(f"{source.name} has no column '{missing}'{role}; there are {', '.join(source.columns)}. "
                        f"Say which it is, e.g. --columns {missing}={example}. Understood are "
                        f"{' or '.join(' and '.join(form) for form in wanted)}")
    if form == ("name",):
        return _names(source, names["name"])
    extra = [f for f in EXTRA.get(form[0], ()) if f in names and f not in form]
    fields = {field: names[field] for field in (*form, *extra)}
    broken: dict[str, str] = {}
    if source.table is None:
        taken = set(fields.values())
        called = [(name, {c: v for c, v in row.items() if c in taken}) for name, row in _whole(source, broken)]
        rows: Any = [row for _, row in called]
    else:
        rows = source.table.select_columns(sorted(set(fields.values())))
    data = TableSet(rows, fields, source, size=size, channels=channels, rate=rate, length=length,
                    limit_broken=limit_broken, needed=form, broken=broken,
                    called=None if source.table is not None else [name for name, _ in called])
    data.verify(verify)
    return data


class TableSet:
    """Rows of a table, decoded one by one: the same index always gives the same item.

    A row that turns out to be unreadable is replaced by the next readable one (of its class, where there are labels),
    with a warning, as long as no more than `limit_broken` of all are. A path to a picture or sound must lie in the
    folder of the table. `classes` are the names of the labels, where they have names.
    """

    def __init__(self, rows: Any, fields: Mapping[str, str], source: Source, *, size: int | None = None,
                 channels: int | None = None, rate: int | None = None, length: int = 512, limit_broken: float = 0.0,
                 needed: Sequence[str] = (), broken: dict[str, str] | None = None,
                 called: Sequence[str] | None = None):
        self.rows, self.called, self.source, self.limit_broken = rows, called, source, limit_broken
        self.columns = dict(fields)
        self.names = {field: field for field in fields}
        self.size, self.channels, self.rate, self.length = size, channels, rate, length
        self.broken = dict(broken or {})
        self.total = len(rows) + len(self.broken)
        self.kept = torch.arange(len(rows))
        self.bad: set[int] = set()
        self.whole: dict[str, Tensor] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.classes: tuple[str, ...] = ()
        for field in [f for f in WHOLE if f in fields]:
            self._read_labels(field, field in needed)
        self.width = {f: min(length, self._longest(f)) for f in ("input_ids", "target_ids") if f in fields}
        self.made = tuple(m for m in ("attention_mask", "target_mask") if "input_ids" in fields and m not in fields)

    @property
    def fields(self) -> tuple[str, ...]:
        return (*self.names.values(), *self.made)

    def __len__(self) -> int:
        return len(self.kept)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        index %= len(self)
        for place in self._in_turn(index):
            number = int(self.kept[place])
            if number in self.bad:
                continue
            try:
                return {"index": index, **self._item(number)}
            except DataError as error:
                self._leave_out(number, str(error))
                tolerate(self.summary(), self.limit_broken)
        raise DataError(f"no readable row is left to stand in for row {index} of {self.source.name}")

    def batch(self, indices: Sequence[int] | Tensor) -> dict[str, Any]:
        """Some items, collated."""
        return collate([self[int(i)] for i in indices])

    def column(self, name: str) -> Tensor:
        """One field of every row; labels are not decoded again."""
        own = next((own for own, field in self.names.items() if field == name), None)
        require(own is not None, f"the data has no field '{name}' (it has {', '.join(self.fields)})", DataError)
        if own in self.whole:
            return self.whole[own][self.kept]
        return collate([{name: self[i][name]} for i in range(len(self))])[name]

    def renamed(self, names: Mapping[str, str]) -> TableSet:
        """This set, its fields called otherwise."""
        self.names = {own: names.get(field, field) for own, field in self.names.items()}
        return self

    def without(self, *fields: str) -> TableSet:
        """This set without some fields."""
        self.names = {own: field for own, field in self.names.items() if field not in fields}
        return self

    def summary(self) -> Summary:
        """How many rows there were, and which are left out, and why."""
        return Summary(self.total, self.broken, f"{self.source.what} of {self.source.name}")

    def verify(self, most: int) -> None:
        """Decode up to `most` rows, spread evenly, and leave out what is broken. Raises DataError as `read_table`."""
        step = max(1, -(-len(self.kept) // most)) if most else 1
        chosen = self.kept[::step].tolist() if most else []
        if self.channels is None and "image" in self.names:
            self.channels = 3 if any(self._has_colour(number) for number in chosen or [0]) else 1
        seen: dict[str, set[tuple[int, ...]]] = {}
        for number in chosen:
            try:
                item = self._item(number)
            except DataError as error:
                self._leave_out(number, str(error))
                continue
            for name, value in item.items():
                if isinstance(value, Tensor):
                    seen.setdefault(name, set()).add(tuple(value.shape))
        tolerate(self.summary(), self.limit_broken)
        self.kept = torch.tensor([n for n in self.kept.tolist() if n not in self.bad], dtype=torch.long)
        require(len(self.kept) > 0, f"no row of {self.source.name} can be read", DataError)
        for name, shapes in seen.items():
            if len(shapes) > 1:
                raise DataError(self._sizes(name, shapes))
            self.shapes[name] = next(iter(shapes))

    def _sizes(self, name: str, shapes: set[tuple[int, ...]]) -> str:
        some = ", ".join("x".join(map(str, s)) for s in sorted(shapes)[:3])
        return (f"'{name}' of {self.source.name} has items of {len(shapes)} different sizes ({some}"
                f"{', …' if len(shapes) > 3 else ''}); give the one to bring them to: --size (size=…)")

    def _item(self, number: int) -> dict[str, Any]:
        row = None
        item: dict[str, Any] = {}
        for own, name in self.names.items():
            if own in self.whole:
                item[name] = int(self.whole[own][number])
                continue
            row = self.rows[number] if row is None else row
            where = f"{self._called(number)} of {self.source.name}"
            require(self.columns[own] in row, f"{where}: '{self.columns[own]}' is missing (there is {', '.join(row)})",
                    DataError)
            value = row[self.columns[own]]
            require(value is not None and value != "", f"{where}: '{self.columns[own]}' is empty", DataError)
            item[name] = self._cell(own, value, where)
            shape = tuple(getattr(item[name], "shape", ()))
            usual = self.shapes.get(name, shape)
            require(shape == usual, f"{where}: {self._sizes(name, {shape, usual})}", DataError)
        if self.made and row is not None:
            real = (torch.arange(self.width["input_ids"]) < len(row[self.columns["input_ids"]])).long()
            item |= dict.fromkeys(self.made, real)
        return item

    def _cell(self, own: str, value: Any, where: str) -> Any:
        if own in ("image", "other"):
            return self._picture(value, where)
        if own == "audio":
            sound = self._sound(value, where)
            return sound if self.size is None else fitted(sound, self.size)
        numbers = _numbers(value, where, own)
        if own in PADS:
            width = self.width["target_ids" if own == "target_ids" else "input_ids"]
            row = numbers.long()[:width]
            require(row.dim() == 1 and len(row) > 0, f"{where}: '{own}' must be a list of whole numbers", DataError)
            return torch.nn.functional.pad(row, (0, width - len(row)), value=PADS[own])
        if own == "condition" and numbers.dim() == 0 and not numbers.is_floating_point():
            return int(numbers)
        return numbers.float()

    def _picture(self, value: Any, where: str) -> Tensor:
        data, path = self._file(value, where)
        if data is not None or path is not None:
            return decode(path or where, self.size, self.channels or 3, data)
        numbers = _numbers(value, where, "image")
        if not numbers.is_floating_point():
            require(int(numbers.min()) >= 0 and int(numbers.max()) <= 255, f"{where}: whole numbers of a picture are 0 "
                    "to 255", DataError)
            numbers = numbers.to(torch.uint8)
        picture = field_values(numbers[None], "image", Path(where))
        return coloured(resized(picture, self.size), self.channels, where)[0]

    def _sound(self, value: Any, where: str) -> Tensor:
        data, path = self._file(value, where)
        if data is not None or path is not None:
            return resampled(*read_sound(path or where, data), self.rate)
        if isinstance(value, dict):
            return resampled(_numbers(value.get("array"), where, "audio").float(),
                             int(value.get("sampling_rate") or self.rate or 0), self.rate)
        return _numbers(value, where, "audio").float()

    def _file(self, value: Any, where: str) -> tuple[bytes | None, Path | None]:
        """The bytes of a picture or sound, or the path of its file; two None where the value is neither."""
        data = value.get("bytes") if isinstance(value, dict) else value
        if isinstance(data, bytes | bytearray):
            return bytes(data), None
        name = value.get("path") if isinstance(value, dict) else value
        if not isinstance(name, str):
            return None, None
        try:
            path = store.inside(self.source.folder, name)
        except StoreError as error:
            raise DataError(f"{where}: {error}; paths in a table lead to files beside it") from error
        require(path.is_file(), f"{where}: there is no file {path}", DataError)
        return None, path

    def _has_colour(self, number: int) -> bool:
        try:
            value = self.rows[number][self.columns["image"]]
            data, path = self._file(value, "")
            if data is None and path is None:
                shape = np.shape(value)
                return len(shape) == 3 and 3 in (shape[0], shape[-1])
            found = header(path or "", data)
            return isinstance(found, Header) and found.colour
        except (DataError, KeyError, TypeError, ValueError):
            return False

    def _read_labels(self, field: str, needed: bool) -> None:
        """The labels of all rows at once. Rows without one are broken where labels are needed; else none is kept."""
        column = self.columns[field]
        values = [v for part in _parts(self.rows, column) for v in part]
        absent = [i for i, v in enumerate(values) if v in (None, "", -1)]
        if absent and not needed:
            self.names.pop(field)
            return
        require(len(absent) < len(values), f"no row of {self.source.name} has a label in '{column}'", DataError)
        for number in absent:
            self._leave_out(number, f"{self._called(number)}: it has no label")
        filler = next(v for v in values if v not in (None, "", -1))
        numbers, classes = numbered([filler if v in (None, "", -1) else v for v in values], self.source.name)
        self.whole[field] = numbers
        if field == "label" or not self.classes:
            self.classes = classes or class_names(self.source, column)

    def _longest(self, field: str) -> int:
        longest = max((len(v) for part in _parts(self.rows, self.columns[field]) for v in part if isinstance(v, list)),
                      default=0)
        require(longest > 0, f"'{self.columns[field]}' of {self.source.name} holds no lists of token ids", DataError)
        return longest

    def _leave_out(self, number: int, why: str) -> None:
        self.bad.add(number)
        self.broken[self._called(number)] = why

    def _called(self, number: int) -> str:
        return f"row {number}" if self.called is None else self.called[number]

    def _in_turn(self, index: int) -> Iterator[int]:
        """`index`, then those after it that have the same label, around the end."""
        labels = self.whole.get("label", self.whole.get("domain"))
        own = None if labels is None else labels[self.kept[index]]
        for place in range(index, index + len(self)):
            place %= len(self)
            if labels is None or labels[self.kept[place]] == own:
                yield place


def _whole(source: Source, broken: dict[str, str]) -> Iterator[tuple[str, dict[str, Any]]]:
    for name, row in source.read():
        if isinstance(row, str):
            broken[name] = f"{name}: {row}"
        else:
            yield name, row


def _parts(rows: Any, column: str) -> Iterator[list[Any]]:
    """The values of one column, part by part."""
    if isinstance(rows, list):
        yield [row.get(column) for row in rows]
        return
    for part in rows.select_columns([column]).with_format("arrow").iter(4096):
        yield part[column].to_pylist()


def _numbers(value: Any, where: str, field: str) -> Tensor:
    try:
        numbers = torch.from_numpy(np.asarray(json.loads(value) if isinstance(value, str) else value))
    except (TypeError, ValueError) as error:
        raise DataError(f"{where}: '{field}' must be numbers (or a file), not {type(value).__name__}") from error
    require(numbers.numel() > 0, f"{where}: '{field}' is empty", DataError)
    if numbers.is_floating_point():
        require(bool(torch.isfinite(numbers.float()).all()), f"{where}: '{field}' has NaN or infinite values",
                DataError)
    return numbers


def _names(source: Source, column: str) -> ReadSet:
    names = [row[column] for _, row in source.read() if isinstance(row, dict) and row.get(column)]
    require(bool(names) and all(isinstance(n, str) for n in names), f"'{column}' of {source.name} holds no names",
            DataError)
    return ReadSet(name=names)
