"""Scenes as particles: points, bounded pictures, radiance fields, textured meshes, all rendered by one call."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from stillhouse.data.readers import parse_options
from stillhouse.errors import ConfigError, DamagedFileError, UnknownNameError, require
from stillhouse.models.cameras import Cameras
from stillhouse.models.meshes import marching_tetrahedra, rasterise, tetrahedral_grid, vertex_normals
from stillhouse.models.radiance import RadianceField, volume_render
from stillhouse.store import load_tree, save_tree, write_text

Look = Literal["colour", "normal"]
Part = Literal["all", "geometry", "texture"]
STATE, SPEC = "scenes.safetensors", "scenes.json"


class Particles(nn.Module):
    """`count` free samples of some shape: theta itself, or tanh(theta) where `bounded` (pictures in [-1, 1])."""

    def __init__(self, count: int, shape: tuple[int, ...] = (2,), bounded: bool = False, spread: float = 1.0):
        super().__init__()
        self.bounded = bounded
        self.theta = nn.Parameter(spread * torch.randn(count, *shape))

    def forward(self, which: Int[Tensor, " batch"]) -> Float[Tensor, "batch ..."]:
        theta = self.theta[which]
        return theta.tanh() if self.bounded else theta


class NeRF(nn.Module):
    """A radiance field before a grey background. Options are those of `RadianceField`, and samples a ray."""

    def __init__(self, samples: int = 64, background: float = 0.5, **field: Any):
        super().__init__()
        self.samples, self.background = samples, background
        self.field = RadianceField(**field)

    def render(self, cameras: Cameras, size: int, look: Look, jitter: Tensor | None) -> Float[Tensor, "batch 3 s s"]:
        """Colours in [-1, 1]. Raises ConfigError for another look: normals belong to meshes."""
        require(look == "colour", f"a radiance field is rendered in colour, not as {look!r}; make a mesh of it")
        seen, opacity = volume_render(self.field, cameras, size, self.samples, self.field.radius, jitter)
        return 2 * (seen + self.background * (1 - opacity)) - 1

    def groups(self, part: Part) -> dict[str, list[nn.Parameter]]:
        require(part == "all", f"a radiance field is trained as a whole, not its {part}")
        return {"grid": list(self.field.grid.parameters()), "mlp": list(self.field.mlp.parameters())}


class Mesh(nn.Module):
    """A surface between tetrahedra (signed distances and bounded shifts of their corners) with a colour field."""

    vertices: Tensor
    tets: Tensor
    inner: Tensor

    def __init__(self, resolution: int = 32, background: float = 0.5, **field: Any):
        super().__init__()
        self.background = background
        self.field = RadianceField(**field)
        vertices, tets = tetrahedral_grid(resolution, self.field.radius)
        self.cell = 2 * self.field.radius / resolution
        self.register_buffer("vertices", vertices, persistent=False)
        self.register_buffer("tets", tets, persistent=False)
        self.register_buffer("inner", vertices.abs().amax(1) < self.field.radius * (1 - 1e-6), persistent=False)
        self.sdf = nn.Parameter(0.5 - vertices.norm(dim=1) / self.field.radius)
        self.shift = nn.Parameter(torch.zeros_like(vertices))

    @classmethod
    def of(cls, nerf: NeRF, resolution: int, options: dict[str, Any]) -> Mesh:
        """The surface at the mean density of a radiance field, with its colours."""
        mesh = cls(resolution, **options).to(nerf.field.mlp[0].weight.device)  # type: ignore[arg-type]
        with torch.no_grad():
            density, _ = nerf.field(mesh.vertices)
            level = density[mesh.vertices.norm(dim=1) <= nerf.field.radius].mean()
            mesh.sdf.copy_(((density - level) / level.clamp(min=1e-6)).tanh())
        mesh.field = copy.deepcopy(nerf.field)
        return mesh

    def surface(self) -> tuple[Float[Tensor, "points 3"], Int[Tensor, "faces 3"]]:
        """Points and faces; the cube's own boundary counts as outside, so the surface is closed."""
        sdf = torch.where(self.inner, self.sdf, -1.0)
        return marching_tetrahedra(self.vertices + self.shift.tanh() * (self.cell / 2), sdf, self.tets)

    def render(self, cameras: Cameras, size: int, look: Look, jitter: Tensor | None) -> Float[Tensor, "batch 3 s s"]:
        """Colours, or world-space normals before -1, in [-1, 1]."""
        points, faces = self.surface()
        back = 2 * self.background - 1 if look == "colour" else -1.0
        if not len(faces):
            return torch.full((len(cameras), 3, size, size), back, device=points.device) + 0 * sum(
                p.sum() for p in self.parameters())
        values = points if look == "colour" else vertex_normals(points, faces)
        pictures = []
        for i in range(len(cameras)):
            seen, coverage = rasterise(points, faces, cameras[i : i + 1], size, values)
            if look == "colour":
                seen = 2 * self.field(seen.flatten(1).T)[1].T.view(3, size, size) - 1
            pictures.append(coverage * seen + (1 - coverage) * back)
        return torch.stack(pictures)

    def groups(self, part: Part) -> dict[str, list[nn.Parameter]]:
        grid = {"geometry": [self.sdf, self.shift], "texture": list(self.field.grid.parameters())}
        return {"grid": [p for name, own in grid.items() if part in ("all", name) for p in own],
                "mlp": list(self.field.mlp.parameters()) if part != "geometry" else []}


