"""Cameras, volume rendering, surfaces and sets of scenes."""

import math

import pytest
import torch

from stillhouse.errors import ConfigError, DamagedFileError, UnknownNameError
from stillhouse.models.cameras import VIEWS, Cameras, view_prompts
from stillhouse.models.meshes import marching_tetrahedra, rasterise, tetrahedral_grid, vertex_normals
from stillhouse.models.radiance import RadianceField, volume_render
from stillhouse.models.scenes import SceneSet

CAMERAS = Cameras.draw(torch.rand(3, 4, generator=torch.Generator().manual_seed(0)))
FRONT = Cameras(*(torch.tensor([v]) for v in (0.0, 0.0, 2.0, math.pi / 3)))


def ball(points, radius=0.5):
    return 200.0 * (points.norm(dim=1) < radius), torch.ones(len(points), 1)


def surface(resolution=12, radius=0.47):
    vertices, tets = tetrahedral_grid(resolution)
    return marching_tetrahedra(vertices, radius - vertices.norm(dim=1), tets)


def test_cameras_look_at_the_origin_and_rays_agree_with_projection():
    matrix = CAMERAS.extrinsic()
    rotation = matrix[:, :3, :3]
    torch.testing.assert_close(rotation @ rotation.mT, torch.eye(3).expand(3, 3, 3), atol=1e-6, rtol=0)
    assert torch.allclose(torch.linalg.det(rotation), torch.ones(3))
    centre = CAMERAS.project(torch.zeros(3, 1, 3))
    torch.testing.assert_close(centre[:, 0], torch.stack([torch.zeros(3), torch.zeros(3), CAMERAS.distance], 1),
                               atol=1e-6, rtol=0)
    origin, direction = CAMERAS.rays(4)
    seen = CAMERAS.project(origin[:, None] + 1.3 * direction)[..., :2]
    line = torch.tensor([-0.75, -0.25, 0.25, 0.75])
    expected = torch.stack(torch.meshgrid(-line, line, indexing="ij")[::-1], -1).view(1, 16, 2).expand(3, 16, 2)
    torch.testing.assert_close(seen, expected, atol=1e-5, rtol=0)


def test_views_and_their_prompts():
    degrees = torch.tensor([[0, 0], [0, 44], [0, 90], [10, -100], [0, 180], [0, -136], [70, 0]]) * math.pi / 180
    cameras = Cameras(degrees[:, 0], degrees[:, 1], torch.ones(7), torch.ones(7))
    assert cameras.views().tolist() == [0, 0, 1, 1, 2, 2, 3]
    assert view_prompts("a cat")[1:3] == ["a cat, front view", "a cat, side view"] and len(VIEWS) == 4
    u = torch.rand(500, 4)
    drawn = Cameras.draw(u, (-10, 45), (1, 1.5), (40, 70))
    assert math.degrees(drawn.elevation.min()) >= -10 and math.degrees(drawn.elevation.max()) <= 45
    assert drawn.azimuth.min() < -3 and drawn.azimuth.max() > 3 and drawn.distance.min() >= 1
    with pytest.raises(ConfigError, match="low, high"):
        Cameras.draw(u, distance=(2.0, 1.0))


def test_volume_rendering_of_a_solid_ball():
    seen, opacity = volume_render(ball, FRONT, 32, 200)
    assert seen.shape == (1, 1, 32, 32)
    torch.testing.assert_close(seen, opacity)
    rim = math.tan(math.asin(0.5 / 2.0)) / math.tan(math.pi / 6)
    assert opacity[0, 0, 16, 16] > 0.99 and opacity[0, 0, 0, 0] == 0
    assert float(opacity.mean()) == pytest.approx(math.pi * rim**2 / 4, rel=0.05)


def test_volume_rendering_is_the_closed_form_in_a_uniform_density():
    uniform = lambda points: (torch.full((len(points),), 0.7), torch.full((len(points), 1), 0.3))  # noqa: E731
    for jitter in (None, torch.rand(1, 16, 50)):
        seen, opacity = volume_render(uniform, FRONT, 4, 50, 1.0, jitter)
        torch.testing.assert_close(opacity, torch.full_like(opacity, 1 - math.exp(-0.7 * 2)))
        torch.testing.assert_close(seen, 0.3 * opacity)


def test_objects_begin_as_a_blob_and_scenes_hollow():
    torch.manual_seed(0)
    points = torch.tensor([[0.0, 0, 0], [0.5, 0, 0], [0.95, 0, 0]])
    blob, room = RadianceField("object")(points)[0], RadianceField("scene")(points)[0]
    assert blob[0] > 8 > blob[1] > 0.1 > blob[2] and room[0] < 0.01 < 0.1 < room[1] < 8 < room[2]
    assert RadianceField("scene")(torch.tensor([[1.1, 0, 0]]))[0] == 0
    far = RadianceField("scene", radius=5.0)(torch.tensor([[0.0, 0, 0], [2.5, 0, 0], [4.9, 0, 0]]))[0]
    assert far[0] < 0.01 < far[1] < far[2]


def test_the_surface_of_a_ball_is_closed_round_and_turned_outwards():
    points, faces = surface()
    edges = torch.cat([faces[:, [0, 1]], faces[:, [1, 2]], faces[:, [2, 0]]])
    assert len(edges.unique(dim=0)) == len(edges), "each edge is used once in each direction"
    assert {tuple(e) for e in edges.tolist()} == {tuple(e) for e in edges.flip(1).tolist()}
    assert (points.norm(dim=1) - 0.47).abs().max() < 0.03
    a, b, c = points[faces].unbind(1)
    volume = float((a * torch.linalg.cross(b, c)).sum() / 6)
    assert volume == pytest.approx(4 / 3 * math.pi * 0.47**3, rel=0.08)
    assert len(points) - len(edges) // 2 + len(faces) == 2
    normals = vertex_normals(points, faces)
    assert (normals * torch.nn.functional.normalize(points, dim=1)).sum(1).min() > 0.9


