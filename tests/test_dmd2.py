"""DMD2: the matching gradient in closed form, who gets which gradient, the two time scales, backward simulation."""

from dataclasses import replace
from itertools import product

import pytest
import torch

from stillhouse.data.sets import TensorSet
from stillhouse.diffusion.denoise import NetworkDenoiser
from stillhouse.diffusion.exact import GaussianMixture
from stillhouse.diffusion.process import VE, ddpm_linear
from stillhouse.errors import ConfigError, DataError, RoleError
from stillhouse.measures.score import distribution_matching, matching_direction
from stillhouse.models.denoisers import MLPDenoiser
from stillhouse.run import Run
from stillhouse.systems.diffusion import dmd2

F64 = torch.float64
PROCESS = VE(0.05, 5.0, 0)
SHORT = replace(dmd2.EMBEDDED, steps=1, ratio=1, batch=8, gan=0.0, ema=0.0)


def denoiser(seed=0, classes=0, process=PROCESS, kind="edm"):
    torch.manual_seed(seed)
    null = torch.tensor(classes) if classes else None
    return NetworkDenoiser(MLPDenoiser((2,), 8, 3, classes=classes), process, kind, null_condition=null)


def samples(n=24, classes=0):
    x = torch.randn(n, 2, generator=torch.Generator().manual_seed(0))
    return TensorSet(x=x, condition=torch.arange(n) % classes) if classes else TensorSet(x=x)


def test_gradients_of_gaussians_are_those_of_the_kl():
    m, tau, mu, std, level = 0.7, 0.4, -0.3, 1.1, 0.9
    process = VE(0.05, 5.0, 0)
    real, fake = (GaussianMixture(process, torch.tensor([[c]], dtype=F64), torch.tensor([s], dtype=F64))
                  for c, s in ((mu, std), (m, tau)))
    z, n = (torch.tensor(v, dtype=F64)[:, None] for v in zip(*product((-1.0, 1.0), repeat=2), strict=True))
    s = torch.full((4,), level, dtype=F64)
    t = process.time(s)
    x = m + tau * z
    x_s = process.noise(x, t, n)
    g = matching_direction(x, real(x_s, t), fake(x_s, t), normalise=False) / level**2
    assert g.mean().item() == pytest.approx((m - mu) / (std**2 + level**2), rel=1e-9)
    assert (g * z).mean().item() == pytest.approx(tau / (std**2 + level**2) - tau / (tau**2 + level**2), rel=1e-9)


def test_equal_scores_leave_the_generator_alone():
    x, estimate = torch.randn(2, 6, 3, requires_grad=True)
    loss = distribution_matching(x, estimate.detach(), estimate.detach())
    assert torch.autograd.grad(loss, x, allow_unused=True)[0].abs().max() == 0
    teacher, student = denoiser(), denoiser(1)
    dmd2.distill(teacher, student, samples(), config=SHORT, run=Run(quiet=True))
    for name, value in student.state_dict().items():
        assert torch.equal(value, teacher.state_dict()[name])


def test_the_loss_has_the_stated_gradient_and_spares_both_scores():
    x = torch.randn(5, 3, 2, dtype=F64, requires_grad=True)
    real, fake = torch.randn(2, 5, 3, 2, dtype=F64, requires_grad=True)
    loss = distribution_matching(x, real, fake)
    gradient, *others = torch.autograd.grad(loss, (x, real, fake), allow_unused=True)
    p_real, p_fake = x - real, x - fake
    g = (p_real - p_fake) / p_real.abs().mean(dim=(1, 2), keepdim=True)
    assert torch.allclose(gradient, g / g.numel(), rtol=1e-12)
    assert others == [None, None]


