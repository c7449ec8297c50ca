"""Small convolutional classifiers. Each has `features(image)`, `feature_dim`, and `forward(image)` -> logits."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from stillhouse.errors import require

NORMS = ("instance", "batch", "group", "none")


def normalisation(norm: str, channels: int) -> nn.Module:
    """The normalisation layer of that name, with learned scale and shift. Group means 4 channels a group or more."""
    require(norm in NORMS, f"norm is one of {', '.join(NORMS)}, not '{norm}'")
    if norm == "batch":
        return nn.BatchNorm2d(channels)
    if norm == "group":
        return nn.GroupNorm(math.gcd(channels, max(1, channels // 4)), channels)
    return nn.GroupNorm(channels, channels) if norm == "instance" else nn.Identity()


def _conv(channels_in: int, channels: int, norm: str, kernel: int = 3, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(channels_in, channels, kernel, stride, kernel // 2), normalisation(norm, channels),
                         nn.ReLU())


class _Classifier(nn.Module):
    """A body that ends in a vector, and a linear layer."""

    def __init__(self, body: nn.Sequential, feature_dim: int, classes: int):
        super().__init__()
        self.body, self.feature_dim, self.classes = body, feature_dim, classes
        self.linear = nn.Linear(feature_dim, classes)

    def features(self, image: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch features"]:
        return self.body(image)

    def forward(self, image: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch classes"]:
        return self.linear(self.features(image))


def _conv_body(channels_in: int, width: int, depth: int, image_size: int, norm: str) -> tuple[nn.Sequential, int]:
    require(depth >= 1 and width >= 1, f"depth and width must be at least 1, not {depth} and {width}")
    require(image_size >= 2**depth, f"{depth} poolings need pictures of at least {2**depth} pixels, not {image_size}; "
            "lower the depth")
    blocks = [nn.Sequential(_conv(channels_in if i == 0 else width, width, norm), nn.AvgPool2d(2))
              for i in range(depth)]
    return nn.Sequential(*blocks, nn.Flatten()), width * (image_size // 2**depth) ** 2


class ConvNet(_Classifier):
    """The network of dataset distillation (Gidaris and Komodakis 2018): `depth` blocks of conv 3x3, norm, ReLU and
    2x2 average pooling, then a linear layer. The papers use width 128 and depth 3 on 32x32."""

    def __init__(self, channels_in: int = 1, classes: int = 10, width: int = 128, depth: int = 3, image_size: int = 32,
                 norm: str = "instance"):
        super().__init__(*_conv_body(channels_in, width, depth, image_size, norm), classes)


class ConvEncoder(nn.Module):
    """A ConvNet that ends in a vector of `feature_dim` numbers instead of logits: an `Encoder`."""

    def __init__(self, channels_in: int = 1, feature_dim: int = 64, width: int = 32, depth: int = 2,
                 image_size: int = 8, norm: str = "batch"):
        super().__init__()
        body, inner = _conv_body(channels_in, width, depth, image_size, norm)
        self.body, self.feature_dim = nn.Sequential(*body, nn.Linear(inner, feature_dim)), feature_dim

    def forward(self, image: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch features"]:
        return self.body(image)


class TinyConvNet(_Classifier):
    """A student of at most 5,000 parameters at width 8 (one channel, up to 30 classes), for any picture size from 4
    pixels up: three convolutions of `width`, 2 and 2.5 times that many channels."""

    def __init__(self, channels_in: int = 1, classes: int = 10, norm: str = "batch", width: int = 8):
        last = 5 * width // 2
        body = nn.Sequential(_conv(channels_in, width, norm), nn.AvgPool2d(2), _conv(width, 2 * width, norm),
                             nn.AvgPool2d(2), _conv(2 * width, last, norm), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        super().__init__(body, last, classes)


class _Residual(nn.Module):
    def __init__(self, channels_in: int, channels: int, stride: int, norm: str):
        super().__init__()
        self.first = _conv(channels_in, channels, norm, stride=stride)
        self.second = nn.Sequential(nn.Conv2d(channels, channels, 3, 1, 1), normalisation(norm, channels))
        self.skip = nn.Identity() if stride == 1 and channels_in == channels else nn.Sequential(
            nn.Conv2d(channels_in, channels, 1, stride), normalisation(norm, channels))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.second(self.first(x)) + self.skip(x))


class SmallResNet(_Classifier):
    """A residual network: a stem, then stages of `blocks` residual blocks, each stage twice as wide and half as large
    as the one before, global average pooling, a linear layer. Any picture size."""

    def __init__(self, channels_in: int = 1, classes: int = 10, width: int = 16, blocks: Sequence[int] = (1, 1, 1),
                 norm: str = "batch"):
        require(len(blocks) >= 1 and min(blocks) >= 1, f"every stage needs at least one block, got {tuple(blocks)}")
        layers: list[nn.Module] = [_conv(channels_in, width, norm)]
        channels = width
        for stage, count in enumerate(blocks):
            for i in range(count):
                wide = width * 2**stage
                layers.append(_Residual(channels, wide, 2 if stage > 0 and i == 0 else 1, norm))
                channels = wide
        super().__init__(nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten()), channels, classes)


class SmallVGG(_Classifier):
    """VGG in small: pairs of conv 3x3 with norm and ReLU, 2x2 max pooling, width doubling, `depth` times."""

    def __init__(self, channels_in: int = 1, classes: int = 10, width: int = 16, depth: int = 2, image_size: int = 8,
                 norm: str = "instance"):
        require(image_size >= 2**depth, f"{depth} poolings need at least {2**depth} pixels, not {image_size}")
        layers: list[nn.Module] = []
        channels = channels_in
        for stage in range(depth):
            wide = width * 2**stage
            layers += [_conv(channels, wide, norm), _conv(wide, wide, norm), nn.MaxPool2d(2)]
            channels = wide
        super().__init__(nn.Sequential(*layers, nn.Flatten()), channels * (image_size // 2**depth) ** 2, classes)


class SmallAlexNet(_Classifier):
    """AlexNet in small: conv 5x5, conv 5x5 and two conv 3x3 without normalisation, max pooling, a hidden layer."""

    def __init__(self, channels_in: int = 1, classes: int = 10, width: int = 16, image_size: int = 8,
                 hidden: int = 64):
        require(image_size >= 4, f"two poolings need at least 4 pixels, not {image_size}")
        body = nn.Sequential(
            _conv(channels_in, width, "none", kernel=5), nn.MaxPool2d(2),
            _conv(width, 2 * width, "none", kernel=5), nn.MaxPool2d(2),
            _conv(2 * width, 3 * width, "none"), _conv(3 * width, 2 * width, "none"), nn.Flatten(),
            nn.Linear(2 * width * (image_size // 4) ** 2, hidden), nn.ReLU())
        super().__init__(body, hidden, classes)


class LeNet(_Classifier):
    """LeNet-5 with ReLU and max pooling (6 and 16 channels, hidden layers of 120 and 84)."""

    def __init__(self, channels_in: int = 1, classes: int = 10, image_size: int = 8):
        require(image_size >= 4, f"two poolings need at least 4 pixels, not {image_size}")
        body = nn.Sequential(
            _conv(channels_in, 6, "none", kernel=5), nn.MaxPool2d(2), _conv(6, 16, "none", kernel=5), nn.MaxPool2d(2),
            nn.Flatten(), nn.Linear(16 * (image_size // 4) ** 2, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU())
        super().__init__(body, 84, classes)


class MLP(_Classifier):
    """Flattened pictures through hidden layers with ReLU. `inputs` is channels x height x width."""

    def __init__(self, inputs: int = 64, classes: int = 10, hidden: Sequence[int] = (128,)):
        require(len(hidden) >= 1, "an MLP needs at least one hidden layer")
        sizes = [inputs, *hidden]
        layers = [nn.Sequential(nn.Linear(a, b), nn.ReLU()) for a, b in itertools.pairwise(sizes)]
        super().__init__(nn.Sequential(nn.Flatten(), *layers), sizes[-1], classes)
