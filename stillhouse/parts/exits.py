"""Exit branches: small networks that turn the features of an inner stage into class logits. Thrown away after training.

Their design follows Hao et al. 2023 (One-for-All, section 3.2 and its released code): maps go through separable
convolutions, tokens through patch merging and transformer blocks.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from stillhouse.errors import RoleError, require
from stillhouse.parts.stages import Shape, grid_of

GRID = 7
"""Side of the grid down to which patches are merged: that of a 224 pixel picture after a reduction by 32."""
HEADS = 4


class SeparableDown(nn.Sequential):
    """Half the resolution: depthwise 3x3 of stride 2, pointwise, norm, ReLU; depthwise 3x3, pointwise to `out`, norm,
    ReLU."""

    def __init__(self, channels: int, out: int):
        super().__init__(*_separable(channels, channels, 2), *_separable(channels, out, 1))


def _separable(channels: int, out: int, stride: int) -> list[nn.Module]:
    return [nn.Conv2d(channels, channels, 3, stride, 1, groups=channels, bias=False),
            nn.Conv2d(channels, out, 1, bias=False), nn.BatchNorm2d(out), nn.ReLU()]


class ConvExit(nn.Module):
    """Logits of maps: `after` halvings (as many as stages follow), each but the last doubling the channels, the last
    one ending at `width`; a 1x1 convolution to `width` where no stage follows; global average pooling; linear."""

    def __init__(self, channels: int, after: int, width: int, classes: int):
        super().__init__()
        widths = [channels * 2**i for i in range(after)] + [width]
        downs: list[nn.Module] = [SeparableDown(a, b) for a, b in itertools.pairwise(widths)]
        self.body = nn.Sequential(*(downs or [nn.Conv2d(channels, width, 1)]))
        self.head = nn.Linear(width, classes)
        _initialise(self)

    def forward(self, x: Float[Tensor, "n channels height width"]) -> Float[Tensor, "n classes"]:
        return self.head(self.body(x).mean((2, 3)))


class PatchMerging(nn.Module):
    """Four neighbouring tokens become one: concatenated, LayerNorm, linear, GELU. A side that is odd gets zeros."""

    def __init__(self, width: int, out: int):
        super().__init__()
        self.norm, self.reduction = nn.LayerNorm(4 * width), nn.Linear(4 * width, out, bias=False)

    def forward(self, x: Float[Tensor, "n tokens width"]) -> Float[Tensor, "n quarter out"]:
        side = grid_of(x.shape[1])[0]
        x = x.unflatten(1, (side, side))
        if side % 2:
            x = F.pad(x, (0, 0, 0, 1, 0, 1))
        x = torch.cat([x[:, i::2, j::2] for j in (0, 1) for i in (0, 1)], -1).flatten(1, 2)
        return F.gelu(self.reduction(self.norm(x)))


class TokenExit(nn.Module):
    """Logits of tokens: patches merged until their grid has at most `grid` a side, as many transformer blocks as stages
    follow (at least one), the class token or else the mean of the tokens, linear.

    Class tokens are not merged. `width` is that of the blocks; tokens of another width that are not merged are mapped
    linearly.
    """

    def __init__(self, tokens: int, width_in: int, after: int, width: int, classes: int, grid: int = GRID):
        super().__init__()
        side, self.prefix = grid_of(tokens)
        merges = math.ceil(math.log2(side / grid) - 1e-9) if side > grid else 0
        widths = [width_in] + [width] * merges
        merging: list[nn.Module] = [PatchMerging(a, b) for a, b in itertools.pairwise(widths)]
        same = width_in == width
        self.merging = nn.Sequential(*(merging or [nn.Identity() if same else nn.Linear(width_in, width)]))
        self.classes_to_width = nn.Identity() if same or not self.prefix else nn.Linear(width_in, width)
        self.blocks = nn.Sequential(*(_block(width) for _ in range(max(after, 1))))
        self.head = nn.Linear(width, classes)
        _initialise(self)

    def forward(self, x: Float[Tensor, "n tokens width"]) -> Float[Tensor, "n classes"]:
        patches = self.merging(x[:, self.prefix :])
        if not self.prefix:
            return self.head(self.blocks(patches).mean(1))
        x = torch.cat([self.classes_to_width(x[:, : self.prefix]), patches], 1)
        return self.head(self.blocks(x)[:, 0])


def _block(width: int) -> nn.Module:
    return nn.TransformerEncoderLayer(width, math.gcd(width, HEADS), 4 * width, dropout=0.0, activation="gelu",
                                      batch_first=True, norm_first=True)


def _initialise(exit_: nn.Module) -> None:
    for module in exit_.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def stage_width(shape: Sequence[int]) -> int:
    """Channels of maps (channels, height, width), width of tokens (tokens, width)."""
    require(len(shape) in (2, 3), f"features are maps (c, h, w) or tokens (tokens, d), not {tuple(shape)}", RoleError)
    return shape[0] if len(shape) == 3 else shape[1]


def exit_branches(stages: Mapping[str, Shape], classes: int, teacher_width: int = 0, grid: int = GRID) -> nn.ModuleList:
    """One branch for each of a student's stages (shallow to deep, as `stages_of` gives them), by the shape of its
    features.

    Branches of maps end at the width of the last stage or `teacher_width`, whichever is larger; those of tokens work at
    the width of the last stage. Raises RoleError without stages or for features that are neither maps nor tokens.
    """
    require(len(stages) >= 1, "exit branches need at least one stage of the student, and none was found", RoleError)
    shapes = list(stages.values())
    last = stage_width(shapes[-1])
    branches = nn.ModuleList()
    for i, shape in enumerate(shapes):
        after, width = len(shapes) - 1 - i, stage_width(shape)
        branches.append(ConvExit(width, after, max(last, teacher_width), classes) if len(shape) == 3
                        else TokenExit(shape[0], width, after, last, classes, grid))
    return branches
