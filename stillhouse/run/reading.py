"""Batches as functions of the step number: which samples, in which order, read with which seeds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from stillhouse.data.sets import collate, fetch
from stillhouse.errors import ConfigError, DataError, require
from stillhouse.run import processes
from stillhouse.run.seeds import derive, preserved, reseed


@dataclass
class Order:
    """The samples of step k: epochs of a permutation that (seed, path, epoch) fixes, cut into batches.

    The last batch of an epoch is smaller unless `drop_last`. Every process takes its slice of the global batch.
    """

    n: int
    batch: int
    seed: int
    path: str
    drop_last: bool = False
    shuffle: bool = True
    _epoch: int = field(default=-1, repr=False)
    _indices: Tensor = field(default_factory=lambda: torch.empty(0), repr=False)

    def __post_init__(self) -> None:
        require(self.n > 0, f"the data of stage '{self.path}' is empty; give at least one sample", DataError)
        require(self.batch >= 1, f"batch must be at least 1, not {self.batch} (stage '{self.path}')")
        require(not (self.drop_last and self.n < self.batch),
                f"drop_last with {self.n} samples and a batch of {self.batch} leaves nothing; lower the batch",
                DataError)
        self.batch = min(self.batch, self.n)
        odd = self.n % self.batch
        smallest = odd if odd and not self.drop_last else self.batch
        require(smallest >= processes.size(),
                f"the smallest batch of stage '{self.path}' has {smallest} samples for {processes.size()} processes; "
                "use drop_last, another batch size or fewer processes")

    @property
    def per_epoch(self) -> int:
        return self.n // self.batch if self.drop_last else -(-self.n // self.batch)

    def samples(self, k: int) -> tuple[list[int], int]:
        """Indices of this process's part of batch k, and the size of the global batch."""
        epoch, position = divmod(k, self.per_epoch)
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(derive(self.seed, self.path, "order", epoch))
            self._indices = torch.randperm(self.n, generator=generator) if self.shuffle else torch.arange(self.n)
            self._epoch = epoch
        chosen = self._indices[position * self.batch : min((position + 1) * self.batch, self.n)]
        low, high = processes.bounds(len(chosen))
        return chosen[low:high].tolist(), len(chosen)


def read(data: Any, indices: list[int], *seed_parts: object, first: int = 0) -> dict[str, Any]:
    """One batch; a set read item by item sees seeds that depend on the item's place in the global batch alone."""
    if hasattr(data, "batch"):
        return fetch(data, indices)
    items = []
    with preserved():
        for place, index in enumerate(indices, start=first):
            reseed(derive(*seed_parts, "item", place))
            items.append({"index": index, **data[index]})
    return collate(items)


class _Requests(Dataset):
    """Turns a request (k, indices, first place) into a batch, inside a loader's worker."""

    def __init__(self, data: Any, seed: int, path: str):
        self.data, self.seed, self.path = data, seed, path

    def __getitem__(self, request: tuple[int, list[int], int]) -> dict[str, Any]:
        k, indices, first = request
        return read(self.data, indices, self.seed, self.path, k, first=first)


def batches(data: Any, order: Order, start: int, steps: int, workers: int) -> Iterator[tuple[dict[str, Any], int]]:
    """(this process's batch, size of the global batch) for the steps from `start` on."""

    def requests() -> Iterator[tuple[int, list[int], int]]:
        for k in range(start, steps):
            indices, total = order.samples(k)
            yield k, indices, processes.bounds(total)[0]

    if workers == 0:
        for k, indices, first in requests():
            yield read(data, indices, order.seed, order.path, k, first=first), order.samples(k)[1]
        return
    sampler: Any = requests()
    loader = DataLoader(_Requests(data, order.seed, order.path), batch_size=None, sampler=sampler, num_workers=workers,
                        generator=torch.Generator().manual_seed(0))
    for k, batch in enumerate(loader, start=start):
        yield batch, order.samples(k)[1]


def stream(data: Any, batch: int, start: int) -> Iterator[tuple[dict[str, Any], int]]:
    """Batches of a source that can only be iterated: process r takes every size-th item, from the beginning."""
    items: list[Mapping[str, Any]] = []
    size, rank = processes.size(), processes.rank()
    require(batch % size == 0, f"a streamed batch of {batch} cannot be split over {size} processes")
    position = start * batch
    while True:
        count = 0
        for place, item in enumerate(data):
            count += 1
            if place % size != rank:
                continue
            items.append({"index": position, **item})
            position += 1
            if len(items) == batch // size:
                yield collate(items), batch
                items = []
        if count == 0:
            raise DataError("the streamed data gave no sample")


def is_map_style(data: Any) -> bool:
    return hasattr(data, "__len__") and hasattr(data, "__getitem__")


def to_device(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=device.type != "cpu")  # towards the CPU it would be read too early
    if isinstance(value, dict):
        return {name: to_device(v, device) for name, v in value.items()}
    return value


def require_map_style(data: Any, what: str) -> None:
    if not is_map_style(data):
        raise ConfigError(f"{what} must be a map-style set (with len() and [index]), not {type(data).__name__}")
