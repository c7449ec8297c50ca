"""Map-style sets of dicts held in memory, and the small operations on them that every system needs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from stillhouse.errors import DataError, require


class TensorSet:
    """A data set whose fields are tensors (or lists) of equal length; items are dicts with `index`.

    `batch(indices)` returns a collated dict at once, without visiting items one by one; `run.loop` uses it.
    """

    def __init__(self, **fields: Tensor | list):
        require(bool(fields), "a TensorSet needs at least one field, e.g. image=…", DataError)
        lengths = {name: len(value) for name, value in fields.items()}
        require(len(set(lengths.values())) == 1, f"fields of unequal length: {lengths}", DataError)
        self.data: dict[str, Any] = dict(fields)
        self.length = next(iter(lengths.values()))

    @property
    def fields(self) -> tuple[str, ...]:
        return tuple(self.data)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not -self.length <= index < self.length:
            raise IndexError(index)
        return {"index": index % self.length, **{name: value[index] for name, value in self.data.items()}}

    def __getattr__(self, name: str) -> Any:
        if name != "data" and name in self.__dict__.get("data", {}):
            return self.data[name]
        raise AttributeError(f"this set has no field '{name}' (it has {', '.join(self.__dict__.get('data', {}))})")

    def batch(self, indices: Sequence[int] | Tensor) -> dict[str, Any]:
        where = torch.as_tensor(indices)
        chosen = where.tolist() if any(isinstance(v, list) for v in self.data.values()) else []
        fields = {n: [v[i] for i in chosen] if isinstance(v, list) else v[where] for n, v in self.data.items()}
        return {"index": where, **fields}

    def select(self, indices: Sequence[int] | Tensor) -> TensorSet:
        """The subset at `indices`, in that order."""
        where = torch.as_tensor(indices, dtype=torch.long)
        chosen = where.tolist()
        return TensorSet(**{n: [v[i] for i in chosen] if isinstance(v, list) else v[where]
                            for n, v in self.data.items()})

    def without(self, *names: str) -> TensorSet:
        """The same set with some fields left out, e.g. `labelled.without("label")`."""
        return TensorSet(**{name: value for name, value in self.data.items() if name not in names})

    def with_fields(self, **fields: Tensor | list) -> TensorSet:
        """The same set with fields added or replaced."""
        return TensorSet(**{**self.data, **fields})


def collate(items: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Stack a list of items into one batch: tensors and numbers become tensors, the rest stays a list."""
    batch: dict[str, Any] = {}
    for name in items[0]:
        values = [item[name] for item in items]
        first = values[0]
        if isinstance(first, Tensor):
            shapes = {tuple(v.shape) for v in values}
            require(len(shapes) == 1, f"field '{name}' has items of different shapes in one batch: {sorted(shapes)}; "
                    "resize or pad them in the data set", DataError)
            batch[name] = torch.stack(values)
        elif isinstance(first, bool | int | float):
            batch[name] = torch.tensor(values)
        else:
            batch[name] = values
    return batch


def fetch(data: Any, indices: Sequence[int]) -> dict[str, Any]:
    """One collated batch of `data`, with `index`, through `data.batch` where the set offers it."""
    if hasattr(data, "batch"):
        return data.batch(indices)
    return collate([{"index": i, **data[i]} for i in indices])


def column(data: Any, name: str) -> Tensor:
    """One field of every item of a set, stacked, through `data.column` where the set offers it (without decoding
    pictures). Raises DataError for a field that is not there."""
    if hasattr(data, "column"):
        return data.column(name)
    if isinstance(data, TensorSet):
        require(name in data.data, f"the data has no field '{name}' (it has {', '.join(data.fields)})", DataError)
        return data.data[name]
    return collate([{name: data[i][name]} for i in range(len(data))])[name]


def concatenate(*sets: Any) -> TensorSet:
    """One TensorSet with the items of several, over the fields they all have."""
    require(bool(sets), "nothing to concatenate", DataError)
    whole = [s if isinstance(s, TensorSet) else as_tensor_set(s) for s in sets]
    names = [name for name in whole[0].data if all(name in s.data for s in whole)]
    require(bool(names), f"the sets share no field: {[s.fields for s in whole]}", DataError)
    joined: dict[str, Any] = {}
    for name in names:
        values = [s.data[name] for s in whole]
        joined[name] = torch.cat(values) if isinstance(values[0], Tensor) else [v for part in values for v in part]
    return TensorSet(**joined)


def subset(data: Any, indices: Sequence[int] | Tensor) -> Any:
    """The items of any map-style set at `indices`, in that order; `index` stays the position in the whole set where
    the items are read one by one."""
    if hasattr(data, "select"):
        return data.select(indices)
    return torch.utils.data.Subset(data, torch.as_tensor(indices).tolist())


def as_tensor_set(data: Any) -> TensorSet:
    """Read every item of a map-style set into memory."""
    if isinstance(data, TensorSet):
        return data
    require(len(data) > 0, "the data set is empty", DataError)
    whole = fetch(data, range(len(data)))
    whole.pop("index", None)
    return TensorSet(**whole)
