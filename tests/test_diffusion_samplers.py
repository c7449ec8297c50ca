"""Steps, chains, guidance, network denoisers and the few-step sampler."""

import math

import pytest
import torch
from torch import nn

from stillhouse.diffusion import grids
from stillhouse.diffusion.denoise import NetworkDenoiser, copy_weights
from stillhouse.diffusion.exact import GaussianMixture
from stillhouse.diffusion.guidance import Guided
from stillhouse.diffusion.process import VE, Flow, TrigFlow, VPCosine, ddpm_linear
from stillhouse.diffusion.samplers import (
    FewStepSampler,
    SamplerLadder,
    at,
    ddim_rollout,
    ddim_step,
    ddim_target,
    euler_step,
    heun_step,
    ode_endpoint,
    renoise_chain,
    rollout_target,
)
from stillhouse.errors import ConfigError, RoleError, StoreError
from stillhouse.models.denoisers import MLPDenoiser

F64 = torch.float64


def normal(process, std=1.0, mean=0.0, dim=2):
    return GaussianMixture(process, torch.full((1, dim), mean), torch.full((1,), std))


def network(process=None, kind="v", **options):
    torch.manual_seed(0)
    outputs = 2 if kind == "joint" else 1
    net = MLPDenoiser((2,), 16, 3, outputs=outputs, **options)
    return NetworkDenoiser(net, process or VPCosine(), kind)


@pytest.mark.parametrize("process", [VPCosine(), ddpm_linear(64), VE(), Flow(), TrigFlow(0.5)], ids=repr)
def test_target_is_the_x0_that_makes_one_step_land_there(process):
    torch.manual_seed(0)
    teacher = GaussianMixture(process, torch.randn(5, 2, dtype=F64), torch.rand(5, dtype=F64) + 0.1)
    n = 8
    i = torch.arange(1, n + 1, dtype=F64)
    t, mid, s = i / n, (i - 0.5) / n, (i - 1) / n
    x_t = torch.randn(n, 2, dtype=F64)
    landed = ddim_rollout(teacher, x_t, (t, mid, s))
    target = rollout_target(teacher, x_t, (t, mid, s))
    assert torch.allclose(ddim_step(process, x_t, target, t, s), landed, rtol=1e-12, atol=1e-12)
    x_mid = ddim_step(process, x_t, teacher(x_t, t), t, mid)
    assert torch.equal(target[0], teacher(x_mid, mid)[0])
    assert torch.allclose(ddim_target(process, x_t, landed, t, s), target)


@pytest.mark.parametrize("steps,factor", [(1, 0.0), (2, 0.5), (4, 0.728553), (8, 0.856232)])
def test_ddim_on_standard_normal_data_multiplies(steps, factor):
    z = torch.randn(6, 2, dtype=F64)
    x = FewStepSampler(normal(VPCosine(None)), grids.uniform(steps))(z)
    assert torch.allclose(x, math.cos(math.pi / 2 / steps) ** steps * z, atol=1e-12)
    assert torch.allclose(x, factor * z, atol=1e-6)


def test_ddim_goes_up_and_down():
    process = VPCosine()
    x_t, x0 = torch.randn(2, 4, 2, dtype=F64)
    t, s = torch.full((4,), 0.3, dtype=F64), torch.full((4,), 0.8, dtype=F64)
    up = ddim_step(process, x_t, x0, t, s)
    assert torch.allclose(ddim_step(process, up, x0, s, t), x_t)


@pytest.mark.parametrize("process", [VE(0.01, 20.0), Flow()], ids=repr)
def test_euler_is_ddim_on_straight_paths(process):
    teacher = normal(process, 0.7, 0.4)
    x_t, t, s = torch.randn(4, 2, dtype=F64), torch.full((4,), 0.8, dtype=F64), torch.full((4,), 0.6, dtype=F64)
    assert torch.allclose(euler_step(teacher, x_t, t, s), ddim_step(process, x_t, teacher(x_t, t), t, s))


