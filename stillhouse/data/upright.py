"""Upright objects: colour pictures of things that have a top, in which a turned or recoloured copy can be told."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from stillhouse.data.sets import TensorSet
from stillhouse.errors import DataError, require

OUTLINES: dict[str, tuple[tuple[float, float], ...]] = {
    "triangle": ((-0.8, 0.6), (0.8, 0.6), (0.0, -0.8)),
    "funnel": ((-0.8, -0.6), (0.8, -0.6), (0.0, 0.8)),
    "arch": ((-0.75, 0.75), (-0.75, -0.75), (0.75, -0.75), (0.75, 0.75), (0.3, 0.75), (0.3, -0.25), (-0.3, -0.25),
             (-0.3, 0.75)),
    "tee": ((-0.8, -0.75), (0.8, -0.75), (0.8, -0.3), (0.22, -0.3), (0.22, 0.8), (-0.22, 0.8), (-0.22, -0.3),
            (-0.8, -0.3)),
    "arrow": ((0.0, -0.9), (0.75, -0.1), (0.25, -0.1), (0.25, 0.85), (-0.25, 0.85), (-0.25, -0.1), (-0.75, -0.1)),
    "house": ((-0.7, 0.75), (-0.7, -0.2), (0.0, -0.85), (0.7, -0.2), (0.7, 0.75)),
    "boat": ((-0.9, 0.25), (-0.12, 0.25), (-0.12, -0.9), (0.6, 0.05), (0.12, 0.05), (0.12, 0.25), (0.9, 0.25),
             (0.55, 0.8), (-0.55, 0.8)),
    "boot": ((-0.5, -0.85), (0.05, -0.85), (0.05, 0.25), (0.8, 0.25), (0.8, 0.75), (-0.5, 0.75)),
}
"""Corners of each object, x to the right and y downwards, in units of its radius. A funnel is a triangle upside down.
The label is the position in this list."""


def upright(n: int, seed: int = 0, size: int = 24, noise: float = 0.15, turn: float = 15.0) -> TensorSet:
    """`n` pictures of one object each, every object equally often within one.

    Fields: `image` float32 [n, 3, size, size] in [-1, 1] and `label` int64 [n]. Objects have warm colours and lie on a
    cool grating; their radius is 0.26 to 0.4 of the side, they are turned by at most `turn` degrees, and `noise` is a
    standard deviation of the pixels. The same arguments give the same pictures.
    """
    require(n >= 1 and size >= 8, f"upright needs n >= 1 and size >= 8, got {n} and {size}", DataError)
    draw = torch.Generator().manual_seed(seed)
    label = (torch.arange(n) % len(OUTLINES))[torch.randperm(n, generator=draw)]
    u = torch.rand(n, 12, generator=draw)
    radius = 0.26 + 0.14 * u[:, 0]
    centre = 0.5 + (u[:, 1:3] - 0.5) * (0.9 - 2 * radius)[:, None]
    angle = (2 * u[:, 3] - 1) * turn * (math.pi / 180)
    ink = torch.stack([0.75 + 0.25 * u[:, 4], 0.2 + 0.55 * u[:, 5], 0.05 + 0.2 * u[:, 6]], 1)
    first, second = (torch.tensor([0.05, 0.15, 0.25]) + torch.tensor([0.2, 0.35, 0.45]) * u[:, i, None]
                     for i in (7, 8))
    at = (torch.arange(size) + 0.5) / size - 0.5
    way = (2 * math.pi * u[:, 9])[:, None, None]
    along = way.cos() * at + way.sin() * at[:, None]
    mix = 0.5 + 0.5 * (2 * math.pi * ((2 + 4 * u[:, 10])[:, None, None] * along + u[:, 11, None, None])).sin()
    ground = first[:, :, None, None] + mix[:, None] * (second - first)[:, :, None, None]
    inside = _inside(label, radius, centre, angle, size)[:, None]
    image = ground + inside * (ink[:, :, None, None] - ground)
    image = (image * 2 - 1 + noise * torch.randn(image.shape, generator=draw)).clamp(-1, 1)
    return TensorSet(image=image, label=label)


def _inside(label: Tensor, radius: Tensor, centre: Tensor, angle: Tensor, size: int, fine: int = 3
            ) -> Float[Tensor, "n size size"]:
    """How much of each pixel lies within the outline, from `fine` x `fine` points of it (even-odd rule)."""
    at = (torch.arange(size * fine) + 0.5) / (size * fine)
    dy, dx = at[None, :, None] - centre[:, 1, None, None], at[None, None, :] - centre[:, 0, None, None]
    cos, sin = angle.cos()[:, None, None], angle.sin()[:, None, None]
    x, y = (cos * dx + sin * dy) / radius[:, None, None], (cos * dy - sin * dx) / radius[:, None, None]
    inside = torch.zeros(x.shape, dtype=torch.bool)
    for i, corners in enumerate(OUTLINES.values()):
        mine = label == i
        for (x1, y1), (x2, y2) in zip(corners, corners[1:] + corners[:1], strict=True):
            if y1 == y2:
                continue
            v = y[mine]
            crossed = ((v < y1) != (v < y2)) & (x[mine] < (x2 - x1) * (v - y1) / (y2 - y1) + x1)
            inside[mine] ^= crossed
    return torch.nn.functional.avg_pool2d(inside.float()[:, None], fine)[:, 0]
