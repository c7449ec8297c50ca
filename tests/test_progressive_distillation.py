"""Progressive distillation: the target's identity, closed forms, rounds, and tiny networks of diffusers."""

import copy
import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from stillhouse.data.sets import TensorSet
from stillhouse.diffusion.denoise import NetworkDenoiser
from stillhouse.diffusion.exact import GaussianMixture
from stillhouse.diffusion.process import VE, VPCosine, ddpm_linear
from stillhouse.diffusion.samplers import SamplerLadder, at, ddim_step
from stillhouse.diffusion.weights import x0_weight
from stillhouse.errors import ConfigError, RoleError
from stillhouse.models.denoisers import MLPDenoiser
from stillhouse.recipes import halving
from stillhouse.run import Run
from stillhouse.systems.diffusion import progressive_distillation as pd

F64 = torch.float64
SHORT = pd.Config(start=8, steps=3, batch=8, lr=1e-3)


def data(n=24):
    return TensorSet(x=torch.randn(n, 2, generator=torch.Generator().manual_seed(0)))


def denoiser(kind="v", process=None, seed=0):
    torch.manual_seed(seed)
    return NetworkDenoiser(MLPDenoiser((2,), 8, 2, outputs=2 if kind == "joint" else 1), process or VPCosine(), kind)


def times(n):
    i = torch.arange(1, n + 1, dtype=F64)
    return i / n, (i - 0.5) / n, (i - 1) / n


@pytest.mark.parametrize("steps", [1, 4, 16])
def test_one_student_step_with_the_target_lands_where_two_teacher_steps_do(steps):
    torch.manual_seed(0)
    teacher = denoiser().double()
    t, middle, s = times(steps)
    x_t = torch.randn(steps, 2, dtype=F64)
    x_middle = ddim_step(teacher.process, x_t, teacher(x_t, t), t, middle)
    landed = ddim_step(teacher.process, x_middle, teacher(x_middle, middle), middle, s)
    target = halving.two_step_target(teacher, x_t, (t, middle, s))
    assert torch.allclose(ddim_step(teacher.process, x_t, target, t, s), landed, rtol=1e-11, atol=1e-11)
    naive = halving.two_step_target(teacher, x_t, (t, middle, s), target="naive")
    assert torch.allclose(naive, teacher(x_middle, middle))
    assert torch.equal(naive[0], target[0])
    assert steps == 1 or not torch.allclose(naive[1:], target[1:], atol=1e-3)


class Exact:
    """The student that a round would end with if it were perfect."""

    def __init__(self, teacher, steps):
        self.teacher, self.steps, self.process = teacher, steps, teacher.process
        self.null_condition = None

    def __call__(self, x_t, t, condition=None):
        return halving.two_step_target(self.teacher, x_t, (t, t - 0.5 / self.steps, t - 1 / self.steps))


@pytest.mark.parametrize("start,factor", [(2, 0.5), (4, 0.728553), (8, 0.856232)])
def test_standard_normal_data_gives_the_known_factor(start, factor):
    student = GaussianMixture(VPCosine(None), torch.zeros(1, 2), torch.ones(1))
    steps = start // 2
    while steps >= 1:
        student, steps = Exact(student, steps), steps // 2
    z = torch.randn(5, 2, dtype=F64)
    x = student(z, at(1.0, z))
    assert torch.allclose(x, math.cos(math.pi / 2 / start) ** start * z, atol=1e-12)
    assert torch.allclose(x, factor * z, atol=1e-6)


def test_standard_normal_data_gives_the_target_in_closed_form():
    process = VPCosine(None)
    teacher = GaussianMixture(process, torch.zeros(1, 2), torch.ones(1))
    t, middle, s = times(8)
    z = torch.randn(8, 2, dtype=F64)
    d = (process.clock(t) - process.clock(s))[:, None]
    expected = (process.sigma(t)[:, None] * torch.cos(d / 2) ** 2 - process.sigma(s)[:, None]) * z / torch.sin(d)
    assert torch.allclose(halving.two_step_target(teacher, z, (t, middle, s))[1:], expected[1:], atol=1e-12)


@pytest.mark.parametrize("target", ["corrected", "naive"])
def test_a_single_point_is_every_target(target):
    point = GaussianMixture(VPCosine(), torch.tensor([[1.0, -2.0]]), torch.tensor([1e-9]))
    for n in (1, 2, 8):
        x = halving.two_step_target(point, torch.randn(n, 2, dtype=F64), times(n), target=target)
        assert torch.allclose(x, torch.tensor([1.0, -2.0], dtype=F64).expand(n, 2), atol=1e-9)


class Constant(nn.Module):
    def __init__(self):
        super().__init__()
        self.value = nn.Parameter(torch.tensor([1.0, -2.0]))

    def forward(self, x_t, t, condition=None):
        return self.value.expand_as(x_t)


def test_the_constant_student_of_a_single_point_has_no_loss():
    point = GaussianMixture(VPCosine(), torch.tensor([[1.0, -2.0]]), torch.tensor([1e-9]))
    student = NetworkDenoiser(Constant(), VPCosine(), "x0")
    run = Run(quiet=True)
    ladder = pd.distill(point, student, data(), replace(SHORT, init="given"), run)
    losses = [line["distil"] for line in run.history if "distil" in line]
    assert len(losses) == 9 and max(losses) < 1e-5
    assert torch.allclose(ladder(torch.randn(3, 2)), torch.tensor([1.0, -2.0]).expand(3, 2), atol=2e-3)