def test_normalisation_is_of_degree_zero_and_guarded():
    x, p_real, p_fake = torch.randn(3, 4, 6, dtype=F64)
    g = matching_direction(x, x - p_real, x - p_fake)
    assert torch.allclose(matching_direction(x, x - 7 * p_real, x - 7 * p_fake), g)
    assert not torch.allclose(matching_direction(x, x - 7 * p_real, x - p_fake), g)
    assert matching_direction(x, x, x).abs().max() == 0
    assert matching_direction(x, x, x - p_fake).isfinite().all()


def test_normalisation_is_per_sample():
    x, real, fake = torch.randn(3, 2, 6, dtype=F64)
    g = matching_direction(x, real, fake)
    scale = torch.tensor([[1.0], [3.0]], dtype=F64)
    scaled = matching_direction(scale * x, scale * real, scale * fake)
    assert torch.allclose(scaled, g)
    assert torch.equal(scaled[0], g[0])


class Watched(Run):
    """A run that notes the gradients left on the fake score and head after each update."""

    def __init__(self):
        super().__init__(quiet=True)
        self.updates = []

    def update(self, optimizers, *, clip=None, **terms):
        held = self._stages[-1].held
        guidance = [*held["fake"].parameters(), *held["head"].parameters()]
        assert all(p.grad is None for p in guidance)
        super().update(optimizers, clip=clip, **terms)
        assert all(p.grad is None for p in guidance)
        assert all(p.grad is None for p in held["student"].parameters())
        self.updates.append(sorted(terms))


def test_gan_alone_moves_the_generator_and_no_gradient_is_left_on_the_guidance_network():
    teacher, student = denoiser(), denoiser(1)
    run = Watched()
    dmd2.distill(teacher, student, samples(), config=replace(SHORT, gan=1.0, matching=0.0), run=run)
    assert run.updates == [["gan", "matching"], ["fake", "gan_fake", "gan_real"]]
    assert run.history[0]["matching"] == 0
    moved = [n for n, p in student.named_parameters() if not torch.equal(p, teacher.state_dict()[n])]
    assert "network.leave.weight" in moved and "network.layers.0.weight" in moved


def test_the_adversarial_gradient_reaches_the_fake_backbone_up_to_its_bottleneck():
    fake = denoiser()
    head = dmd2.head_for(fake.features(torch.randn(2, 2), torch.rand(2)))
    head(fake.features(torch.randn(4, 2), torch.rand(4))).sum().backward()
    assert fake.network.layers[0].weight.grad.abs().sum() > 0
    assert fake.network.layers[2].weight.grad is None and fake.network.leave.weight.grad is None
    assert all(p.grad is not None for p in head.parameters())


@pytest.mark.parametrize("ratio", [1, 3])
def test_the_fake_score_is_updated_every_step_and_the_generator_every_kth(ratio):
    run = Watched()
    config = replace(SHORT, steps=7, ratio=ratio, gan=0.1, gan_from=0.5)
    dmd2.distill(denoiser(), denoiser(1), samples(), config=config, run=run)
    turns = [k for k in range(7) if k % ratio == 0]
    assert sum("matching" in u for u in run.updates) == len(turns)
    assert sum("fake" in u for u in run.updates) == 7
    assert sum("gan_real" in u for u in run.updates) == 3
    assert sum("gan" in u for u in run.updates) == len([k for k in turns if k >= 3.5])


class Spy(NetworkDenoiser):
    """Notes how it is called."""

    def __init__(self, inner):
        super().__init__(inner.network, inner.process, inner.parameterisation, null_condition=inner.null_condition)
        self.calls = []

    def output(self, x_t, t, condition=None):
        self.calls.append((x_t.detach().clone(), t, condition, torch.is_grad_enabled()))
        return super().output(x_t, t, condition)


