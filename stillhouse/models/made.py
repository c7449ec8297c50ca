"""A masked autoencoder: an autoregressive model of grey levels, pixel after pixel (Germain et al. 2015, 1502.03509)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from stillhouse.errors import require


class MADE(nn.Module):
    """p(x) = product of p(x_i | x_1 .. x_{i-1}) of whole grey levels [batch, entries], by one masked hidden layer."""

    inner: Tensor
    outer: Tensor

    def __init__(self, entries: int, levels: int, width: int = 512):
        super().__init__()
        require(entries >= 2 and levels >= 2 and width >= 1, "entries and levels must be 2 or more, width 1 or more; "
                f"got {entries}, {levels} and {width}")
        self.entries, self.levels = entries, levels
        self.enter, self.leave = nn.Linear(entries, width), nn.Linear(width, entries * levels)
        degree, place = torch.arange(width) % (entries - 1), torch.arange(entries)
        self.register_buffer("inner", (degree[:, None] >= place).float())
        self.register_buffer("outer", (place[:, None] > degree).float().repeat_interleave(levels, 0))

    def forward(self, grey: Float[Tensor, "batch entries"]) -> Float[Tensor, "batch entries levels"]:
        """Logits of every entry's level, given those before it."""
        x = grey / (self.levels - 1) * 2 - 1
        h = F.linear(x, self.enter.weight * self.inner, self.enter.bias).relu()
        return F.linear(h, self.leave.weight * self.outer, self.leave.bias).view(-1, self.entries, self.levels)

    def log_prob(self, grey: Float[Tensor, "batch entries"]) -> Float[Tensor, " batch"]:
        """log p(x) in nats, of whole levels."""
        chosen = self(grey).log_softmax(-1).gather(-1, grey.long()[..., None])
        return chosen[..., 0].sum(1)

    @torch.no_grad()
    def sample(self, n: int) -> Int[Tensor, "n entries"]:
        """n samples; every entry takes a pass of its own."""
        grey = torch.zeros(n, self.entries, device=self.enter.weight.device)
        for i in range(self.entries):
            grey[:, i] = torch.multinomial(self(grey)[:, i].softmax(-1), 1)[:, 0].float()
        return grey.long()
