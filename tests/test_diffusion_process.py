"""Noise processes, conversions, time grids and weights."""

import itertools
import math

import pytest
import torch

from stillhouse.diffusion import grids
from stillhouse.diffusion.convert import PARAMETERISATIONS, convert, eps_of, from_x0, input_scale, score_of, to_x0
from stillhouse.diffusion.process import VE, Flow, TrigFlow, VPCosine, VPTable, ddpm_linear, process_of
from stillhouse.diffusion.weights import weighted_error, x0_weight
from stillhouse.errors import ConfigError

F64 = torch.float64
PROCESSES = [VPCosine(), VPCosine(None), ddpm_linear(50), VPTable(ddpm_linear(50).alphas_cumprod, quantise=False), VE(),
             VE(0.05, 5.0, rho=0), Flow(), TrigFlow(0.5)]
INVERTIBLE = [k for k in PARAMETERISATIONS if k != "joint"]


def inner_times(n=9):
    return torch.linspace(0.08, 0.92, n, dtype=F64)


@pytest.mark.parametrize("process", PROCESSES, ids=repr)
def test_every_process_starts_at_data_ends_at_noise_and_has_an_inverse(process):
    t = torch.linspace(0.02, 1, 50, dtype=F64)
    assert (process.log_snr(t[:-1]).diff() < 0).all()
    ends = torch.tensor([0.0, 1.0], dtype=F64)
    assert process.alpha(ends)[0] == pytest.approx(1, abs=1e-8)
    assert process.sigma(ends)[0] < 0.06 and process.sigma(ends)[1] > 0.4
    times = torch.arange(1, 50, dtype=F64) / 50
    assert torch.allclose(process.time_of_log_snr(process.log_snr(times)), times, atol=1e-6)
    assert torch.allclose(process.time(process.clock(times)), times, atol=1e-9)
    assert process_of(process.spec()) == process


@pytest.mark.parametrize("process", [p for p in PROCESSES if not (isinstance(p, VPTable) and p.quantise)], ids=repr)
def test_slopes_are_the_derivatives_by_the_clock(process):
    t, h = torch.linspace(0.1, 0.9, 7, dtype=F64) + 0.003, 1e-6
    step = process.clock(t + h) - process.clock(t - h)
    for value, slope in zip((process.alpha, process.sigma), process.slopes(t), strict=True):
        assert torch.allclose((value(t + h) - value(t - h)) / step, slope, atol=1e-5, rtol=1e-5)


def test_cosine_log_snr_is_bounded_by_shrinking_the_angle():
    process, t = VPCosine(20.0), torch.linspace(0, 1, 11, dtype=F64)
    assert process.log_snr(t[[0, -1]]).tolist() == pytest.approx([20, -20], rel=1e-9)
    b, e = math.atan(math.exp(-10)), math.atan(math.exp(10))
    assert torch.allclose(process.log_snr(t), -2 * torch.tan(b + (e - b) * t).log())
    assert process.alpha(t)[-1].item() == pytest.approx(4.54e-5, rel=1e-3)


def test_table_times_are_the_timesteps():
    process = ddpm_linear(1000)
    k = torch.tensor([0, 499, 999])
    t = (k + 1).double() / 1000
    assert process.timestep(t).tolist() == [0, 499, 999]
    expected = torch.tensor(process.alphas_cumprod, dtype=F64)[k]
    assert torch.allclose(process.alpha(t) ** 2, expected)
    assert torch.allclose(process.sigma(t) ** 2, 1 - expected)
    assert process.alpha(torch.tensor([0.5004]))[0] == process.alpha(torch.tensor([0.5]))[0]
    with pytest.raises(ConfigError, match="decrease"):
        VPTable((0.5, 0.9))


