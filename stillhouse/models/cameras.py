"""Cameras that look at the origin: poses, rays, and which of a few named views each one is."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from stillhouse.errors import require

VIEWS = ("front", "side", "back", "overhead")


@dataclass
class Cameras:
    """A batch of pinhole cameras. Angles are in radians; the y axis is up and azimuth 0 looks at the front (+z)."""

    elevation: Float[Tensor, " batch"]
    azimuth: Float[Tensor, " batch"]
    distance: Float[Tensor, " batch"]
    fov: Float[Tensor, " batch"]

    @classmethod
    def draw(cls, u: Float[Tensor, "batch 4"], elevation: tuple[float, float] = (-10.0, 45.0),
             distance: tuple[float, float] = (1.0, 1.5), fov: tuple[float, float] = (40.0, 70.0)) -> Cameras:
        """Cameras from uniform numbers of [0, 1); ranges of elevation and field of view in degrees, azimuth whole."""
        require(all(low <= high for low, high in (elevation, distance, fov)) and distance[0] > 0 and fov[0] > 0,
                f"ranges of cameras are (low, high), distance and fov above 0; got {elevation}, {distance}, {fov}")
        ranges = [tuple(map(math.radians, elevation)), (-math.pi, math.pi), distance, tuple(map(math.radians, fov))]
        return cls(*(low + (high - low) * u[:, i] for i, (low, high) in enumerate(ranges)))

    def __len__(self) -> int:
        return len(self.azimuth)

    def __getitem__(self, rows: Bool[Tensor, " batch"] | Int[Tensor, " n"] | slice) -> Cameras:
        return Cameras(self.elevation[rows], self.azimuth[rows], self.distance[rows], self.fov[rows])

    def extrinsic(self) -> Float[Tensor, "batch 4 4"]:
        """Camera to world: columns right, up, backward, and the position."""
        e, a = self.elevation, self.azimuth
        back = torch.stack([e.cos() * a.sin(), e.sin(), e.cos() * a.cos()], 1)
        right = torch.stack([a.cos(), torch.zeros_like(a), -a.sin()], 1)
        up = torch.linalg.cross(back, right)
        position = self.distance[:, None] * back
        matrix = torch.stack([right, up, back, position], 2)
        last = matrix.new_tensor([0.0, 0.0, 0.0, 1.0]).expand(len(self), 1, 4)
        return torch.cat([matrix, last], 1)

    def rays(self, size: int) -> tuple[Float[Tensor, "batch 3"], Float[Tensor, "batch rays 3"]]:
        """Origins, and unit directions through the centres of size x size pixels, rows from the top."""
        plane = pixel_centres(size, self.fov) * (self.fov / 2).tan()[:, None, None]
        local = torch.cat([plane, -torch.ones_like(plane[..., :1])], 2)
        matrix = self.extrinsic()
        directions = torch.einsum("bij,brj->bri", matrix[:, :3, :3], local)
        return matrix[:, :3, 3], directions / directions.norm(dim=2, keepdim=True)

    def project(self, points: Float[Tensor, "batch points 3"]) -> Float[Tensor, "batch points 3"]:
        """x to the right and y up in [-1, 1] over the picture, and the depth before the camera."""
        matrix = self.extrinsic()
        local = torch.einsum("bji,bpj->bpi", matrix[:, :3, :3], points - matrix[:, None, :3, 3])
        depth = -local[..., 2:]
        return torch.cat([local[..., :2] / (depth.clamp(min=1e-4) * (self.fov / 2).tan()[:, None, None]), depth], 2)

    def views(self) -> Int[Tensor, " batch"]:
        """The position in `VIEWS`: overhead from 60 degrees up, front and back within 45 degrees, else side."""
        turn = torch.atan2(self.azimuth.sin(), self.azimuth.cos()).abs()
        view = torch.where(turn < math.pi / 4, 0, torch.where(turn > 3 * math.pi / 4, 2, 1))
        return torch.where(self.elevation > math.pi / 3, 3, view)


def pixel_centres(size: int, like: Tensor) -> Float[Tensor, "1 pixels 2"]:
    """x and y of the pixel centres in [-1, 1], rows from the top."""
    line = (torch.arange(size, dtype=like.dtype, device=like.device) + 0.5) * (2 / size) - 1
    y, x = torch.meshgrid(-line, line, indexing="ij")
    return torch.stack([x, y], -1).view(1, -1, 2)


def view_prompts(prompt: str) -> list[str]:
    """The prompt, and the prompt for each of `VIEWS`."""
    return [prompt, *(f"{prompt}, {view} view" for view in VIEWS)]
