"""ProlificDreamer: its identities, what each part does, and real model classes."""

import json
from dataclasses import replace

import pytest
import torch
from torch import nn

import stillhouse
from stillhouse.data.sets import TensorSet
from stillhouse.diffusion.convert import eps_of
from stillhouse.diffusion.denoise import NetworkDenoiser
from stillhouse.diffusion.exact import GaussianMixture, particle_x0, smoothed_data
from stillhouse.diffusion.grids import two_phase_times
from stillhouse.diffusion.process import VPCosine
from stillhouse.errors import ConfigError, DataError, RoleError
from stillhouse.measures.score_distillation import score_gradient, sds_row, vsd_row
from stillhouse.models.cameras import Cameras
from stillhouse.models.denoisers import MLPDenoiser
from stillhouse.models.scenes import SceneSet
from stillhouse.recipes.fake_scores import fake_loss
from stillhouse.run import Run, fingerprint
from stillhouse.systems.scenes import prolificdreamer_vsd as system
from stillhouse.systems.scenes.prolificdreamer_vsd import EMBEDDED, Config, View, distill, predictions, stages
from stillhouse.zoo.denoisers import ball_pictures, gauss2d_teacher, views_teacher

PROCESS = VPCosine()
FLAT = replace(EMBEDDED, steps=4, batch=8, warmup=0.5)


def network():
    return NetworkDenoiser(MLPDenoiser((2,), 8, 2, classes=3), PROCESS, "v", null_condition=torch.tensor(3))


def gaussian(mean=0.7, std=0.4):
    return GaussianMixture(PROCESS, torch.tensor([[mean]]), torch.tensor([std]))


def points(n=8):
    torch.manual_seed(0)
    return SceneSet("points", n)


PROMPT = TensorSet(condition=torch.tensor([1]))


def read(kind, teacher, fake=None, scenes=None, y=None):
    scenes = scenes or points()
    g = torch.Generator().manual_seed(1)
    x, eps = torch.randn(8, 2, generator=g, dtype=torch.float64), torch.randn(8, 2, generator=g, dtype=torch.float64)
    t = torch.linspace(0.05, 0.95, 8, dtype=torch.float64)
    view = View(y, y, None, None)
    made = predictions(kind, teacher.double(), fake, scenes.double(), view, None, x, t, eps)
    return made, eps


# -------------------------------------------------------------------- exact checks


@pytest.mark.parametrize("scale", [1.0, 7.5])
def test_a_fake_score_that_says_the_noise_is_sds_for_the_same_draw(scale):
    made, eps = read("noise", network(), y=torch.ones(8, dtype=torch.long))
    found = {name: f() for name, f in made.items()}
    assert torch.equal(found["fake"], eps)
    assert torch.equal(score_gradient(found, vsd_row(scale)), score_gradient(found, sds_row(scale)))


def test_one_particle_at_the_closed_form_is_sds():
    """q = delta: the exact fake score of a single particle is the noise that was added to it."""
    x, eps = torch.randn(6, 3, dtype=torch.float64)[:1].expand(6, 3), torch.randn(6, 3, dtype=torch.float64)
    t = torch.linspace(0.1, 0.9, 6, dtype=torch.float64)
    x_t = PROCESS.noise(x, t, eps)
    x0 = particle_x0(x[:1], x_t, PROCESS.alpha(t), PROCESS.sigma(t))
    torch.testing.assert_close(eps_of(x0, x_t, PROCESS.alpha(t), PROCESS.sigma(t)), eps)


def test_a_fake_score_that_is_the_teacher_leaves_no_gradient():
    teacher = network()

    def fake(x_t, t, y, pose):
        return teacher(x_t, t, y)

    made, _ = read("network", teacher, fake, y=torch.ones(8, dtype=torch.long))
    assert not score_gradient({n: f() for n, f in made.items()}, vsd_row(1.0)).any()


