"""Consistency models: boundary condition, grid, closed forms, curriculum, multistep sampling, editing, diffusers."""

import json
import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import nn

from stillhouse.data.sets import TensorSet
from stillhouse.diffusion import consistency as engine
from stillhouse.diffusion.convert import to_x0
from stillhouse.diffusion.denoise import NetworkDenoiser
from stillhouse.diffusion.editing import colourisation, denoise, edit, inpainting, slerp, super_resolution
from stillhouse.diffusion.exact import GaussianMixture
from stillhouse.diffusion.grids import uniform
from stillhouse.diffusion.process import VE, Flow, TrigFlow, VPCosine, ddpm_linear
from stillhouse.diffusion.samplers import FewStepSampler, at
from stillhouse.errors import ConfigError, DataError, RoleError
from stillhouse.measures.sample_distances import sample_distance
from stillhouse.models.denoisers import MLPDenoiser
from stillhouse.run import Run
from stillhouse.systems.diffusion import consistency_models as cm

F64 = torch.float64
EDM = VE(0.002, 80.0)
SHORT = replace(cm.EMBEDDED, steps=3, batch=8, metric="l2")


def data(n=24):
    return TensorSet(x=torch.randn(n, 2, generator=torch.Generator().manual_seed(0)))


def denoiser(kind="edm", process=EDM, seed=0, boundary=True, **options):
    torch.manual_seed(seed)
    return NetworkDenoiser(MLPDenoiser((2,), 8, 2), process, kind, 0.5, boundary=boundary, **options)


@pytest.mark.parametrize("process", [EDM, VE(0.05, 5.0, 0), Flow(), TrigFlow(), VPCosine(), ddpm_linear(50)],
                         ids=lambda p: type(p).__name__)
