"""A first-in first-out memory of samples of any kind, to be used again."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from stillhouse.errors import DataError, require


class ReplayBuffer:
    """The last `capacity` samples pushed, the oldest evicted first; part of a stage's state.

    Samples are dicts of tensors. Those drawn together must have equal shapes, so push sequences padded to one width.
    A capacity of 0 keeps nothing.
    """

    def __init__(self, capacity: int):
        require(capacity >= 0, f"a replay buffer needs a capacity of 0 or more, not {capacity}")
        self.capacity = capacity
        self.items: deque[dict[str, Tensor]] = deque(maxlen=capacity)

    def __len__(self) -> int:
        return len(self.items)

    @property
    def full(self) -> bool:
        return len(self.items) == self.capacity

    def push(self, batch: Mapping[str, Tensor]) -> None:
        """Add the samples of a batch, first to last. Raises DataError if their fields are not those already held."""
        if self.items:
            held = set(self.items[0])
            require(held == set(batch), f"this buffer holds the fields {sorted(held)}, got {sorted(batch)}", DataError)
        for i in range(len(next(iter(batch.values())))):
            self.items.append({name: value[i].detach().cpu().clone() for name, value in batch.items()})

    def take(self, indices: Sequence[int] | Tensor) -> dict[str, Tensor]:
        """The samples at these places (0 is the oldest) as one batch. Raises DataError when the buffer is empty."""
        require(len(self.items) > 0, "nothing has been pushed into the replay buffer yet", DataError)
        chosen = [self.items[int(i)] for i in indices]
        return {name: torch.stack([item[name] for item in chosen]) for name in chosen[0]}

    def state_dict(self) -> dict[str, Any]:
        if not self.items:
            return {"items": {}}
        return {"items": {name: [item[name] for item in self.items] for name in self.items[0]}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        columns = state["items"]
        rows = zip(*columns.values(), strict=True) if columns else ()
        self.items = deque((dict(zip(columns, row, strict=True)) for row in rows), maxlen=self.capacity)