def test_edm_sigmas_are_karras():
    process, n = VE(0.002, 80.0, 7.0), 18
    times = torch.tensor(grids.karras(n, process), dtype=F64)
    i = torch.arange(n, dtype=F64)
    expected = (80 ** (1 / 7) + i / (n - 1) * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    assert torch.allclose(process.sigma(times[:-1]), expected, rtol=1e-5)
    assert grids.karras(5, VPCosine(), sigma_min=0.01, sigma_max=10.0)[-1] == 0
    with pytest.raises(ConfigError, match="finite"):
        grids.karras(4, VPCosine(None))


@pytest.mark.parametrize("process", [VPCosine(), ddpm_linear(50), VE(), Flow(), TrigFlow(0.5)], ids=repr)
def test_renoise_kernel_keeps_the_marginal(process):
    s, t = torch.tensor([0.3], dtype=F64), torch.tensor([0.7], dtype=F64)
    zero, one = torch.zeros(1, 1, dtype=F64), torch.ones(1, 1, dtype=F64)
    ratio = process.alpha(t) / process.alpha(s)
    variance = process.renoise(zero, s, t, one) ** 2
    assert torch.allclose(variance[0], process.sigma(t) ** 2 - (ratio * process.sigma(s)) ** 2)
    assert torch.allclose(process.renoise(one, s, t, zero)[0], ratio)


@pytest.mark.parametrize("process", [VPCosine(), ddpm_linear(50), VE(), Flow(), TrigFlow(0.7)], ids=repr)
@pytest.mark.parametrize("given,wanted", list(itertools.permutations(INVERTIBLE, 2)))
def test_conversions_round_trip(process, given, wanted):
    torch.manual_seed(0)
    t = inner_times()
    x, eps = torch.randn(2, len(t), 3, 2, 2, dtype=F64)
    x_t, alpha, sigma = process.noise(x, t, eps), process.alpha(t), process.sigma(t)
    out = torch.randn_like(x)
    there = convert(out, given, wanted, x_t, alpha, sigma, 0.7)
    assert torch.allclose(convert(there, wanted, given, x_t, alpha, sigma, 0.7), out, atol=1e-9)
    true = from_x0(given, x, x_t, alpha, sigma, 0.7)
    assert torch.allclose(to_x0(given, true, x_t, alpha, sigma, 0.7), x, atol=1e-9)


@pytest.mark.unchecked
def test_conversions_say_what_they_stand_for():
    torch.manual_seed(0)
    process, t = VPCosine(), inner_times()
    x, eps = torch.randn(2, len(t), 2, dtype=F64)
    x_t, a, s = process.noise(x, t, eps), process.alpha(t), process.sigma(t)
    assert torch.allclose(eps_of(x, x_t, a, s), eps)
    assert torch.allclose(from_x0("eps", x, x_t, a, s), eps)
    assert torch.allclose(from_x0("v", x, x_t, a, s), a[:, None] * eps - s[:, None] * x)
    assert torch.allclose(from_x0("flow", x, x_t, a, s), eps - x)
    assert torch.allclose(score_of(x, x_t, a, s), -eps / s[:, None])
    assert torch.allclose(from_x0("trigflow", x, x_t, a, s, 0.6), -from_x0("edm", x, x_t, a, s, 0.6))
    assert torch.allclose(to_x0("joint", torch.cat([x, eps], 1), x_t, a, s), x)
    mixed = to_x0("joint", torch.cat([x + 1, eps + 1], 1), x_t, a, s)
    from_eps = to_x0("eps", eps + 1, x_t, a, s)
    assert torch.allclose(mixed, s[:, None] ** 2 * (x + 1) + a[:, None] ** 2 * from_eps)
    with pytest.raises(ConfigError, match="not determined"):
        from_x0("joint", x, x_t, a, s)
    with pytest.raises(ConfigError, match="unknown parameterisation"):
        to_x0("score", x, x_t, a, s)
    with pytest.raises(ConfigError, match="twice the channels"):
        to_x0("joint", x, x_t, a, s)


def test_edm_and_trigflow_match_their_papers():
    torch.manual_seed(0)
    sd, sigma = 0.5, torch.tensor([0.01, 0.7, 30.0], dtype=F64)
    x_t, out = torch.randn(2, 3, 2, dtype=F64)
    c_skip, c_out = sd**2 / (sigma**2 + sd**2), sigma * sd / (sigma**2 + sd**2).sqrt()
    expected = c_skip[:, None] * x_t + c_out[:, None] * out
    assert torch.allclose(to_x0("edm", out, x_t, torch.ones(3, dtype=F64), sigma, sd), expected)
    assert torch.allclose(input_scale(torch.ones(3, dtype=F64), sigma, sd), (sigma**2 + sd**2).rsqrt())
    process, t = TrigFlow(sd), inner_times(3)
    angle = t * math.pi / 2
    expected = angle.cos()[:, None] * x_t - angle.sin()[:, None] * sd * out
    assert torch.allclose(to_x0("trigflow", out, x_t, process.alpha(t), process.sigma(t), sd), expected)


@pytest.mark.unchecked
def test_weights_turn_the_x_error_into_eps_and_v_errors():
    torch.manual_seed(0)
    process, t = VPCosine(), inner_times()
    x, eps, guess = torch.randn(3, len(t), 4, dtype=F64)
    x_t, a, s = process.noise(x, t, eps), process.alpha(t), process.sigma(t)

    def error(kind):
        return (from_x0(kind, guess, x_t, a, s) - from_x0(kind, x, x_t, a, s)).square().mean()

    for weighting, kind in (("snr", "eps"), ("snr_plus_one", "v"), ("x0", "x0")):
        assert torch.allclose(weighted_error(guess, x, x0_weight(weighting, process, t)), error(kind))
    per_sample = [(from_x0(k, guess, x_t, a, s) - from_x0(k, x, x_t, a, s)).square().mean(1) for k in ("x0", "eps")]
    truncated = weighted_error(guess, x, x0_weight("truncated_snr", process, t))
    assert torch.allclose(truncated, torch.maximum(*per_sample).mean())
    edm, levels = VE(), inner_times()
    assert torch.allclose(x0_weight("edm", edm, levels, 0.5), edm.sigma(levels) ** -2 + 4)
    assert x0_weight("min_snr", process, t).max() == 5
    assert x0_weight("snr", VPCosine(None), torch.ones(1, dtype=F64)).item() < 1e-30
    with pytest.raises(ConfigError, match="unknown weighting"):
        x0_weight("sqrt", process, t)


def test_at_pure_noise_v_is_minus_x():
    process, one = VPCosine(None), torch.ones(4, dtype=F64)
    x, eps = torch.randn(2, 4, 2, dtype=F64)
    v = from_x0("v", x, process.noise(x, one, eps), process.alpha(one), process.sigma(one))
    assert torch.allclose(v, -x)


def test_grids_are_pinned_down():
    assert grids.uniform(4) == (1.0, 0.75, 0.5, 0.25, 0.0)
    assert grids.trailing(4) == (1.0, 0.75, 0.5, 0.25, 0.0)
    assert [round(t * 1000) - 1 for t in grids.trailing(7)[:-1]] == [999, 856, 713, 570, 428, 285, 142]
    assert [round(t * 1000) - 1 for t in grids.leading(4, offset=1)[:-1]] == [751, 501, 251, 1]
    assert grids.from_timesteps([999, 749, 499, 249]) == grids.trailing(4)
    with pytest.raises(ConfigError, match="fall"):
        grids.check_times((0.5, 1.0, 0.0))
    with pytest.raises(ConfigError, match="fall"):
        grids.check_times((1.0, 0.5))


def test_trailing_and_leading_are_those_of_diffusers():
    diffusers = pytest.importorskip("diffusers")
    for spacing, ours in (("trailing", grids.trailing(7)), ("leading", grids.leading(7))):
        scheduler = diffusers.DDIMScheduler(timestep_spacing=spacing)
        scheduler.set_timesteps(7)
        assert scheduler.timesteps.tolist() == [round(t * 1000) - 1 for t in ours[:-1]]


def test_noise_levels_of_a_grid():
    process = VE(0.002, 80.0, 7.0)
    t = grids.level_times(process, torch.tensor([0, 20, 980, 999])).double()
    assert process.sigma(t).tolist() == pytest.approx([0.002, 0.00323, 72.05, 80], rel=2e-3)
    t = grids.level_times(ddpm_linear(1000), torch.tensor([0, 20, 999]))
    assert ddpm_linear(1000).timestep(t).tolist() == [0, 20, 999]