class SceneSet(nn.Module):
    """`count` scenes of one kind: "points", "pictures", "nerf" or "mesh"; a Scene of the protocols.

    Options are those of `Particles`, `NeRF` or `Mesh`. Points and pictures are flat: their camera is ignored.
    Raises UnknownNameError for another kind, ConfigError for options it does not have.
    """

    def __init__(self, kind: str, count: int, **options: Any):
        super().__init__()
        require(kind in ("points", "pictures", "nerf", "mesh"), f"scenes are points, pictures, nerf or mesh, not "
                f"{kind!r}", UnknownNameError)
        require(count >= 1, f"a set of scenes needs at least one, got {count}")
        options = {name: tuple(v) if isinstance(v, list) else v for name, v in options.items()}
        self.kind, self.count, self.options = kind, count, options
        try:
            if self.flat:
                self.scenes: Any = Particles(count, **{"bounded": kind == "pictures", **options})
            else:
                make: Any = NeRF if kind == "nerf" else Mesh
                self.scenes = nn.ModuleList(make(**options) for _ in range(count))
        except TypeError as error:
            raise ConfigError(f"scenes of the kind {kind} cannot be made with {options}: {error}") from error

    @property
    def flat(self) -> bool:
        """Whether the camera is ignored."""
        return self.kind in ("points", "pictures")

    def __len__(self) -> int:
        return self.count

    def render(
        self, which: Int[Tensor, " batch"], cameras: Cameras | None = None, size: int = 64, look: Look = "colour",
        jitter: Float[Tensor, "batch rays samples"] | None = None,
    ) -> Float[Tensor, "batch ..."]:
        """The scenes `which`, each through its camera: x = g(theta_i, c)."""
        if self.flat:
            return self.scenes(which)
        require(cameras is not None, f"scenes of the kind {self.kind} need cameras to be rendered")
        assert cameras is not None
        rows, parts = [], []
        for i in which.unique().tolist():
            own = (which == i).nonzero()[:, 0]
            rows.append(own)
            parts.append(self.scenes[i].render(cameras[own], size, look, None if jitter is None else jitter[own]))
        return torch.cat(parts)[torch.cat(rows).argsort()]

    def groups(self, lr: float, mlp_lr: float, part: Part = "all") -> list[dict[str, Any]]:
        """Parameter groups of an optimizer: `lr` for particles, grids and surfaces, `mlp_lr` for networks."""
        if self.flat:
            return [{"params": [self.scenes.theta], "lr": lr}]
        found = [scene.groups(part) for scene in self.scenes]
        rates = {"grid": lr, "mlp": mlp_lr}
        return [{"params": own, "lr": rate} for name, rate in rates.items() if (own := [p for g in found
                                                                                       for p in g[name]])]

    def strata(self, size: int) -> tuple[int, int] | None:
        """Rays and samples of a render that can be jittered; None where nothing is sampled."""
        return (size * size, self.scenes[0].samples) if self.kind == "nerf" else None

    def meshes(self, resolution: int) -> SceneSet:
        """Radiance fields as textured meshes. Raises ConfigError for other kinds."""
        require(self.kind == "nerf", f"only radiance fields become meshes, not {self.kind}")
        options = {name: v for name, v in self.options.items() if name != "samples"}
        made = SceneSet("mesh", self.count, resolution=resolution, **options)
        made.scenes = nn.ModuleList(Mesh.of(scene, resolution, options) for scene in self.scenes)
        return made

    def save(self, folder: Path | str) -> Path:
        """Write parameters and description, and each mesh as an .obj file with the colours of its corners."""
        folder = Path(folder)
        save_tree(folder / STATE, dict(self.state_dict()))
        write_text(folder / SPEC, json.dumps({"kind": self.kind, "count": self.count, "options": self.options}))
        for i in range(self.count if self.kind == "mesh" else 0):
            write_text(folder / f"scene-{i}.obj", _obj(self.scenes[i]))
        return folder

    @classmethod
    def load(cls, source: Path | str) -> SceneSet:
        """The set that `save` wrote into a folder, or a fresh one by name and options: `points:count=256`,
        `pictures:count=64,channels=1,size=8`, `nerf:count=2,samples=32` (drawn from the option `seed`).

        Raises UnknownNameError for neither, ConfigError for wrong options, DamagedFileError for a folder that is none.
        """
        folder = Path(source)
        if (folder / SPEC).is_file():
            try:
                spec = json.loads((folder / SPEC).read_text(encoding="utf-8"))
                found = cls(spec["kind"], spec["count"], **spec["options"])
                found.load_state_dict(load_tree(folder / STATE))
                return found
            except (KeyError, ValueError, TypeError, RuntimeError) as error:
                raise DamagedFileError(f"{folder} does not hold a set of scenes ({error})") from error
        kind, _, text = str(source).partition(":")
        options = parse_options(text) if text else {}
        if kind == "points" and "dim" in options:
            options["shape"] = (options.pop("dim"),)
        if kind == "pictures":
            size = options.pop("size", 8)
            options["shape"] = (options.pop("channels", 1), size, size)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(options.pop("seed", 0))
            return cls(kind, options.pop("count", 1), **options)


@torch.no_grad()
def _obj(mesh: Mesh) -> str:
    points, faces = mesh.surface()
    colours = mesh.field(points)[1] if len(points) else points
    corners = [f"v {' '.join(f'{v:.6g}' for v in (*p, *c))}" for p, c in zip(points.tolist(), colours.tolist(),
                                                                            strict=True)]
    return "\n".join([*corners, *(f"f {a + 1} {b + 1} {c + 1}" for a, b, c in faces.tolist())]) + "\n"
