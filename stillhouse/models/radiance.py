"""A small radiance field, and the volume rendering of any field."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from stillhouse.errors import require
from stillhouse.models.cameras import Cameras

Field = Callable[[Float[Tensor, "points 3"]], tuple[Float[Tensor, " points"], Float[Tensor, "points channels"]]]


class FeatureGrid(nn.Module):
    """Dense feature grids of several resolutions over the cube [-radius, radius]^3, read trilinearly."""

    def __init__(self, resolutions: tuple[int, ...] = (4, 8, 16), features: int = 4, radius: float = 1.0):
        super().__init__()
        require(bool(resolutions) and min(resolutions) >= 2 and features >= 1, "a feature grid needs resolutions of 2 "
                f"or more and features, got {resolutions} and {features}")
        self.radius, self.width = radius, features * len(resolutions)
        self.levels = nn.ParameterList(torch.empty(1, features, r, r, r).uniform_(-1e-2, 1e-2) for r in resolutions)

    def forward(self, points: Float[Tensor, "points 3"]) -> Float[Tensor, "points width"]:
        place = (points / self.radius).view(1, -1, 1, 1, 3)
        read = [F.grid_sample(level, place, align_corners=True, padding_mode="border") for level in self.levels]
        return torch.cat(read, 1).view(self.width, -1).T


class RadianceField(nn.Module):
    """Density and colour of points: a feature grid, then an MLP.

    The density is softplus(raw + bias), the bias being strength (1 - |p| / r) for an "object", which begins as a blob
    in the middle, and strength (|p| / r - 1) for a "scene", which begins hollow so that cameras are not buried (Wang et
    al. 2023, arXiv 2305.16213, section 4.2). Outside the bounding `radius` it is 0. Colours are in [0, 1].
    """

    def __init__(
        self, kind: Literal["object", "scene"] = "object", radius: float = 1.0, r: float | None = None,
        strength: float = 10.0, resolutions: tuple[int, ...] = (4, 8, 16), features: int = 4, width: int = 32,
    ):
        super().__init__()
        require(kind in ("object", "scene"), f"a field is an 'object' or a 'scene', not {kind!r}")
        self.sign = 1.0 if kind == "object" else -1.0
        self.radius, self.r, self.strength = radius, r or radius / 2, strength
        self.grid = FeatureGrid(tuple(resolutions), features, radius)
        self.mlp = nn.Sequential(nn.Linear(self.grid.width, width), nn.SiLU(), nn.Linear(width, 4))

    def forward(self, points: Float[Tensor, "points 3"]) -> tuple[Float[Tensor, " points"], Float[Tensor, "points 3"]]:
        raw = self.mlp(self.grid(points))
        distance = points.norm(dim=1)
        bias = self.sign * self.strength * (1 - distance / self.r)
        density = F.softplus(raw[:, 0] + bias) * (distance <= self.radius)
        return density, raw[:, 1:].sigmoid()


def volume_render(
    field: Field, cameras: Cameras, size: int, samples: int, radius: float = 1.0,
    jitter: Float[Tensor, "batch rays samples"] | None = None,
) -> tuple[Float[Tensor, "batch channels size size"], Float[Tensor, "batch 1 size size"]]:
    """Colours along each ray, weighted by alpha_i prod_{j < i} (1 - alpha_j) with alpha = 1 - exp(-density step), and
    the opacity. `jitter` in [0, 1) moves each sample within its stratum (Mildenhall et al. 2020, equations 2, 3);
    without it samples sit in the middle. What shines through the background is for the caller to add."""
    origin, direction = cameras.rays(size)
    n, rays = direction.shape[:2]
    near = (cameras.distance - radius).clamp(min=0.0)[:, None, None]
    far = (cameras.distance + radius)[:, None, None]
    place = torch.arange(samples, dtype=direction.dtype, device=direction.device) + (0.5 if jitter is None else jitter)
    depth = near + (far - near) / samples * place
    points = origin[:, None, None] + depth.expand(n, rays, samples)[..., None] * direction[:, :, None]
    density, colour = field(points.reshape(-1, 3))
    step = (far - near) / samples
    optical = density.view(n, rays, samples) * step
    through = torch.exp(-(optical.cumsum(2) - optical))
    weight = through * (1 - torch.exp(-optical))
    seen = (weight[..., None] * colour.view(n, rays, samples, -1)).sum(2)
    return seen.transpose(1, 2).reshape(n, -1, size, size), weight.sum(2).view(n, 1, size, size)
