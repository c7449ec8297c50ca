"""Pairs of the same scene in two modalities or views: `image` for one model, `other` for another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from stillhouse.data.sets import TensorSet, fetch
from stillhouse.errors import DataError, require


class Paired:
    """Two sets of equal length and order as one: the fields of `first`, and the pictures of `second` as `other`."""

    def __init__(self, first: Any, second: Any):
        require(len(first) == len(second), f"pairs need two sets of equal length in equal order; got {len(first)} and "
                f"{len(second)}", DataError)
        self.first, self.second = first, second

    @property
    def fields(self) -> tuple[str, ...]:
        return (*self.first.fields, "other")

    def __len__(self) -> int:
        return len(self.first)

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        return {**self.first[index], "other": self.second[index]["image"]}


class SeenAs:
    """A set whose `image` is another of its fields, for those who only know pictures by that name."""

    def __init__(self, data: Any, field: str = "other"):
        self.source, self.field = data, field
        if isinstance(data, TensorSet):
            require(field in data.data, f"the data has no field '{field}' (it has {', '.join(data.fields)})", DataError)

    def __len__(self) -> int:
        return len(self.source)

    def batch(self, indices: Sequence[int] | Tensor) -> dict[str, Any]:
        """`index` and `image` at those positions."""
        found = fetch(self.source, torch.as_tensor(indices).tolist())
        require(self.field in found, f"the data has no field '{self.field}' (it has "
                f"{', '.join(n for n in found if n != 'index')})", DataError)
        return {"index": found["index"], "image": found[self.field]}

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        return {name: value[0] for name, value in self.batch([index]).items()}
