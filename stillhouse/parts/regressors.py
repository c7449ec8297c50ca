"""Regressors: what brings a student's features into the shape of its teacher's. Thrown away after training."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from stillhouse.errors import RoleError, require
from stillhouse.parts.stages import feature_map, grid_of


class Regressor(nn.Module):
    """A 1 x 1 convolution (with BatchNorm, if `norm`) from the student's channels to the teacher's.

    Both give maps (c, h, w) or tokens (tokens, d). It returns maps, with `resize` of the teacher's size too
    (bilinear): compare them with `feature_map` of the teacher's features.
    """

    def __init__(self, student: Sequence[int], teacher: Sequence[int], resize: bool = True, norm: bool = False):
        super().__init__()
        for who, shape in (("student", student), ("teacher", teacher)):
            require(len(shape) in (2, 3), f"the {who}'s features are maps (c, h, w) or tokens (tokens, d), not "
                    f"{tuple(shape)}", RoleError)
        channels = student[0] if len(student) == 3 else student[1]
        wanted = teacher[0] if len(teacher) == 3 else teacher[1]
        side = grid_of(teacher[0])[0] if len(teacher) == 2 else 0
        self.size = (tuple(teacher[1:]) if len(teacher) == 3 else (side, side)) if resize else None
        self.conv = nn.Conv2d(channels, wanted, 1)
        self.norm = nn.BatchNorm2d(wanted) if norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(feature_map(x)))
        if self.size is not None and tuple(x.shape[2:]) != self.size:
            x = F.interpolate(x, self.size, mode="bilinear", align_corners=False)
        return x
