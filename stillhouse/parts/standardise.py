"""Running standardisation of features that one does not train."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from stillhouse.errors import DataError, require


class Standardiser(nn.Module):
    """(f - mean) / (std + eps) per dimension with running statistics, which begin as 0 and 1 (UNIC, Sariyildiz et al.
    2024, section 3.2). Leading dimensions (samples, places) are pooled; `std` is the unbiased estimate."""

    mean: Tensor
    std: Tensor

    def __init__(self, width: int, eps: float = 1e-8):
        super().__init__()
        self.eps = eps
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("std", torch.ones(width))

    def forward(self, x: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch width"]:
        """`x` standardised with the statistics as they are."""
        return (x - self.mean) / (self.std + self.eps)

    @torch.no_grad()
    def update(self, x: Float[Tensor, "*batch width"], momentum: float) -> None:
        """mean <- (1 - m) mean + m mean(x), and the same for std: m = 1 takes the statistics of `x` alone.

        Raises ConfigError for m outside [0, 1], DataError where there are fewer than two rows.
        """
        require(0 <= momentum <= 1, f"momentum must lie in [0, 1], not {momentum}")
        rows = x.reshape(-1, x.shape[-1]).to(self.mean.dtype)
        require(len(rows) >= 2, "a standard deviation needs two rows at least", DataError)
        self.mean.lerp_(rows.mean(0), momentum)
        self.std.lerp_(rows.std(0), momentum)
