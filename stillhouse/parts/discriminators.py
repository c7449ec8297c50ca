"""Discriminator heads on the features of a denoiser."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn

from stillhouse.errors import RoleError, require
from stillhouse.parts.heads import mlp


class VectorHead(nn.Module):
    """One logit per sample from features [batch, width], or from tokens [batch, tokens, width] by their mean."""

    def __init__(self, width: int, hidden: int | None = None):
        super().__init__()
        self.layers = nn.Sequential(nn.LayerNorm(width), mlp(width, hidden or width, 1))

    def forward(self, features: Float[Tensor, "batch ... width"]) -> Float[Tensor, " batch"]:
        return self.layers(features).flatten(1).mean(1)


class ConvHead(nn.Module):
    """One logit per sample from a feature map, by halvings to 4 x 4 and then to 1 x 1.

    Each halving: 4 x 4 convolution of stride 2, GroupNorm, SiLU; then a 4 x 4 convolution without padding, GroupNorm,
    SiLU and a 1 x 1 convolution (Yin et al. 2024, arXiv 2405.14867, and its released code). Maps of fewer than 4 x 4
    go through one convolution of their own size.
    """

    def __init__(self, channels: int, size: tuple[int, int], groups: int = 32):
        super().__init__()
        require(channels >= 2 and min(size) >= 1, "a feature map needs two channels or more and a size, got "
                f"{channels} and {size}")
        fewest = min(8, channels)  # a group of one channel at 1 x 1 would normalise everything to 0
        groups = max(g for g in range(1, min(groups, channels // fewest) + 1) if channels % g == 0)

        def block(kernel: tuple[int, int], stride: int, padding: int) -> list[nn.Module]:
            return [nn.Conv2d(channels, channels, kernel, stride, padding), nn.GroupNorm(groups, channels), nn.SiLU()]

        layers: list[nn.Module] = []
        height, width = size
        while min(height, width) >= 8:
            layers += block((4, 4), 2, 1)
            height, width = height // 2, width // 2
        self.layers = nn.Sequential(*layers, *block((min(4, height), min(4, width)), 1, 0), nn.Conv2d(channels, 1, 1))

    def forward(self, features: Float[Tensor, "batch channels height width"]) -> Float[Tensor, " batch"]:
        return self.layers(features).flatten(1).mean(1)


def head_for(features: Tensor) -> nn.Module:
    """A new head that fits such features: vectors, tokens or maps. Raises RoleError on other shapes."""
    if features.ndim == 4:
        return ConvHead(features.shape[1], (features.shape[2], features.shape[3]))
    if features.ndim in (2, 3):
        return VectorHead(features.shape[-1])
    raise RoleError("a discriminator reads features [batch, width], [batch, tokens, width] or [batch, channels, "
                    f"height, width]; these are {tuple(features.shape)}")
