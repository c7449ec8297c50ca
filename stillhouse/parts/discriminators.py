"""Discriminator heads on the features of a denoiser, and a discriminator of logits."""

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


class PictureDiscriminator(nn.Module):
    """One logit per picture, as DCGAN's discriminator: four convolutions 3x3 of stride 2 with `width`, 2, 4 and 8 times
    as many channels, leaky ReLU 0.2 and dropout of whole channels; then a linear layer.

    The second and third have a BatchNorm with `eps`. One right before the linear layer, as in much code, would give
    every batch the same mean logit where it has a single place, so that real and generated ones look alike."""

    def __init__(self, channels: int = 1, image_size: int = 16, width: int = 16, dropout: float = 0.25,
                 eps: float = 0.8):
        super().__init__()
        require(image_size >= 2 and width >= 1, f"pictures need 2 pixels or more and width 1 or more; got {image_size} "
                f"and {width}")
        layers: list[nn.Module] = []
        side = image_size
        for i, wide in enumerate((width, 2 * width, 4 * width, 8 * width)):
            layers += [nn.Conv2d(channels, wide, 3, 2, 1), nn.LeakyReLU(0.2), nn.Dropout2d(dropout)]
            layers += [nn.BatchNorm2d(wide, eps)] if i in (1, 2) else []
            channels, side = wide, (side + 1) // 2
        self.layers = nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels * side * side, 1))

    def forward(self, image: Float[Tensor, "batch channels height width"]) -> Float[Tensor, " batch"]:
        return self.layers(image)[:, 0]


class LogitDiscriminator(nn.Module):
    """Whose logits are these? Two logits per row (student, teacher) from the class logits of a model.

    Linear layers of `classes`, classes / 8, classes / 64 and 2 units, ReLU between them (Shen and Savvides 2020: 1000,
    125, 15, 2, as 1 x 1 convolutions); few classes get 8 and 4 hidden units at least. `last_relu` puts a ReLU after
    the last layer too, as in the released code: its cross-entropy is then (ln 2) / 2 at least, and it can die.
    """

    def __init__(self, classes: int, last_relu: bool = False):
        super().__init__()
        require(classes >= 2, f"a discriminator of logits needs two classes or more, not {classes}")
        first, second = max(8, classes // 8), max(4, classes // 64)
        last = [nn.ReLU()] if last_relu else []
        self.layers = nn.Sequential(nn.Linear(classes, first), nn.ReLU(), nn.Linear(first, second), nn.ReLU(),
                                    nn.Linear(second, 2), *last)

    def forward(self, logits: Float[Tensor, "batch classes"]) -> Float[Tensor, "batch 2"]:
        return self.layers(logits)


def head_for(features: Tensor) -> nn.Module:
    """A new head that fits such features: vectors, tokens or maps. Raises RoleError on other shapes."""
    if features.ndim == 4:
        return ConvHead(features.shape[1], (features.shape[2], features.shape[3]))
    if features.ndim in (2, 3):
        return VectorHead(features.shape[-1])
    raise RoleError("a discriminator reads features [batch, width], [batch, tokens, width] or [batch, channels, "
                    f"height, width]; these are {tuple(features.shape)}")