def test_guidance_acts_on_the_teacher_only_and_levels_are_those_of_the_paper(monkeypatch):
    teacher, fakes = Spy(denoiser(classes=3)), []
    make = dmd2.fake_score

    def fake_score(*args):
        fakes.append(make(*args))
        fakes[0].calls = []
        return fakes[0]

    monkeypatch.setattr(dmd2, "fake_score", fake_score)
    teacher.calls = []
    config = replace(SHORT, steps=40, batch=16, guidance=2.0, gan=0.1)
    real = samples(48, classes=3)
    dmd2.distill(teacher, denoiser(1, classes=3), real, TensorSet(condition=torch.arange(32) % 3), config=config,
                 run=Run(quiet=True))
    guided = [c for c in teacher.calls if len(c[0]) == 32]
    assert len(guided) == 40
    for x, t, condition, grad in guided:
        assert (condition[16:] == 3).all() and (condition[:16] < 3).all() and not grad
        assert torch.equal(x[:16], x[16:]) and torch.equal(t[:16], t[16:])
    assert all((c[2] < 3).all() for c in fakes[0].calls[1:])
    levels = torch.cat([c[1][:16] for c in guided])
    assert levels.min() >= 20 / 999 - 1e-6 and levels.max() <= 980 / 999 + 1e-6 and levels.unique().numel() > 300
    everywhere = torch.cat([c[1] for c in fakes[0].calls[1:]])
    assert everywhere.min() < 0.02 and everywhere.max() > 0.985
    per_step = fakes[0].calls[1:]
    matching, gan_generator, fit, gan_fake, gan_real = per_step[:5]
    for one, other in ((gan_fake, gan_real), (fit, gan_fake), (matching, gan_generator)):
        assert not torch.equal(one[1], other[1]) and one[1].unique().numel() > 10
    assert torch.equal(teacher.calls[-1][1][:16], fakes[0].calls[-5][1])


def test_backward_simulation_runs_the_generator_before_the_trained_step_without_gradient():
    student = Spy(denoiser())
    config = replace(SHORT, times=(1.0, 0.75, 0.5, 0.25))
    run, seen = Run(quiet=True), []
    batch = {"drawn": {"index": torch.arange(6)}, "real": {"x": torch.full((6, 2), 1e6), "index": torch.arange(6)}}
    for _ in run.loop("x", steps=24):
        student.calls = []
        x, _ = dmd2.generate(student, batch, (2,), config, run)
        *earlier, last = student.calls
        assert [c[1][0].item() for c in student.calls] == list(config.times[: len(student.calls)])
        assert not any(c[3] for c in earlier) and last[3] and x.requires_grad
        assert student.calls[0][0].abs().max() < 5 * 5 and last[0].abs().max() < 1e4
        seen.append(len(student.calls))
        if earlier:
            x0 = student(earlier[-1][0], earlier[-1][1])
            noise = (last[0] - x0) / PROCESS.sigma(last[1])[:, None]
            assert 0.3 < noise.std() < 1.9
            assert not torch.allclose(noise, earlier[-1][0] / PROCESS.sigma(earlier[-1][1])[:, None], atol=1e-2)
    assert set(seen) == {1, 2, 3, 4}
    for _ in run.loop("y", steps=3):
        student.calls = []
        dmd2.generate(student, batch, (2,), replace(config, simulate="data"), run)
        assert len(student.calls) == 1 and student.calls[0][0].abs().min() > 1e5


def test_without_real_samples_the_shape_comes_from_the_config():
    config = replace(SHORT, steps=2, shape=(2,), times=(1.0, 0.5))
    sampler = dmd2.distill(denoiser(), denoiser(1), config=config, run=Run(quiet=True))
    assert sampler.times == (1.0, 0.5, 0.0) and sampler.mode == "renoise" and sampler(torch.randn(3, 2)).shape == (3, 2)


def test_an_exact_teacher_needs_a_network_which_is_fitted():
    teacher = GaussianMixture(PROCESS, torch.randn(3, 2), torch.full((3,), 0.2))
    with pytest.raises(RoleError, match="give network"):
        dmd2.distill(teacher, denoiser(1), samples(), config=SHORT, run=Run(quiet=True))
    run = Run(quiet=True)
    dmd2.distill(teacher, denoiser(1), samples(), network=denoiser, config=replace(SHORT, fit=3), run=run)
    assert [line["stage"] for line in run.history] == ["fit/fit"] * 3 + ["distil"]