@pytest.mark.parametrize("process", [VPCosine(), VE(0.01, 20.0), Flow(), TrigFlow(1.0)], ids=repr)
def test_heun_is_second_order_towards_the_exact_flow(process):
    std, mean = 0.6, 0.5
    teacher = normal(process, std, mean)
    t, s = 0.9, 0.2
    x_t = torch.randn(64, 2, dtype=F64)

    def scale(time):
        time = torch.tensor(time, dtype=F64)
        return process.alpha(time), (process.alpha(time) ** 2 * std**2 + process.sigma(time) ** 2).sqrt()

    (a, before), (b, after) = scale(t), scale(s)
    exact = b * mean + (x_t - a * mean) * after / before
    errors = {}
    for name, step in (("euler", euler_step), ("heun", heun_step)):
        for n in (32, 64):
            x = x_t
            for i in range(n):
                x = step(teacher, x, at(t + (s - t) * i / n, x), at(t + (s - t) * (i + 1) / n, x))
            errors[name, n] = (x - exact).abs().mean().item()
    assert errors["heun", 64] < 0.1 * errors["euler", 64]
    assert errors["heun", 32] / errors["heun", 64] == pytest.approx(4, rel=0.15)


def test_ode_endpoint_is_the_quantile_map_in_one_dimension():
    z = torch.randn(200, 1, dtype=F64)
    teacher = GaussianMixture(VPCosine(), torch.tensor([[-1.0], [1.0]], dtype=F64), torch.full((2,), 0.3))
    x = ode_endpoint(teacher, z, grids.uniform(200))
    cdf = 0.5 * (torch.distributions.Normal(-1, 0.3).cdf(x) + torch.distributions.Normal(1, 0.3).cdf(x))
    assert torch.allclose(cdf, torch.distributions.Normal(0, 1).cdf(z), atol=2e-3)
    coarse = ode_endpoint(teacher, z, grids.uniform(200), order=1)
    assert (coarse - x).abs().mean() < 0.02


def test_renoise_chain_of_a_point_is_the_exact_kernel():
    process, centre = VPCosine(), torch.tensor([[2.0, -1.0]])
    point = GaussianMixture(process, centre, torch.tensor([1e-6]))
    x = torch.randn(3, 2, dtype=F64)
    noises = []

    def noise(like):
        noises.append(torch.randn_like(like))
        return noises[-1]

    reached = renoise_chain(point, x, (1.0, 0.7, 0.4), noise=noise)
    t = torch.full((3,), 0.4, dtype=F64)
    expected = process.noise(centre.double().expand(3, 2), t, noises[1])
    assert len(noises) == 2 and torch.allclose(reached, expected, atol=1e-9)
    assert torch.equal(renoise_chain(point, x, (1.0,)), x)


def test_gradients_flow_through_rollouts_to_the_input():
    teacher = normal(VPCosine(), 0.5)
    x = torch.randn(3, 2, dtype=F64, requires_grad=True)
    (gradient,) = torch.autograd.grad(ddim_rollout(teacher, x, (0.9, 0.5, 0.1)).sum(), x)
    assert (gradient.abs() > 0).all()


@pytest.mark.parametrize("kind", ["x0", "eps", "v", "flow", "edm", "trigflow", "joint"])
def test_network_denoiser_reads_every_parameterisation(kind):
    denoiser = network(kind=kind)
    x, t = torch.randn(5, 2), torch.linspace(0.1, 0.9, 5)
    out = denoiser(x, t)
    assert out.shape == x.shape and out.isfinite().all()
    assert denoiser.features(x, t).shape == (5, 16)
    assert not denoiser.inner()._forward_hooks


def test_features_carry_gradient_and_stop_before_the_last_layers():
    denoiser = network()
    x = torch.randn(3, 2, requires_grad=True)
    denoiser.features(x, torch.rand(3)).sum().backward()
    assert x.grad.abs().sum() > 0
    assert denoiser.network.leave.weight.grad is None and denoiser.network.layers[0].weight.grad is not None
    with pytest.raises(RoleError, match="name the path"):
        NetworkDenoiser(nn.Linear(2, 2), VPCosine()).features(x, torch.rand(3))


def test_input_is_scaled_to_unit_variance():
    class Spy(nn.Module):
        def forward(self, x, t, condition=None):
            self.seen = x
            return x

    process = VE(0.05, 5.0)
    spy = Spy()
    t = torch.full((4000,), 0.8)
    x = process.noise(1.4 * torch.randn(4000, 2), t, torch.randn(4000, 2))
    NetworkDenoiser(spy, process, "edm", sigma_data=1.4)(x, t)
    assert spy.seen.std().item() == pytest.approx(1, rel=0.05)
    NetworkDenoiser(spy, process, "edm", sigma_data=1.4, scale_input=False)(x, t)
    assert torch.equal(spy.seen, x)


