"""A searchable convolutional classifier: three stages, each with an operation, a kernel size and a number of blocks."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from typing import Any, NamedTuple

from jaxtyping import Float
from torch import Tensor, nn

from stillhouse.errors import ConfigError, require

OPERATIONS = ("conv", "depthwise", "pool")


class Stage(NamedTuple):
    """One stage: its operation, kernel size and number of blocks, e.g. `conv3x2`."""

    operation: str
    kernel: int
    blocks: int

    def __str__(self) -> str:
        return f"{self.operation}{self.kernel}x{self.blocks}"


Architecture = tuple[Stage, ...]


def parsed(text: str) -> Architecture:
    """`"conv3x1/depthwise3x2/pool3x1"` as stages. Raises ConfigError for another form."""
    stages = []
    for part in text.split("/"):
        operation = part.rstrip("0123456789x")
        kernel, _, blocks = part.removeprefix(operation).partition("x")
        require(operation in OPERATIONS and kernel.isdigit() and blocks.isdigit(), f"'{part}' is no stage; write "
                f"one of {', '.join(OPERATIONS)} with kernel size and number of blocks, e.g. conv3x2", ConfigError)
        stages.append(Stage(operation, int(kernel), int(blocks)))
    return tuple(stages)


def named(stages: Sequence[Stage]) -> str:
    """The inverse of `parsed`."""
    return "/".join(map(str, stages))


class Space(NamedTuple):
    """What a stage may be made of."""

    operations: Sequence[str] = OPERATIONS
    kernels: Sequence[int] = (1, 3)
    blocks: Sequence[int] = (1, 2, 3)


def sampled(draw: random.Random, space: Space, stages: int = 3) -> Architecture:
    """A random architecture: every choice of every stage for itself."""
    return tuple(Stage(draw.choice(space.operations), draw.choice(space.kernels), draw.choice(space.blocks))
                 for _ in range(stages))


def mutated(architecture: Architecture, draw: random.Random, space: Space) -> Architecture:
    """Another operation, kernel size or number of blocks in one stage; itself where the space has no other."""
    where = draw.randrange(len(architecture))
    given: dict[str, Sequence[Any]] = dict(zip(Stage._fields, space, strict=True))
    choices = [(name, [v for v in values if v != getattr(architecture[where], name)]) for name, values in given.items()]
    name, others = draw.choice([c for c in choices if c[1]] or [("blocks", [architecture[where].blocks])])
    return tuple(s._replace(**{name: draw.choice(others)}) if i == where else s for i, s in enumerate(architecture))


class _Block(nn.Module):
    """relu(F(x) + shortcut(x)); F is the operation with BatchNorm. Pooling and depthwise convolutions are followed by a
    pointwise one where the width changes, the depthwise one always."""

    def __init__(self, operation: str, kernel: int, channels: int, out: int, stride: int):
        super().__init__()
        pad = kernel // 2
        if operation == "conv":
            layers: list[nn.Module] = [nn.Conv2d(channels, out, kernel, stride, pad, bias=False)]
        elif operation == "depthwise":
            layers = [nn.Conv2d(channels, channels, kernel, stride, pad, groups=channels, bias=False),
                      nn.Conv2d(channels, out, 1, bias=False)]
        else:
            layers = [nn.AvgPool2d(kernel, stride, pad, count_include_pad=False)]
            if channels != out:
                layers.append(nn.Conv2d(channels, out, 1, bias=False))
        self.body = nn.Sequential(*layers, nn.BatchNorm2d(out))
        same = stride == 1 and channels == out
        self.relu = nn.ReLU()
        self.shortcut = nn.Identity() if same else nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False),
                                                                 nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.body(x) + self.shortcut(x))


class StageNet(nn.Module):
    """A stem, stages of doubling width and halving size, global average pooling, a linear layer.

    `stages` is written as in `parsed`; the stem's width is `width`. Every such network ends at the same width.
    """

    def __init__(self, stages: str = "conv3x1/conv3x1/conv3x1", channels_in: int = 1, classes: int = 10,
                 width: int = 8):
        super().__init__()
        plan = parsed(stages)
        self.stages, self.classes, self.feature_dim = stages, classes, width * 2 ** (len(plan) - 1)
        self.stem = nn.Sequential(nn.Conv2d(channels_in, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        self.body = nn.Sequential()
        channels = width
        for i, (stage, wide) in enumerate(zip(plan, (width * 2**i for i in itertools.count()), strict=False)):
            blocks = nn.Sequential()
            for j in range(stage.blocks):
                blocks.append(_Block(stage.operation, stage.kernel, channels, wide, 2 if i > 0 and j == 0 else 1))
                channels = wide
            self.body.append(blocks)
        self.linear = nn.Linear(channels, classes)

    def features(self, image: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch features"]:
        return self.body(self.stem(image)).mean((2, 3))

    def forward(self, image: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch classes"]:
        return self.linear(self.features(image))