def test_the_average_of_the_generator_is_returned_in_its_place():
    teacher, student = denoiser(), denoiser(1)
    dmd2.distill(teacher, student, samples(), config=replace(SHORT, ema=0.999999, gan=1.0), run=Run(quiet=True))
    for name, value in student.state_dict().items():
        assert torch.allclose(value, teacher.state_dict()[name], atol=1e-7)


def test_bad_roles_and_settings_are_named():
    with pytest.raises(RoleError, match="real samples are needed"):
        dmd2.distill(denoiser(), denoiser(), config=replace(SHORT, gan=1.0))
    with pytest.raises(ConfigError, match=r"config\.shape"):
        dmd2.distill(denoiser(), denoiser(), config=SHORT)
    with pytest.raises(RoleError, match="one noise process"):
        dmd2.distill(denoiser(), denoiser(process=VE()), samples(), config=SHORT)
    with pytest.raises(RoleError, match="null condition"):
        dmd2.distill(denoiser(), denoiser(), samples(), config=replace(SHORT, guidance=2.0))
    with pytest.raises(DataError, match="empty"):
        dmd2.distill(denoiser(classes=3), denoiser(classes=3), samples(classes=3),
                     TensorSet(condition=torch.arange(0)), config=SHORT)
    with pytest.raises(ConfigError, match="levels"):
        replace(SHORT, levels=(500, 20))
    with pytest.raises(ConfigError, match="fall"):
        replace(SHORT, times=(0.5, 0.75))


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_text_conditioned_diffusers_networks_in_the_latent_form(prediction):
    diffusers = pytest.importorskip("diffusers")
    from stillhouse.hub.diffusers import from_diffusers

    def network():
        torch.manual_seed(0)
        model = diffusers.UNet2DConditionModel(
            sample_size=8, in_channels=2, out_channels=2, layers_per_block=1, norm_num_groups=4,
            block_out_channels=(8, 8), cross_attention_dim=6, attention_head_dim=2,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"))
        return from_diffusers(model, diffusers.DDIMScheduler(prediction_type=prediction), torch.zeros(3, 6))

    teacher, student = network(), network()
    latents = TensorSet(x=torch.randn(8, 2, 8, 8), condition=torch.randn(8, 3, 6))
    prompts = TensorSet(condition=torch.randn(12, 3, 6))
    config = replace(dmd2.PRESETS["sdxl"], steps=3, ratio=2, batch=4, guidance=2.0, lr=1e-3, fake_lr=1e-3)
    run = Run(quiet=True)
    sampler = dmd2.distill(teacher, student, latents, prompts, config=config, run=run)
    assert sampler.times == (1.0, 0.75, 0.5, 0.25, 0.0)
    assert all(key in run.history[0] for key in ("matching", "gan", "fake", "gan_fake", "gan_real"))
    assert any(not torch.equal(v, teacher.state_dict()[n]) for n, v in student.state_dict().items())
    assert sampler(torch.randn(2, 2, 8, 8), torch.randn(2, 3, 6)).isfinite().all()


def test_vp_weight_of_the_fake_score_is_the_plain_eps_error():
    process = ddpm_linear(100)
    t = torch.tensor([0.2, 0.9])
    x, x0, eps = torch.randn(3, 2, 4)
    x_t, a, s = process.noise(x, t, eps), process.alpha(t), process.sigma(t)
    eps_error = ((x_t - a[:, None] * x0) / s[:, None] - eps).square().mean()
    weight = dmd2.x0_weight(dmd2.PRESETS["sdxl"].weight, process, t)
    assert torch.allclose(dmd2.weighted_error(x0, x, weight), eps_error, rtol=1e-4)