def test_guidance_follows_its_convention_and_counts_calls():
    teacher = GaussianMixture(VPCosine(), torch.tensor([[2.0, 0.0], [-2.0, 0.0]]), torch.full((2,), 0.5),
                              labels=torch.tensor([0, 1]))
    x, t, c = torch.randn(6, 2, dtype=F64, requires_grad=True), torch.full((6,), 0.5, dtype=F64), torch.arange(6) % 2
    cond, uncond = teacher(x, t, c), teacher(x, t)
    guided = Guided(teacher, 3.0)
    out = guided(x, t, c)
    assert torch.allclose(out, uncond + 3 * (cond - uncond)) and guided.calls == 2
    w = 2.0
    assert torch.allclose(out, (1 + w) * cond - w * uncond)
    assert torch.autograd.grad(out.sum(), x)[0].abs().sum() > 0
    plain = Guided(teacher, 1.0)
    assert torch.equal(plain(x, t, c), cond) and plain.calls == 1
    with pytest.raises(RoleError, match="null condition"):
        Guided(network(), 2.0)
    with pytest.raises(RoleError, match="needs a condition"):
        guided(x, t)


def test_guided_two_class_teacher_in_closed_form():
    process, std, w = VPCosine(), 0.5, 1.5
    m = torch.tensor([1.2, -0.3], dtype=F64)
    teacher = GaussianMixture(process, torch.stack([m, -m]), torch.full((2,), std), labels=torch.tensor([0, 1]))
    z, t = torch.randn(8, 2, dtype=F64), torch.linspace(0.1, 1, 8, dtype=F64)
    a, s = process.alpha(t)[:, None], process.sigma(t)[:, None]
    v = a**2 * std**2 + s**2
    gain = a * std**2 / v
    expected = gain * z + (1 - a * gain) * m * ((1 + w) - w * torch.tanh(a * (z @ m)[:, None] / v))
    assert torch.allclose(Guided(teacher, 1 + w)(z, t, torch.zeros(8, dtype=torch.long)), expected)


@pytest.mark.parametrize("mode", ["ddim", "renoise"])
def test_sampler_saves_and_loads_to_the_same_samples(tmp_path, mode):
    denoiser = network(VE(0.05, 5.0, 0), "edm", classes=3)
    denoiser.null_condition = torch.tensor(3)
    sampler = FewStepSampler(denoiser, (1.0, 0.6, 0.0), mode, clip=2.0)
    z, c = torch.randn(7, 2), torch.arange(7) % 3
    sampler.save(tmp_path)
    again = FewStepSampler.load(tmp_path, MLPDenoiser((2,), 16, 3, classes=3))
    ones = torch.ones_like
    assert torch.equal(again(z, c, ones), sampler(z, c, ones)) and again.steps == 2
    assert again(z, c, ones).abs().max() <= 2
    assert again.denoiser.null_condition.item() == 3
    with pytest.raises(StoreError, match="does not have the weights"):
        FewStepSampler.load(tmp_path, MLPDenoiser((2,), 8))
    with pytest.raises(StoreError, match=r"sampler\.json"):
        FewStepSampler.load(tmp_path / "nothing", nn.Linear(1, 1))
    with pytest.raises(StoreError, match="NetworkDenoiser"):
        FewStepSampler(normal(VPCosine())).save(tmp_path)


@pytest.mark.unchecked
def test_an_unknown_mode_is_named():
    with pytest.raises(ConfigError, match="mode"):
        FewStepSampler(network(), mode="heun")


def test_ladder_keeps_a_sampler_per_step_count(tmp_path):
    one, two = network(), network(kind="x0")
    ladder = SamplerLadder({1: FewStepSampler(one), 2: FewStepSampler(two, grids.uniform(2))})
    assert ladder.rungs == (2, 1)
    z = torch.randn(4, 2)
    assert torch.equal(ladder(z), ladder[1](z))
    ladder.save(tmp_path)
    again = SamplerLadder.load(tmp_path, lambda: MLPDenoiser((2,), 16, 3))
    assert torch.equal(again[2](z), ladder[2](z)) and again[2].denoiser.parameterisation == "x0"
    with pytest.raises(ConfigError, match="no sampler with 8"):
        ladder[8]
    with pytest.raises(StoreError, match="no saved samplers"):
        SamplerLadder.load(tmp_path / "empty", lambda: MLPDenoiser())


def test_copy_weights_checks_before_it_copies():
    one, other = network(), network()
    nn.init.zeros_(one.network.leave.weight)
    copy_weights(one, other)
    assert other.network.leave.weight.abs().sum() == 0
    with pytest.raises(RoleError, match="do not fit"):
        copy_weights(normal(VPCosine()), other)