def test_crossings_are_exact_for_a_linear_distance_and_carry_gradient():
    vertices, tets = tetrahedral_grid(3)
    vertices, offset = vertices.double(), torch.tensor(0.13, dtype=torch.float64, requires_grad=True)
    points, _ = marching_tetrahedra(vertices, offset - vertices[:, 2], tets)
    torch.testing.assert_close(points[:, 2], offset.expand(len(points)).detach())
    (slope,) = torch.autograd.grad(points[:, 2].mean(), offset)
    assert float(slope) == pytest.approx(1.0)


def test_rasterised_ball_agrees_with_the_volume_rendered_one():
    points, faces = surface()
    value, coverage = rasterise(points, faces, FRONT, 24, vertex_normals(points, faces), softness=0.1)
    _, opacity = volume_render(lambda p: ball(p, 0.47), FRONT, 24, 200)
    assert (coverage - opacity[0]).abs().mean() < 0.02
    assert value[2, 12, 12] > 0.95 and not value[:, 0, 0].any()
    assert value[0, 12, 15] > 0.3 and value[1, 8, 12] > 0.3


def test_coverage_has_gradient_that_grows_the_silhouette():
    points, faces = surface(8)
    size = torch.tensor(1.0, requires_grad=True)
    _, coverage = rasterise(points * size, faces, FRONT, 16, points)
    (slope,) = torch.autograd.grad(coverage.sum(), size)
    assert slope > 0


@pytest.mark.parametrize("name", ["points:count=3,dim=2", "pictures:count=3,size=4", "nerf:count=2,samples=4"])
def test_named_sets_are_functions_of_their_name_and_survive_saving(name, tmp_path):
    scenes = SceneSet.load(name)
    cameras, which = CAMERAS[:2], torch.tensor([1, 0])
    x = scenes.render(which, cameras, 4)
    assert torch.equal(x, SceneSet.load(name).render(which, cameras, 4)) and x.shape[0] == 2
    assert not torch.equal(x, SceneSet.load(f"{name},seed=1").render(which, cameras, 4))
    scenes.save(tmp_path)
    back = SceneSet.load(tmp_path)
    assert back.kind == scenes.kind and torch.equal(back.render(which, cameras, 4), x)
    if name.startswith("pictures"):
        assert x.shape[1:] == (1, 4, 4) and x.abs().max() < 1


def test_radiance_fields_become_meshes_of_the_same_place_and_colour(tmp_path):
    torch.manual_seed(0)
    fields = SceneSet("nerf", 2, samples=48)
    meshes = fields.meshes(10)
    which = torch.tensor([0, 1, 1])
    a, b = fields.render(which, CAMERAS, 12), meshes.render(which, CAMERAS, 12)
    assert a.shape == b.shape and (a - b).abs().mean() < 0.15
    points, _ = meshes.scenes[0].surface()
    colours = fields.scenes[0].field(points)[1]
    assert torch.equal(meshes.scenes[0].field(points)[1], colours)
    normals = meshes.render(which[:1], FRONT, 12, "normal")
    assert (normals[:, :, 0, 0] == -1).all() and normals.abs().max() <= 1 + 1e-6
    meshes.save(tmp_path)
    assert torch.equal(SceneSet.load(tmp_path).render(which, CAMERAS, 12), b)
    text = (tmp_path / "scene-1.obj").read_text()
    assert text.count("\nf ") == len(meshes.scenes[1].surface()[1])
    with pytest.raises(ConfigError, match="rendered in colour"):
        fields.render(which, CAMERAS, 4, "normal")
    with pytest.raises(ConfigError, match="only radiance fields"):
        meshes.meshes(4)


def test_an_empty_surface_shows_the_background_with_a_gradient_of_zero():
    scenes = SceneSet("mesh", 1, resolution=3)
    with torch.no_grad():
        scenes.scenes[0].sdf.fill_(-1)
    x = scenes.render(torch.tensor([0]), CAMERAS[:1], 4)
    assert (x == 0).all()
    x.sum().backward()
    assert not scenes.scenes[0].sdf.grad.any()


def test_parts_of_a_mesh_are_trained_apart():
    mesh = SceneSet("mesh", 2, resolution=4)
    geometry = {id(p) for g in mesh.groups(1.0, 0.1, "geometry") for p in g["params"]}
    texture = {id(p) for g in mesh.groups(1.0, 0.1, "texture") for p in g["params"]}
    assert geometry == {id(p) for s in mesh.scenes for p in (s.sdf, s.shift)} and not geometry & texture
    assert [g["lr"] for g in mesh.groups(1.0, 0.1)] == [1.0, 0.1]
    with pytest.raises(ConfigError, match="as a whole"):
        SceneSet("nerf", 1).groups(1.0, 0.1, "texture")


def test_wrong_sets_are_refused(tmp_path):
    with pytest.raises(UnknownNameError, match="points, pictures, nerf or mesh"):
        SceneSet.load("nothing")
    with pytest.raises(ConfigError, match="cannot be made"):
        SceneSet("points", 3, colour=1)
    with pytest.raises(ConfigError, match="at least one"):
        SceneSet("points", 0)
    (tmp_path / "scenes.json").write_text("{}")
    with pytest.raises(DamagedFileError):
        SceneSet.load(tmp_path)