def test_gaussian_residual():
    """Zero for all z if and only if mean and variance of the particles are the teacher's."""
    m, v = 0.7, 0.16
    z = torch.linspace(-3, 3, 9, dtype=torch.float64)[:, None]
    t = torch.full((9,), 0.4, dtype=torch.float64)
    alpha, sigma = PROCESS.alpha(t), PROCESS.sigma(t)
    teacher = gaussian(m, v**0.5)
    for mean, variance in ((m, v), (m, 0.3), (0.1, v), (0.1, 0.3)):
        fake = gaussian(mean, variance**0.5)
        residual = score_gradient({"prompt": eps_of(teacher(z, t), z, alpha, sigma),
                                   "fake": eps_of(fake(z, t), z, alpha, sigma)}, vsd_row(1.0))
        a, s = alpha[:1], sigma[:1]
        exact = s * ((z - a * m) / (a**2 * v + s**2) - (z - a * mean) / (a**2 * variance + s**2))
        torch.testing.assert_close(residual, exact, rtol=1e-5, atol=1e-7)
        assert (residual.abs().max() < 1e-6) == ((mean, variance) == (m, v))


def test_sds_contracts_to_the_mean():
    """The expected gradient over eps is w sigma alpha (x - m) / (alpha^2 v + sigma^2): antithetic noise gives it."""
    m, v, teacher = 0.7, 0.16, gaussian(0.7, 0.4)
    x = torch.linspace(-2, 2, 7, dtype=torch.float64)[:, None]
    t = torch.full((7,), 0.3, dtype=torch.float64)
    alpha, sigma = PROCESS.alpha(t), PROCESS.sigma(t)
    eps = torch.randn(7, 1, dtype=torch.float64)
    total = torch.zeros_like(x)
    for e in (eps, -eps):
        x_t = PROCESS.noise(x, t, e)
        total += score_gradient({"prompt": eps_of(teacher(x_t, t), x_t, alpha, sigma), "noise": e}, sds_row(1.0),
                                sigma**2) / 2
    a, s = alpha[:1], sigma[:1]
    torch.testing.assert_close(total, s**2 * s * a * (x - m) / (a**2 * v + s**2), rtol=1e-5, atol=1e-8)
    scenes = SceneSet("points", 64, shape=(1,))
    config = replace(EMBEDDED, steps=300, batch=64, fake="noise", lr=0.03)
    theta = distill(teacher, scenes, config=config, run=Run(quiet=True)).scenes.theta.detach()
    assert abs(float(theta.mean()) - m) < 0.1 and float(theta.std()) < 0.15


def test_the_exact_fake_score_is_the_mixture_over_particles():
    g = torch.Generator().manual_seed(0)
    particles, x_t = torch.randn(5, 2, generator=g, dtype=torch.float64), torch.randn(7, 2, generator=g).double()
    t = torch.linspace(0.2, 0.9, 7, dtype=torch.float64)
    expected = smoothed_data(PROCESS, particles, 1e-6)(x_t, t)
    torch.testing.assert_close(particle_x0(particles, x_t, PROCESS.alpha(t), PROCESS.sigma(t)), expected, rtol=1e-6,
                               atol=1e-6)


@pytest.mark.parametrize("fake", ["network", "lora"])
def test_each_step_leaves_the_other_parameters_without_gradients(fake):
    if fake == "lora":
        pytest.importorskip("peft")
    scenes, teacher, seen = points(), network(), []

    class Watched(Run):
        def step(self, optimizer, clip=None):
            own = [p for group in optimizer.param_groups for p in group["params"]]
            theta = any(p is scenes.scenes.theta for p in own)
            assert all(p.grad is not None for p in own)
            assert theta or scenes.scenes.theta.grad is None
            assert all(p.grad is None for p in teacher.parameters() if not any(p is o for o in own))
            seen.append(("theta" if theta else "phi", own))
            others = [p for name, ps in seen for p in ps if name != seen[-1][0]]
            assert all(p.grad is None for p in others)
            super().step(optimizer, clip)

    distill(teacher, scenes, PROMPT, network, replace(FLAT, fake=fake), Watched(quiet=True))
    assert [name for name, _ in seen] == ["phi"] * 2 + ["theta", "phi"] * 4


def test_two_phases_of_t():
    u = torch.linspace(0, 1, 11)
    early, late = (two_phase_times(u, p, (0.02, 0.98), 0.5, 0.2) for p in (0.19, 0.2))
    assert early[0] == late[0] == pytest.approx(0.02)
    assert early[-1] == pytest.approx(0.98) and late[-1] == pytest.approx(0.5)