@pytest.mark.parametrize("kind", ["edm", "trigflow", "v", "x0", "flow"])
def test_the_start_of_a_path_is_its_own_image_for_any_weights(kind, process):
    x = torch.randn(7, 2)
    assert torch.allclose(denoiser(kind, process)(x, torch.zeros(7)), x, rtol=1e-6, atol=1e-7)
    x, free = x.double(), denoiser("x0", process, boundary=False).double()
    assert torch.allclose(denoiser(kind, process).double()(x, torch.zeros(7, dtype=F64)), x, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(free(x, torch.zeros(7, dtype=F64)), x, atol=0.1)


def test_the_boundary_scales_are_the_papers():
    t = torch.tensor([0.0, 0.3, 1.0], dtype=F64)
    sigma = EDM.sigma(t)
    c_skip, c_out = engine_scales(EDM, t)
    assert torch.allclose(c_skip, 0.25 / ((sigma - 0.002) ** 2 + 0.25))
    assert torch.allclose(c_out, 0.5 * (sigma - 0.002) / (sigma**2 + 0.25).sqrt())
    assert c_skip[0] == 1 and c_out[0] == 0
    assert to_x0("edm", torch.ones(1, 2), torch.ones(1, 2), torch.ones(1), torch.tensor([0.002]), 0.5)[0, 0] != 1


def engine_scales(process, t):
    from stillhouse.diffusion.convert import boundary_scales

    return boundary_scales(process, t, 0.5)


@pytest.mark.parametrize("process", [Flow(), TrigFlow()], ids=["flow", "trigflow"])
def test_without_noise_at_the_start_the_boundary_scales_are_edms(process):
    torch.manual_seed(0)
    plain, bounded = denoiser(process=process, boundary=False), denoiser(process=process)
    x, t = torch.randn(9, 2), torch.linspace(0, 1, 9)
    assert torch.allclose(plain(x, t), bounded(x, t), atol=1e-6)


def test_the_grid_has_the_known_points():
    sigma = EDM.sigma(engine.rho_grid(2, EDM))
    assert torch.allclose(sigma, torch.tensor([0.002, 80.0], dtype=F64), rtol=1e-12)
    assert EDM.sigma(engine.rho_grid(3, EDM))[1].item() == pytest.approx(2.51522, abs=1e-5)
    assert EDM.sigma(engine.rho_grid(18, EDM))[:2].tolist() == pytest.approx([0.002, 0.007528], abs=1e-6)
    geometric = VE(0.002, 80.0, rho=0)
    assert torch.allclose(geometric.sigma(engine.rho_grid(18, geometric)), EDM.sigma(engine.rho_grid(18, EDM)))
    assert torch.allclose(engine.rho_grid(9, EDM), torch.linspace(0, 1, 9, dtype=F64))
    with pytest.raises(ConfigError, match="rho=0"):
        engine.rho_grid(4, Flow())
    assert engine.rho_grid(3, Flow(), rho=0).tolist() == [0, 0.5, 1]


def test_the_curriculum_has_the_known_ends():
    total = 800_000
    assert engine.points_at(0, total, 2, 150) == 2 and engine.points_at(total, total, 2, 150) == 151
    assert engine.decay_at(2, 2, 0.9) == pytest.approx(0.9)
    assert engine.decay_at(151, 2, 0.9) == pytest.approx(0.99861, abs=1e-5)
    counts = [engine.points_at(k, 1000, 2, 40) for k in range(1000)]
    assert counts == sorted(counts) and counts[0] == 2 and counts[-1] == 41
    config = replace(SHORT, s0=18, s1=17)
    assert {cm.schedule(k, False, config)[0] for k in range(3)} == {18}
    assert cm.schedule(2, True, config) == (config.points, config.mu)


def gaussian(process, mean=0.3, std=0.5):
    return GaussianMixture(process, torch.tensor([[mean]]), torch.tensor([std]))


class Exact(nn.Module):
    """The true consistency function of N(mean, std^2) on a VE process."""

    def __init__(self, process, mean=0.3, std=0.5):
        super().__init__()
        self.process, self.mean, self.std, self.null_condition = process, mean, std, None

    def forward(self, x_t, t, condition=None):
        sigma, eps = self.process.sigma(t)[:, None], self.process.sigma(torch.zeros_like(t))[:, None]
        return self.mean + (x_t - self.mean) * ((self.std**2 + eps**2) / (self.std**2 + sigma**2)).sqrt()


def test_on_a_gaussian_the_true_function_has_no_loss_on_fine_grids():
    process, exact = VE(0.002, 10.0), Exact(VE(0.002, 10.0))
    torch.manual_seed(0)
    losses = []
    for points in (20, 40, 80, 160):
        grid = engine.rho_grid(points, process)
        t, s = grid[1:], grid[:-1]
        x_t = 0.3 + (0.25 + process.sigma(t) ** 2).sqrt()[:, None] * torch.randn(len(t), 1, dtype=F64)
        x_s = engine.solver_step("heun", gaussian(process), x_t, t, s)
        f, goal = engine.consistency_pair(exact, exact, x_t, t, x_s, s)
        losses.append(float(sample_distance("l2", f, goal).mean()))
    assert losses[-1] < 1e-9 and all(b < a / 3 for a, b in pairwise(losses))
    x_t = process.prior(torch.randn(50, 1, dtype=F64))
    end = engine.follow("heun", gaussian(process), x_t, uniform(400))
    assert torch.allclose(end, exact(x_t, at(1.0, x_t)), atol=5e-4)


def quantile_map(x, sigma, eps, means, stds, weights):
    """F_eps^-1(F_sigma(x)) of a one-dimensional mixture, by bisection."""
    def cdf(v, level):
        z = (v[:, None] - means) / (stds**2 + level**2).sqrt()
        return (weights * 0.5 * (1 + torch.erf(z / math.sqrt(2)))).sum(1)

    goal, low, high = cdf(x, sigma), torch.full_like(x, -6), torch.full_like(x, 6)
    for _ in range(80):
        middle = (low + high) / 2
        above = cdf(middle, eps) > goal
        low, high = torch.where(above, low, middle), torch.where(above, middle, high)
    return (low + high) / 2


def test_in_one_dimension_the_flow_is_the_quantile_map_and_a_student_learns_it():
    process = VE(0.01, 4.0)
    means, stds = torch.tensor([-0.6, 0.5], dtype=F64), torch.tensor([0.25, 0.35], dtype=F64)
    weights = torch.tensor([0.35, 0.65], dtype=F64)
    teacher = GaussianMixture(process, means[:, None], stds, weights)
    torch.manual_seed(0)
    x_t = process.prior(torch.randn(400, 1, dtype=F64))
    expected = quantile_map(x_t[:, 0], 4.0, 0.01, means, stds, weights)
    end = engine.follow("heun", teacher, x_t, uniform(400))
    assert torch.allclose(end[:, 0], expected, atol=2e-3)
    samples = TensorSet(x=teacher.sample(4000, generator=torch.Generator().manual_seed(1))[0])
    student = NetworkDenoiser(MLPDenoiser((1,), 64, 2), process, "edm", 0.5, boundary=True)
    config = replace(cm.EMBEDDED, steps=600)
    sampler = cm.distill(student, samples, teacher, config=config, run=Run(quiet=True))
    with torch.no_grad():
        error = sampler.denoiser(x_t.float(), torch.ones(400))[:, 0] - expected
    assert error.square().mean().sqrt() < 0.16 < 0.3 * expected.std()


LEVELS = torch.tensor([0.002, 0.1, 0.5, 1.0, 3.0], dtype=F64)


def test_linear_models_of_a_gaussian_have_one_minimiser_in_training_and_in_euler_distillation():
    process, std = VE(0.002, 3.0), 0.5
    teacher, grid = gaussian(process, 0.0), process.time(LEVELS)
    torch.manual_seed(0)
    x, z = torch.randn(2, 400_000, 1, dtype=F64)
    fits = {"ct": [1.0], "cd": [1.0]}
    for i in range(1, 5):
        t, s = (grid[j].expand(len(x)) for j in (i, i - 1))
        x_t = process.noise(std * x, t, z)
        lower = {"ct": process.noise(std * x, s, z), "cd": engine.solver_step("euler", teacher, x_t, t, s)}
        for name, x_s in lower.items():
            fits[name].append(float((x_t * x_s).sum() / x_t.square().sum()) * fits[name][-1])
    expected = [1.0, 0.96231, 0.57738, 0.34643, 0.12172]
    factor = [1.0]
    for low, high in pairwise(LEVELS):
        factor.append(factor[-1] * float(1 - (high - low) * high / (std**2 + high**2)))
    assert factor == pytest.approx(expected, abs=1e-5)
    assert fits["cd"] == pytest.approx(expected, abs=1e-5)
    assert fits["ct"] == pytest.approx(expected, abs=4e-3)
    true = ((std**2 + 0.002**2) / (std**2 + LEVELS**2)).sqrt()
    assert true[1:].tolist() == pytest.approx([0.98059, 0.70711, 0.44722, 0.16440], abs=1e-5)


def test_a_heun_step_calls_the_teacher_twice_and_a_last_step_to_clean_data_is_x0():
    calls = []

    class Counted(GaussianMixture):
        def forward(self, x_t, t, condition=None):
            calls.append(t)
            return super().forward(x_t, t, condition)

    for process, solver, count in ((EDM, "heun", 2), (EDM, "euler", 1), (EDM, "ddim", 1)):
        calls.clear()
        teacher = Counted(process, torch.zeros(1, 2), torch.ones(1))
        engine.solver_step(solver, teacher, torch.randn(3, 2), at(0.5, torch.zeros(3)), at(0.4, torch.zeros(3)))
        assert len(calls) == count
    teacher = gaussian(Flow())
    x_t, t, s = torch.randn(4, 1), torch.full((4,), 0.3), torch.tensor([0.0, 0.0, 0.1, 0.2])
    stepped = engine.solver_step("heun", teacher, x_t, t, s)
    assert torch.allclose(stepped[:2], teacher(x_t, t)[:2]) and stepped.isfinite().all()


def test_targets_and_jumps():
    s = torch.tensor([0.0, 0.2, 0.5, 0.7])
    assert engine.target_time("zero", s).tolist() == [0, 0, 0, 0]
    assert engine.target_time("pair", s) is s
    assert engine.target_time("edge", s, (0.0, 0.5, 1.0)).tolist() == [0, 0, 0.5, 0.5]
    with pytest.raises(ConfigError, match="rise"):
        engine.target_time("edge", s, (0.5, 1.0))
    model, x, t = denoiser(), torch.randn(4, 2), torch.full((4,), 0.7)
    assert torch.allclose(engine.jump(model, x, t, torch.zeros(4)), model(x, t))
    assert torch.allclose(engine.jump(model, x, t, t), x, atol=1e-6)
    f, goal = engine.consistency_pair(model, model, x, t, x, s, r=s)
    assert torch.allclose(goal[1:], x[1:], atol=1e-5) and not torch.allclose(f[1:], x[1:], atol=1e-3)


def test_both_points_of_a_pair_see_one_dropout_mask_and_the_anchor_gets_no_gradient():
    torch.manual_seed(0)
    network = MLPDenoiser((2,), 32, 2)
    network.layers[1] = nn.Sequential(nn.Dropout(0.5), network.layers[1])
    model = NetworkDenoiser(network, EDM, "edm", 0.5, boundary=True).train()
    x, t = torch.randn(5, 2), torch.full((5,), 0.6)
    f, goal = engine.consistency_pair(model, model, x, t, x, t)
    assert torch.equal(f.detach(), goal) and f.requires_grad and not goal.requires_grad
    again, _ = engine.consistency_pair(model, model, x, t, x, t)
    assert not torch.equal(f, again)


def test_metrics():
    x, y = torch.tensor([[3.0, 4.0], [0.0, 0.0]]), torch.zeros(2, 2)
    assert sample_distance("l1", x, y).tolist() == [3.5, 0]
    assert sample_distance("l2", x, y).tolist() == [12.5, 0]
    assert sample_distance("pseudo_huber", x, y, c=12.0).tolist() == [1.0, 0]
    assert sample_distance("pseudo_huber", 1e-3 * x, y)[0] < 0.005
    layers = nn.ModuleList([nn.Conv2d(1, 3, 3), nn.Conv2d(1, 2, 3)])
    a, b = torch.randn(2, 2, 1, 8, 8)
    distance = sample_distance("lpips", a, b, lambda v: [layer(v) for layer in layers])
    assert distance.shape == (2,) and (distance > 0).all()
    assert torch.equal(sample_distance("lpips", a, a, layers[0]), torch.zeros(2))
    assert sample_distance("lpips", a, 2 * a, nn.Flatten()).max() < 1e-10
    with pytest.raises(ConfigError, match="lpips"):
        sample_distance("lpips", a, b)


def test_multistep_sampling_adds_the_noise_that_is_missing():
    seen = []

    class Recorder(nn.Module):
        process, null_condition = EDM, None

        def forward(self, x_t, t, condition=None):
            seen.append((x_t, t))
            return torch.full_like(x_t, 2.0)

    z, fresh = torch.ones(1, 2, dtype=F64), torch.full((1, 2), -1.0, dtype=F64)
    x = FewStepSampler(Recorder(), (1.0, 0.5, 0.0), "consistency")(z, noise=lambda x: fresh)
    tau = EDM.sigma(torch.tensor(0.5, dtype=F64))
    assert torch.equal(x, torch.full_like(x, 2.0)) and len(seen) == 2
    assert torch.allclose(seen[0][0], 80 * z) and seen[1][1].item() == 0.5
    assert torch.allclose(seen[1][0], 2 - (tau**2 - 0.002**2).sqrt() * z, atol=1e-12)


def test_multistep_samples_of_a_gaussian_keep_its_variance():
    process = VE(0.2, 10.0)
    torch.manual_seed(0)
    x = FewStepSampler(Exact(process), (1.0, 0.5, 0.3, 0.0), "consistency")(torch.randn(200_000, 1, dtype=F64))
    assert x.mean().item() == pytest.approx(0.3, abs=0.01)
    assert x.var().item() == pytest.approx(0.25 + 0.04, abs=0.01)


def test_times_are_found_one_by_one():
    best = (0.7, 0.2)
    found = engine.greedy_times(lambda times: sum((a - b) ** 2 for a, b in zip(times[1:-1], best, strict=False)), 3)
    assert found[0] == 1 and found[-1] == 0 and found[1:-1] == pytest.approx(best, abs=0.02)
    assert engine.greedy_times(lambda times: 0.0, 1) == (1.0, 0.0)


@pytest.mark.parametrize("known,shape", [
    (inpainting(torch.rand(1, 8, 8) < 0.5), (3, 8, 8)), (colourisation(), (3, 8, 8)), (super_resolution(4), (2, 8, 8)),
], ids=["inpainting", "colourisation", "super-resolution"])
def test_an_edit_is_an_orthogonal_projection_that_keeps_what_is_known(known, shape):
    torch.manual_seed(0)
    x, y = torch.randn(2, 2, *shape, dtype=F64)
    assert torch.allclose(known.synthesise(known.analyse(x)), x, atol=1e-12)
    assert torch.allclose(known.analyse(x).square().sum(), x.square().sum())
    projected = known.project(x, y)
    assert torch.allclose(known.project(projected, y), projected, atol=1e-12)
    mask = known.known.expand_as(known.analyse(x))
    assert torch.allclose(known.analyse(projected)[mask], known.analyse(y)[mask], atol=1e-12)
    assert torch.allclose(known.analyse(projected)[~mask], known.analyse(x)[~mask], atol=1e-12)
    network = NetworkDenoiser(MLPDenoiser(shape, 8, 1), EDM, "edm", 0.5, boundary=True).double()
    edited = edit(network, y, known, (1.0, 0.6, 0.3, 0.0))
    assert torch.allclose(known.analyse(edited)[mask], known.analyse(y)[mask], atol=1e-10)
    other = known.project(torch.randn_like(y), y)
    torch.manual_seed(1)
    first = edit(network, y, known, (1.0, 0.5, 0.0))
    torch.manual_seed(1)
    assert torch.allclose(edit(network, other, known, (1.0, 0.5, 0.0)), first, atol=1e-9)


def test_grey_values_and_patch_means_are_the_coefficients_kept():
    x = torch.rand(2, 3, 8, 8, dtype=F64)
    weights = torch.tensor([0.2989, 0.5870, 0.1140], dtype=F64)
    grey = torch.einsum("c,nchw->nhw", weights, x) / weights.norm()
    assert torch.allclose(colourisation().analyse(x)[:, 0], grey)
    means = nn.functional.avg_pool2d(x, 4)
    assert torch.allclose(super_resolution(4).analyse(x)[:, 0], 4 * means)
    with pytest.raises(DataError, match="patches"):
        super_resolution(3).analyse(x)


def test_an_edit_of_a_gaussian_moves_the_unknown_towards_its_conditional_mean():
    process = VE(0.002, 10.0)
    spread = torch.tensor([[[0.25, 0.2], [0.2, 0.25]]])
    teacher = GaussianMixture(process, torch.zeros(1, 2), spread)

    class Flowed(nn.Module):
        def __init__(self):
            super().__init__()
            self.process, self.null_condition = process, None

        def forward(self, x_t, t, condition=None):
            own, total = 1 + 0 * teacher.variances[0], teacher.variances[0] + process.sigma(t)[:, None] ** 2
            scale = (teacher.variances[0] / total * own).sqrt()
            return torch.einsum("bd,de,be,fe->bf", x_t, teacher.axes[0], scale, teacher.axes[0])

    torch.manual_seed(0)
    y = torch.full((20_000, 2), 0.4, dtype=F64)
    x = edit(Flowed(), y, inpainting(torch.tensor([True, False])), uniform(24))
    assert torch.equal(x[:, 0], y[:, 0])
    assert 0.15 < x[:, 1].mean().item() < 0.35


def test_interpolation_and_denoising():
    a, b = torch.randn(2, 4, 2, dtype=F64)
    assert torch.allclose(slerp(a, b, 0.0), a) and torch.allclose(slerp(a, b, 1.0), b)
    unit_a, unit_b = (v / v.norm(dim=1, keepdim=True) for v in (a, b))
    assert torch.allclose(slerp(unit_a, unit_b, 0.3).norm(dim=1), torch.ones(4, dtype=F64))
    exact, x = Exact(EDM), torch.randn(4, 1, dtype=F64)
    assert torch.allclose(denoise(exact, x, 1.5), exact(x, EDM.time(torch.full((4,), 1.5, dtype=F64))))


def test_the_student_starts_from_the_teacher_and_the_average_is_returned():
    teacher, student, run = denoiser(boundary=False), denoiser(seed=1), Run(quiet=True)
    sampler = cm.distill(student, data(), teacher, config=replace(SHORT, init="teacher", lr=1e-12), run=run)
    for name, value in teacher.state_dict().items():
        assert torch.allclose(student.state_dict()[name], value, atol=1e-9)
    assert sampler.denoiser is not student and sampler.mode == "consistency"
    assert [line["consistency"] >= 0 for line in run.history if "consistency" in line] == [True] * 3
    plain = cm.distill(student, data(), teacher, config=replace(SHORT, ema=0.0), run=Run(quiet=True))
    assert all(torch.equal(a, b) for a, b in zip(plain.denoiser.parameters(), student.parameters(), strict=True))


@pytest.mark.parametrize("changes", [{"metric": "l1"}, {"solver": "euler"}, {"solver": "ddim", "mu": 0.95}])
@pytest.mark.parametrize("taught", [True, False])
def test_every_form_runs(changes, taught):
    teacher = denoiser(boundary=False) if taught else None
    run = Run(quiet=True)
    cm.distill(denoiser(seed=1), data(), teacher, config=replace(SHORT, **changes), run=run)
    assert run.history[-1]["consistency"] >= 0


def test_a_sampler_is_saved_and_loaded(tmp_path):
    sampler = cm.distill(denoiser(), data(), config=replace(SHORT, times=(1.0, 0.4, 0.0)), run=Run(quiet=True))
    loaded = FewStepSampler.load(sampler.save(tmp_path), MLPDenoiser((2,), 8, 2))
    z = torch.randn(3, 2)
    assert torch.equal(loaded(z, noise=torch.zeros_like), sampler(z, noise=torch.zeros_like))
    assert loaded.denoiser.boundary and loaded.mode == "consistency"


def test_bad_roles_and_settings_are_named():
    with pytest.raises(RoleError, match="boundary=True"):
        cm.distill(denoiser(boundary=False, kind="x0"), data(), config=SHORT)
    with pytest.raises(RoleError, match="perceptual"):
        cm.distill(denoiser(), data(), config=replace(SHORT, metric="lpips"))
    with pytest.raises(RoleError, match="makes no features"):
        cm.distill(denoiser(), data(), None, nn.Conv2d(3, 4, 3), replace(SHORT, metric="lpips"))
    with pytest.raises(RoleError, match="one noise process"):
        cm.distill(denoiser(), data(), denoiser(process=VE(0.05, 5.0)), config=SHORT)
    with pytest.raises(RoleError, match="no weights to copy"):
        exact = GaussianMixture(EDM, torch.zeros(1, 2), torch.ones(1))
        cm.distill(denoiser(), data(), exact, config=replace(SHORT, init="teacher"))
    with pytest.raises(ConfigError, match="rho=0"):
        cm.distill(denoiser(process=Flow()), data(), config=SHORT)
    with pytest.raises(ConfigError, match="s1"):
        cm.Config(s0=5, s1=3)


def unet(diffusers, seed=0):
    torch.manual_seed(seed)
    return diffusers.UNet2DModel(sample_size=8, in_channels=3, out_channels=3, layers_per_block=1, norm_num_groups=4,
                                 block_out_channels=(8, 8), num_class_embeds=3, resnet_time_scale_shift="scale_shift",
                                 down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2).eval()


def test_a_diffusers_edm_teacher_becomes_a_consistency_pipeline(tmp_path):
    diffusers = pytest.importorskip("diffusers")
    from stillhouse.hub.diffusers import from_diffusers, save_pretrained
    from stillhouse.hub.folders import denoiser_from

    scheduler = diffusers.EDMEulerScheduler(sigma_min=0.002, sigma_max=80.0, sigma_data=0.5)
    teacher = from_diffusers(unet(diffusers), scheduler)
    consistency = diffusers.CMStochasticIterativeScheduler()
    student = from_diffusers(unet(diffusers, 1), consistency)
    assert student.boundary and student.process == teacher.process == EDM
    pictures = TensorSet(x=torch.rand(8, 3, 8, 8) * 2 - 1, condition=torch.arange(8) % 3)
    config = replace(SHORT, steps=2, batch=4, times=(1.0, 1 - 22 / 39, 0.0), metric="lpips", init="given", bound=1.0)
    features = nn.Conv2d(3, 4, 3)
    sampler = cm.distill(student, pictures, teacher, features, config, Run(quiet=True))
    save_pretrained(sampler, tmp_path)
    written = diffusers.CMStochasticIterativeScheduler.from_pretrained(tmp_path / "scheduler")
    pipeline = diffusers.ConsistencyModelPipeline(
        diffusers.UNet2DModel.from_pretrained(tmp_path / "network"), written)
    pipeline.set_progress_bar_config(disable=True)
    z, generator = torch.randn(2, 3, 8, 8), torch.Generator().manual_seed(1)
    listed = json.loads((tmp_path / "timesteps.json").read_text())
    theirs = pipeline(2, class_labels=[0, 2], latents=z.clone(), timesteps=listed, num_inference_steps=None,
                      generator=generator, output_type="pt").images
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        ours = sampler(z, torch.tensor([0, 2]), lambda x: torch.randn(x.shape, generator=generator))
    assert torch.allclose(theirs, ours / 2 + 0.5, atol=2e-3)
    again = denoiser_from(tmp_path)
    with torch.no_grad():
        expected = sampler.denoiser(z, torch.full((2,), 0.7), torch.tensor([0, 2]))
        assert torch.allclose(again(z, torch.full((2,), 0.7), torch.tensor([0, 2])), expected, atol=1e-4)


def test_the_edm_teachers_of_diffusers_give_the_schedulers_x0():
    diffusers = pytest.importorskip("diffusers")
    from stillhouse.hub.diffusers import from_diffusers

    scheduler = diffusers.EDMEulerScheduler(sigma_min=0.002, sigma_max=80.0, sigma_data=0.5)
    scheduler.set_timesteps(6)
    teacher, x = from_diffusers(unet(diffusers), scheduler), torch.randn(2, 3, 8, 8)
    for k in (0, 3):
        fresh = diffusers.EDMEulerScheduler(sigma_min=0.002, sigma_max=80.0, sigma_data=0.5)
        fresh.set_timesteps(6)
        fresh.set_begin_index(k)
        sigma = float(fresh.sigmas[k])
        with torch.no_grad():
            raw = teacher.network.model(fresh.scale_model_input(x, fresh.timesteps[k]), fresh.timesteps[k],
                                        class_labels=torch.tensor([0, 1])).sample
            expected = fresh.step(raw, fresh.timesteps[k], x).pred_original_sample
            t = EDM.time(torch.tensor([sigma, sigma]))
            assert torch.allclose(teacher(x, t, torch.tensor([0, 1])), expected, rtol=1e-3, atol=1e-3)
