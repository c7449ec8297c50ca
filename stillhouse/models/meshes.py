"""A surface that can be learned: signed distances on tetrahedra, marching tetrahedra, and a small rasteriser.

For pictures of a few dozen pixels, in plain tensors: every face is compared with every pixel.
"""

from __future__ import annotations

from itertools import permutations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from stillhouse.errors import require
from stillhouse.models.cameras import Cameras, pixel_centres


def tetrahedral_grid(resolution: int, radius: float = 1.0) -> tuple[Float[Tensor, "vertices 3"], Int[Tensor, "tets 4"]]:
    """The cube [-radius, radius]^3 in resolution^3 cells of six tetrahedra each, which share the cell's diagonal."""
    require(resolution >= 2, f"a tetrahedral grid needs 2 or more cells a side, got {resolution}")
    count = resolution + 1
    line = torch.linspace(-radius, radius, count)
    vertices = torch.stack(torch.meshgrid(line, line, line, indexing="ij"), -1).view(-1, 3)
    corner = torch.arange(resolution)
    base = torch.stack(torch.meshgrid(corner, corner, corner, indexing="ij"), -1).view(-1, 1, 3)
    steps = torch.stack([torch.cat([torch.zeros(1, 3, dtype=torch.long), torch.eye(3, dtype=torch.long)[list(order)]])
                         .cumsum(0) for order in permutations(range(3))])
    cells = base + steps.view(1, -1, 3)
    return vertices, (cells[..., 0] * count**2 + cells[..., 1] * count + cells[..., 2]).view(-1, 4)


def marching_tetrahedra(
    vertices: Float[Tensor, "vertices 3"], sdf: Float[Tensor, " vertices"], tets: Int[Tensor, "tets 4"]
) -> tuple[Float[Tensor, "points 3"], Int[Tensor, "faces 3"]]:
    """The surface where `sdf` changes sign (positive inside), with gradient to positions and distances.

    Each tetrahedron of mixed signs gives one or two triangles on the edges that cross; a crossing lies where the linear
    interpolation is 0 (Shen et al. 2021, DMTet, equation 5). Faces are turned so that their normals point outwards.
    """
    inside = sdf > 0
    count = inside[tets].sum(1)
    pieces = []
    for held, edges in {1: ((0, 1), (0, 2), (0, 3)), 3: ((0, 3), (1, 3), (2, 3)),
                        2: ((0, 2), (0, 3), (1, 3), (0, 2), (1, 3), (1, 2))}.items():
        own = tets[count == held]
        order = inside[own].to(torch.int8).argsort(dim=1, descending=True, stable=True)
        own = own.gather(1, order)
        corners = torch.stack([own[:, list(edge)] for edge in edges], 1).view(-1, 3, 2)
        middle = vertices[own[:, :held]].mean(1).repeat_interleave(len(edges) // 3, 0)
        pieces.append((corners, middle))
    crossing, middle = (torch.cat(parts) for parts in zip(*pieces, strict=True))
    edges, faces = torch.unique(crossing.sort(-1).values.view(-1, 2), dim=0, return_inverse=True)
    low, high = sdf[edges[:, 0]], sdf[edges[:, 1]]
    share = (low / (low - high))[:, None]
    points = (1 - share) * vertices[edges[:, 0]] + share * vertices[edges[:, 1]]
    faces = faces.view(-1, 3)
    with torch.no_grad():
        a, b, c = points[faces].unbind(1)
        inward = (torch.linalg.cross(b - a, c - a) * ((a + b + c) / 3 - middle)).sum(1) < 0
    return points, torch.where(inward[:, None], faces.flip(1), faces)


def vertex_normals(points: Float[Tensor, "points 3"], faces: Int[Tensor, "faces 3"]) -> Float[Tensor, "points 3"]:
    """Unit normals at the points: of the faces around each, weighted by their areas."""
    a, b, c = points[faces].unbind(1)
    face = torch.linalg.cross(b - a, c - a)
    total = torch.zeros_like(points).index_add(0, faces.reshape(-1), face.repeat_interleave(3, 0))
    return F.normalize(total, dim=1, eps=1e-12)


def rasterise(
    points: Float[Tensor, "points 3"], faces: Int[Tensor, "faces 3"], camera: Cameras, size: int,
    values: Float[Tensor, "points channels"], softness: float = 0.5,
) -> tuple[Float[Tensor, "channels size size"], Float[Tensor, "1 size size"]]:
    """`values` over the nearest face in each pixel of one camera (0 where there is none), and the coverage.

    The coverage is 1 inside the silhouette and falls off outside within about `softness` pixels: 1 - prod_f (1 -
    sigmoid(+-d_f^2 / s)) (Liu et al. 2019, SoftRas, equation 3), whose gradient it has inside as well. Interpolation is
    in the plane of the picture.
    """
    corners = camera.project(points[None])[0][faces]
    pixels = pixel_centres(size, points)[0]
    a, b, c = corners[..., :2].unbind(1)
    area = _cross(b - a, c - a)
    with torch.no_grad():
        facing = area.abs() > 1e-12
        weights = _barycentric(pixels, a, b, c, torch.where(facing, area, 1.0))
        covered = (weights >= 0).all(-1) & facing & (corners[..., 2] > 1e-3).all(1)
        depth = torch.where(covered, (weights * corners[..., 2]).sum(-1), torch.inf)
        hit, face = depth.isfinite().any(1), depth.argmin(1)
    own = torch.where(facing, area, 1.0)[face]
    weights = torch.stack([_cross(b[face] - pixels, c[face] - pixels), _cross(c[face] - pixels, a[face] - pixels),
                           _cross(a[face] - pixels, b[face] - pixels)], 1) / own[:, None]
    seen = (weights[..., None] * values[faces[face]]).sum(1) * hit[:, None]
    soft = _soft_coverage(pixels, corners[..., :2], covered, (2 * softness / size) ** 2)
    coverage = torch.where(hit, 1 + soft - soft.detach(), soft)
    return seen.T.view(-1, size, size), coverage.view(1, size, size)


def _cross(u: Tensor, v: Tensor) -> Tensor:
    return u[..., 0] * v[..., 1] - u[..., 1] * v[..., 0]


def _barycentric(pixels: Tensor, a: Tensor, b: Tensor, c: Tensor, area: Tensor) -> Float[Tensor, "pixels faces 3"]:
    p = pixels[:, None]
    return torch.stack([_cross(b - p, c - p), _cross(c - p, a - p), _cross(a - p, b - p)], -1) / area[:, None]


def _soft_coverage(
    pixels: Float[Tensor, "pixels 2"], corners: Float[Tensor, "faces 3 2"], covered: Bool[Tensor, "pixels faces"],
    scale: float,
) -> Float[Tensor, " pixels"]:
    start, along = corners, corners.roll(-1, 1) - corners
    offset = pixels[:, None, None] - start
    place = ((offset * along).sum(-1) / along.square().sum(-1).clamp(min=1e-12)).clamp(0, 1)
    squared = (offset - place[..., None] * along).square().sum(-1).amin(-1)
    signed = torch.where(covered, squared, -squared)
    return 1 - F.logsigmoid(-signed / scale).sum(1).exp()
