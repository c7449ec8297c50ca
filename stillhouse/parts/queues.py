"""A first-in first-out memory of keys."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from stillhouse.errors import DataError, require


class Queue(nn.Module):
    """The last `size` keys pushed (MoCo, He et al. 2020, algorithm 1), oldest overwritten first; part of the state.

    `queue()` returns only what has been pushed, so there are no invented negatives at the start. Push keys of the whole
    batch (`run.gather`). A push larger than the queue keeps its last `size` rows.
    """

    keys: Tensor
    pushed: Tensor

    def __init__(self, size: int, features: int):
        super().__init__()
        require(size >= 1 and features >= 1, f"a queue needs size and features of at least 1; got {size}, {features}")
        self.register_buffer("keys", torch.zeros(size, features))
        self.register_buffer("pushed", torch.zeros((), dtype=torch.long))

    @torch.no_grad()
    def push(self, keys: Float[Tensor, "n features"]) -> None:
        require(keys.dim() == 2 and keys.shape[1] == self.keys.shape[1],
                f"this queue holds rows of {self.keys.shape[1]} features; got {tuple(keys.shape)}", DataError)
        size = len(self.keys)
        start = int(self.pushed) + max(len(keys) - size, 0)
        kept = keys.detach()[-size:].to(self.keys)
        where = (start + torch.arange(len(kept), device=self.keys.device)) % size
        self.keys[where] = kept
        self.pushed += len(keys)

    def forward(self) -> Float[Tensor, "filled features"]:
        """A copy of the keys so far, in no particular order."""
        return self.keys[: min(int(self.pushed), len(self.keys))].clone()