def test_rounds_halve_restart_and_use_their_own_times_only(monkeypatch):
    calls = []
    real_target, real_lr = halving.two_step_target, halving.set_lr

    def target(teacher, x_t, times, condition, kind):
        calls.append([teacher, times, None])
        assert not torch.is_grad_enabled()
        return real_target(teacher, x_t, times, condition, kind)

    def set_lr(optimizer, lr):
        calls[-1][2] = (lr, len(optimizer.state))
        real_lr(optimizer, lr)

    monkeypatch.setattr(halving, "two_step_target", target)
    monkeypatch.setattr(halving, "set_lr", set_lr)
    teacher, student, run = denoiser(), denoiser(seed=1), Run(quiet=True)
    ladder = pd.distill(teacher, student, data(), replace(SHORT, last=2.0), run)
    assert isinstance(ladder, SamplerLadder) and ladder.rungs == (4, 2, 1)
    assert ladder[1].denoiser is student and ladder[4].times == (1.0, 0.75, 0.5, 0.25, 0.0)
    lengths = [len([c for c in calls if c[1][0].min() >= 0 and c[0] is teacher_of]) for teacher_of in
               dict.fromkeys(c[0] for c in calls)]
    assert lengths == [3, 6, 6]
    assert calls[0][0] is teacher and calls[3][0] is ladder[4].denoiser and calls[9][0] is ladder[2].denoiser
    for (_, (t, middle, s), (lr, state)), n, k in zip(calls, [4] * 3 + [2] * 6 + [1] * 6,
                                                      [*range(3), *range(6), *range(6)], strict=True):
        i = t * n
        assert torch.equal(i, i.round()) and i.min() >= 1 and i.max() <= n
        assert torch.allclose(middle, t - 0.5 / n) and torch.allclose(s, t - 1 / n)
        assert lr == pytest.approx(1e-3 * (1 - k / (3 if n == 4 else 6)))
        assert (state == 0) == (k == 0)


def test_the_student_starts_from_the_teacher_and_may_be_fitted():
    teacher, student = denoiser(), denoiser(seed=1)
    before = copy.deepcopy(teacher.state_dict())
    pd.distill(teacher, student, data(), replace(SHORT, lr=1e-12))
    for name, value in student.state_dict().items():
        assert torch.allclose(value, before[name], atol=1e-9), name
        assert torch.equal(teacher.state_dict()[name], before[name])
    run = Run(quiet=True)
    pd.distill(denoiser("eps"), denoiser("v", seed=1), data(), replace(SHORT, fit=2.0), run)
    assert [line["stage"] for line in run.history if "fit" in line] == ["fit/fit"] * 6


@pytest.mark.parametrize("kind", ["x0", "v", "joint", "eps"])
@pytest.mark.parametrize("weight", ["snr", "truncated_snr", "snr_plus_one", "x0"])
def test_every_parameterisation_and_weighting_runs(kind, weight):
    run = Run(quiet=True)
    pd.distill(denoiser(kind), denoiser(kind, seed=1), data(), replace(SHORT, start=2, steps=1, weight=weight), run)
    assert run.history[-1]["distil"] >= 0


def test_the_snr_weight_vanishes_at_pure_noise():
    one = torch.ones(1)
    assert x0_weight("snr", VPCosine(), one).item() < 1e-8
    assert x0_weight("truncated_snr", VPCosine(), one).item() == 1


def test_bad_roles_and_settings_are_named():
    with pytest.raises(ConfigError, match="power of two"):
        pd.Config(start=12, end=5)
    with pytest.raises(RoleError, match="one noise process"):
        pd.distill(denoiser(), denoiser(process=VE(0.05, 5.0)), data(), SHORT)
    with pytest.raises(RoleError, match="no weights to copy"):
        pd.distill(GaussianMixture(VPCosine(), torch.zeros(1, 2), torch.ones(1)), denoiser(), data(), SHORT)
    with pytest.raises(RoleError, match="set fit=1"):
        pd.distill(denoiser("eps"), denoiser("v"), data(), SHORT)
    with pytest.raises(RoleError, match="no signal"):
        pd.distill(denoiser("v", VPCosine(None)), denoiser("eps", VPCosine(None)), data(), replace(SHORT, init="given"))
    with pytest.raises(RoleError, match="fewer timesteps"):
        table = ddpm_linear(4)
        pd.distill(denoiser(process=table), denoiser(process=table), data(), SHORT)


def test_a_diffusers_eps_teacher_becomes_a_few_step_v_student(tmp_path):
    diffusers = pytest.importorskip("diffusers")
    from stillhouse.hub.diffusers import from_diffusers, save_pretrained

    def network(prediction):
        torch.manual_seed(0)
        model = diffusers.UNet2DModel(sample_size=8, in_channels=1, out_channels=1, layers_per_block=1,
                                      norm_num_groups=4, block_out_channels=(8, 8), num_class_embeds=3,
                                      down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2)
        return from_diffusers(model, diffusers.DDIMScheduler(num_train_timesteps=64, prediction_type=prediction))

    pictures = TensorSet(x=torch.rand(8, 1, 8, 8) * 2 - 1, condition=torch.arange(8) % 3)
    config = pd.Config(start=4, steps=2, fit=1.0, batch=4, lr=1e-4, bound=1.0)
    ladder = pd.distill(network("epsilon"), network("v_prediction"), pictures, config, Run(quiet=True))
    x = ladder[2](torch.randn(2, 1, 8, 8), torch.tensor([0, 2]))
    assert x.shape == (2, 1, 8, 8) and x.abs().max() <= 1
    save_pretrained(ladder[2], tmp_path)
    written = diffusers.DDIMScheduler.from_pretrained(tmp_path / "scheduler")
    written.set_timesteps(2)
    assert written.config.prediction_type == "v_prediction" and written.timesteps.tolist() == [63, 31]