# -------------------------------------------------------------------- what each part does


class Spy(nn.Module):
    """A denoiser that notes how it was called."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.process, self.null_condition = inner, inner.process, inner.null_condition
        self.parameterisation = "v"
        self.embed = nn.Linear(1, 8)
        self.calls = []

    def forward(self, x_t, t, condition=None):
        self.calls.append((t.detach().clone(), condition.clone()))
        return self.inner(x_t, t, condition)


def test_guidance_is_the_teachers_alone_and_t_of_phi_is_not_annealed():
    teacher, made = Spy(network()), []
    config = replace(FLAT, steps=60, batch=8, guidance=7.5, late=0.3, switch=0.0, warmup=0.0)

    def fake():
        made.append(Spy(network()))
        return made[-1]

    distill(teacher, points(), PROMPT, fake, config, Run(quiet=True))
    assert {int(c[0]) for _, c in teacher.calls[1:]} == {1, 3}
    calls = made[-1].calls
    assert {int(c[0]) for _, c in calls} == {1}
    theta, phi = (torch.cat([t for t, _ in calls[i::2]]) for i in (0, 1))
    assert theta.max() <= 0.3 and phi.max() > 0.9 and phi.min() < 0.1
    assert max(float(t.max()) for t, _ in teacher.calls[1:]) <= 0.3


def test_vsd_keeps_the_variance_that_sds_loses_and_the_closed_form_agrees():
    teacher = gaussian(0.7, 0.4)
    config = replace(EMBEDDED, steps=400, batch=64, lr=0.03, fake="exact")
    scenes = distill(teacher, SceneSet("points", 64, shape=(1,)), config=config, run=Run(quiet=True))
    theta = scenes.scenes.theta.detach()
    assert abs(float(theta.mean()) - 0.7) < 0.15 and 0.3 < float(theta.std()) < 0.5


def test_fake_scores_of_their_own_are_another_method():
    outcome = {}
    for shared in (True, False):
        run = Run(quiet=True).begin()
        scenes = points()
        outcome[shared] = distill(network(), scenes, PROMPT, network, replace(FLAT, steps=6, fake_lr=0.1,
                                                                              shared=shared), run).scenes.theta
    assert not torch.allclose(outcome[True], outcome[False])


def tiny3d(**changes):
    given = system.tiny()
    given["config"] = replace(given["config"], **changes)
    return given


def test_three_stages_and_how_to_skip_them():
    scenes = SceneSet("nerf", 1, samples=4)
    parts = [(s.name, s.steps, s.part, s.look, s.fake, s.guidance) for s in stages(scenes, Config())]
    assert parts == [("nerf", 25_000, "all", "colour", "lora", 7.5),
                     ("geometry", 15_000, "geometry", "normal", "noise", 100.0),
                     ("texture", 30_000, "texture", "colour", "lora", 7.5)]
    assert [s.steps for s in stages(points(), Config())] == [70_000, 0, 0]
    assert [s.steps for s in stages(SceneSet("mesh", 1, resolution=3), Config())] == [0, 15_000, 30_000]
    pytest.importorskip("peft")
    run = Run(quiet=True)
    target = distill(**tiny3d(geometry=0.0, texture=0.0), run=run)
    assert target.kind == "nerf" and {line["stage"] for line in run.history} == {"nerf/warm", "nerf/distil"}
    run = Run(quiet=True)
    assert distill(**tiny3d(), run=run).kind == "mesh"
    assert {line["stage"] for line in run.history} == {"nerf/warm", "nerf/distil", "geometry/distil", "texture/warm",
                                                       "texture/distil"}


def test_the_texture_stage_leaves_the_geometry_and_the_geometry_stage_the_texture():
    pytest.importorskip("peft")
    for stage, changes in (("geometry", {"geometry": 1.0, "texture": 0.0}),
                           ("texture", {"geometry": 0.0, "texture": 1.0})):
        given = tiny3d(**changes)
        torch.manual_seed(0)
        given["scenes"] = SceneSet("mesh", 2, resolution=4, resolutions=(2, 3), features=2, width=4)
        before = {k: v.clone() for k, v in given["scenes"].state_dict().items()}
        after = distill(**given, run=Run(quiet=True)).state_dict()
        changed = {k for k in before if not torch.equal(before[k], after[k])}
        geometry = {k for k in before if k.endswith((".sdf", ".shift"))}
        assert changed and (changed <= geometry if stage == "geometry" else not changed & geometry)


def test_the_prompt_follows_the_view_for_the_teacher_and_not_for_the_fake_score():
    scenes, run = SceneSet("nerf", 1, samples=4), Run(quiet=True)
    prompts = torch.tensor([9, 0, 1, 2, 3])
    for _ in run.loop("x", TensorSet(row=torch.zeros(200)), batch=200, steps=1):
        view = View.draw(200, scenes, prompts, Config(elevation=(-10.0, 89.0)), run)
    assert torch.equal(view.y_c, view.cameras.views()) and set(view.y_c.tolist()) == {0, 1, 2, 3}
    assert (view.y == 9).all() and view.pose.shape == (200, 4, 4)


def test_the_camera_is_left_out_one_time_in_ten():
    poses = []

    def fake(x_t, t, y, pose):
        poses.append(pose)
        return x_t

    fake.process, fake.parameterisation = PROCESS, "v"
    run = Run(quiet=True)
    pose = Cameras.draw(torch.rand(4000, 4)).extrinsic()
    for _ in run.loop("x", TensorSet(row=torch.zeros(4000)), batch=4000, steps=1):
        fake_loss(fake, torch.randn(4000, 2), run, pose=pose)
    free = (poses[0] == 0).flatten(1).all(1)
    assert 0.08 < float(free.float().mean()) < 0.12 and torch.equal(poses[0][~free], pose[~free])


def test_the_ball_teacher_knows_its_views():
    teacher = views_teacher(PROCESS, size=8, count=40)
    u = torch.rand(6, 4)
    cameras = Cameras.draw(u, (-10.0, 80.0))
    x, t = ball_pictures(cameras, 8), torch.full((6,), 0.02)
    found = teacher.class_log_probability(PROCESS.noise(x, t, torch.zeros_like(x)), t).argmax(1)
    assert (found == cameras.views()).sum() >= 4


# -------------------------------------------------------------------- bad input


def test_what_does_not_fit_is_refused_before_work():
    exact = gauss2d_teacher(PROCESS, labels=torch.arange(8) % 2)
    bad = points()
    with torch.no_grad():
        bad.scenes.theta[0] = float("nan")
    for kind, message, given in (
        (RoleError, "give network", {"teacher": exact, "config": replace(FLAT, fake="lora")}),
        (RoleError, "network=", {"teacher": exact, "network": None}),
        (RoleError, "1 or 5 rows", {"conditions": TensorSet(condition=torch.arange(3))}),
        (RoleError, "null condition", {"conditions": None, "config": replace(FLAT, guidance=2.0)}),
        (RoleError, "one noise process", {"network": lambda: NetworkDenoiser(MLPDenoiser((2,), 8, 2, classes=3),
                                                                            VPCosine(None), "v")}),
        (RoleError, "teacher", {"teacher": NetworkDenoiser(MLPDenoiser((3,), 8, 2, classes=3), PROCESS, "v")}),
        (DataError, "not finite", {"scenes": bad}),
        (RoleError, "must be a SceneSet", {"scenes": nn.Linear(2, 2)}),
    ):
        run = Run(quiet=True)
        given = {"teacher": network(), "scenes": points(), "conditions": PROMPT, "network": network, "config": FLAT,
                 **given}
        with pytest.raises(kind, match=message):
            distill(**given, run=run)
        assert not run.begun
    nerf = SceneSet("nerf", 1, samples=4)
    with pytest.raises(RoleError, match="exact fake score"):
        distill(network(), nerf, PROMPT, network, replace(FLAT, fake="exact", geometry=0, texture=0), Run(quiet=True))
    for field, value in (("geometry", 0.9), ("times", (0.5, 0.2)), ("shared", False), ("fake", "ema"), ("steps", 0)):
        with pytest.raises(ConfigError):
            Config(**{field: value})


# -------------------------------------------------------------------- real classes


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    """A random StableDiffusionPipeline of 8 x 8 latents, saved and loaded back."""
    diffusers, transformers = pytest.importorskip("diffusers"), pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("sd")
    letters = [chr(i) for i in range(97, 123)] + [","]
    vocabulary = {w: i for i, w in enumerate([*letters, *(c + "</w>" for c in letters), "<|startoftext|>",
                                             "<|endoftext|>"])}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = transformers.CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=12)
    torch.manual_seed(0)
    text = transformers.CLIPTextModel(transformers.CLIPTextConfig(
        vocab_size=len(vocabulary), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=12, eos_token_id=vocabulary["<|endoftext|>"]))
    unet = diffusers.UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, layers_per_block=1, norm_num_groups=4, block_out_channels=(8, 8),
        cross_attention_dim=16, attention_head_dim=2, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"))
    vae = diffusers.AutoencoderKL(block_out_channels=(8, 8), norm_num_groups=4, latent_channels=4, layers_per_block=1,
                                  down_block_types=("DownEncoderBlock2D",) * 2,
                                  up_block_types=("UpDecoderBlock2D",) * 2)
    scheduler = diffusers.DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012,
                                        prediction_type="v_prediction", steps_offset=1, clip_sample=False)
    diffusers.StableDiffusionPipeline(
        vae=vae, text_encoder=text, tokenizer=tokenizer, unet=unet, scheduler=scheduler, safety_checker=None,
        feature_extractor=None, requires_safety_checker=False).save_pretrained(folder / "whole")
    return diffusers.StableDiffusionPipeline.from_pretrained(folder / "whole", local_files_only=True)


def test_stable_diffusion_with_lora_and_all_stages(pipeline):
    pytest.importorskip("peft")
    from stillhouse.hub.diffusers import TextToImage
    from stillhouse.models.cameras import view_prompts

    teacher = TextToImage(pipeline)
    assert teacher.parameterisation == "v" and teacher.null_condition.shape == (12, 16)
    latents = teacher.encode(torch.zeros(1, 3, 32, 32))
    expected = pipeline.vae.encode(torch.zeros(1, 3, 16, 16)).latent_dist.mode() * pipeline.vae.config.scaling_factor
    torch.testing.assert_close(latents, expected)
    before = fingerprint(teacher)
    names = [n for n, _ in teacher.named_modules()]
    prompts = TensorSet(condition=teacher.embed(view_prompts("a cat")))
    torch.manual_seed(0)
    scenes = SceneSet("nerf", 1, samples=4, resolutions=(2, 4), features=2, width=8)
    config = Config(steps=6, geometry=1 / 3, texture=1 / 3, sizes=(8, 16), mesh=5)
    run = Run(quiet=True)
    target = distill(teacher, scenes, prompts, config=config, run=run)
    assert target.kind == "mesh" and len(target.scenes[0].surface()[1])
    assert fingerprint(teacher) == before and [n for n, _ in teacher.named_modules()] == names
    assert {line["stage"] for line in run.history} == {"nerf/distil", "geometry/distil", "texture/distil"}
    assert all("fake" in line for line in run.history if line["stage"] != "geometry/distil")


def test_the_teacher_of_a_pipeline_needs_its_parts():
    pytest.importorskip("diffusers")
    from types import SimpleNamespace

    from stillhouse.hub.diffusers import TextToImage

    with pytest.raises(RoleError, match="vae"):
        TextToImage(SimpleNamespace(unet=1, scheduler=1))


def test_the_command_line(tmp_path, monkeypatch, capsys):
    pytest.importorskip("peft")
    pytest.importorskip("rouge_score")
    from stillhouse.cli import main

    monkeypatch.chdir(tmp_path)
    main(["run", "prolificdreamer-vsd", "--teacher", "zoo:gauss2d", "--scenes", "points:count=16", "--config.fake",
          "exact", "--config.guidance", "1", "--config.steps", "3", "--config.batch", "16", "--out", "done", "--quiet"])
    assert "stillhouse.load('done')" in capsys.readouterr().out
    assert type(stillhouse.load("done")) is SceneSet
    assert SceneSet.load(tmp_path / "done" / "target").scenes.theta.shape == (16, 2)
