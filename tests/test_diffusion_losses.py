"""Score and adversarial measures, discriminator heads, distances, densities and the small network."""

import pytest
import scipy.stats
import torch

from stillhouse.data.densities import blank, gauss2d, ring
from stillhouse.errors import ConfigError, DataError, RoleError
from stillhouse.evaluate.distances import (
    energy_distance,
    in_mode_std,
    mode_shares,
    modes_hit,
    nearest_mode,
    rmse,
    sliced_wasserstein,
)
from stillhouse.measures.adversarial import fake_loss, generator_loss, r1_penalty, real_loss
from stillhouse.measures.score import distribution_matching, matching_direction, stop_gradient_loss
from stillhouse.models.denoisers import MLPDenoiser
from stillhouse.parts.discriminators import ConvHead, VectorHead, head_for

F64 = torch.float64


def test_stop_gradient_loss_has_the_gradient_it_is_given():
    x = torch.randn(4, 3, 2, dtype=F64, requires_grad=True)
    g, weight = torch.randn(4, 3, 2, dtype=F64), torch.rand(4, dtype=F64)
    (gradient,) = torch.autograd.grad(stop_gradient_loss(x, g, weight), x)
    assert torch.allclose(gradient, weight[:, None, None] * g / g.numel())
    assert stop_gradient_loss(x, g, reduction="none").shape == (4,)


def test_matching_direction_without_normalisation_is_the_difference_of_estimates():
    x, real, fake = torch.randn(3, 5, 2, dtype=F64)
    assert torch.allclose(matching_direction(x, real, fake, normalise=False), fake - real)
    weighted = distribution_matching(x, real, fake, weight=torch.full((5,), 2.0))
    assert torch.allclose(weighted, 2 * distribution_matching(x, real, fake))


@pytest.mark.parametrize("kind", ["nonsaturating", "hinge", "lsgan", "wgan"])
def test_adversarial_losses_push_logits_the_right_way(kind):
    logits = torch.zeros(3, dtype=F64, requires_grad=True)
    for loss, sign in ((generator_loss, -1), (real_loss, -1), (fake_loss, 1)):
        (gradient,) = torch.autograd.grad(loss(logits + (0.5 if kind == "lsgan" else 0.0), kind), logits)
        assert (gradient * sign > 0).all(), loss


@pytest.mark.unchecked
def test_adversarial_losses_are_their_formulas():
    logits = torch.tensor([-40.0, -0.3, 0.0, 2.0, 40.0], dtype=F64)
    assert torch.allclose(generator_loss(logits, reduction="none"), -torch.nn.functional.logsigmoid(logits))
    assert torch.allclose(fake_loss(logits, reduction="none"), -torch.nn.functional.logsigmoid(-logits))
    assert real_loss(torch.zeros(2)) + fake_loss(torch.zeros(2)) == pytest.approx(2 * 0.6931472)
    assert real_loss(logits, "hinge", reduction="none").tolist() == pytest.approx([41, 1.3, 1, 0, 0])
    assert fake_loss(logits, "hinge", reduction="none").tolist() == pytest.approx([0, 0.7, 1, 3, 41])
    with pytest.raises(ConfigError, match="unknown adversarial"):
        fake_loss(logits, "vanilla")


def test_r1_penalty_of_a_linear_critic():
    x = torch.randn(6, 3, dtype=F64, requires_grad=True)
    w = torch.tensor([1.0, -2.0, 0.5], dtype=F64, requires_grad=True)
    penalty = r1_penalty(x @ w, x)
    assert penalty.item() == pytest.approx(0.5 * w.square().sum().item())
    assert torch.allclose(torch.autograd.grad(penalty, w)[0], w)


@pytest.mark.parametrize(
    "shape", [(16,), (7, 16), (4, 1, 1), (16, 1, 1), (16, 2, 2), (64, 4, 4), (16, 8, 8), (12, 16, 16)])
def test_heads_give_one_logit_per_sample(shape):
    head = head_for(torch.zeros(2, *shape))
    x = torch.randn(5, *shape, requires_grad=True)
    logits = head(x)
    assert logits.shape == (5,)
    logits[0].backward()
    assert x.grad[0].abs().sum() > 1e-3 and x.grad[1:].abs().sum() == 0
    assert logits.std() > 1e-3


def test_conv_head_halves_to_four_and_bad_features_are_named():
    head = ConvHead(256, (16, 16))
    strides = [m.stride[0] for m in head.modules() if isinstance(m, torch.nn.Conv2d)]
    assert strides == [2, 2, 1, 1] and head.layers[1].num_groups == 32
    assert isinstance(head_for(torch.zeros(1, 3, 8)), VectorHead)
    with pytest.raises(RoleError, match="discriminator reads"):
        head_for(torch.zeros(1, 2, 3, 4, 5))


def test_energy_distance_is_that_of_scipy_and_unbiased():
    torch.manual_seed(0)
    x, y = torch.randn(300, 1, dtype=F64), torch.randn(200, 1, dtype=F64) + 0.7

    def own(a):
        return (a - a.T).abs().sum() / (len(a) * (len(a) - 1)) - (a - a.T).abs().mean()

    biased = scipy.stats.energy_distance(x[:, 0], y[:, 0]) ** 2
    assert energy_distance(x, y) == pytest.approx(biased - float(own(x) + own(y)), abs=1e-9)
    repeats = [energy_distance(torch.randn(60, 2), torch.randn(60, 2)) for _ in range(200)]
    assert abs(sum(repeats) / 200) < 0.006
    with pytest.raises(DataError, match="two or more"):
        energy_distance(x[:1], y)


def test_sliced_wasserstein_of_a_shift_and_of_unequal_sizes():
    torch.manual_seed(0)
    x = torch.randn(500, 2, dtype=F64)
    shift = torch.tensor([3.0, 4.0], dtype=F64)
    assert sliced_wasserstein(x, x + shift, 2000) == pytest.approx(5 / 2**0.5, rel=0.03)
    assert sliced_wasserstein(x, x[torch.randperm(500)]) == pytest.approx(0, abs=1e-12)
    assert sliced_wasserstein(x, x.repeat(3, 1)) == pytest.approx(0, abs=1e-12)
    one, two = x[:, :1], 2 * x[:, :1] + 1
    expected = (one.sort(0).values - two.sort(0).values).square().mean().sqrt().item()
    assert sliced_wasserstein(one, two) == pytest.approx(expected)


def test_modes_are_counted_within_a_radius():
    centres = ring(4, 2.0)
    x = torch.cat([centres[:3].repeat(10, 1) + 0.01, torch.zeros(6, 2)])
    assert modes_hit(x, centres, 0.5) == 3
    assert (nearest_mode(x, centres, 0.5) == -1).sum() == 6
    assert mode_shares(x, centres, 0.5).tolist() == pytest.approx([10 / 36] * 3 + [0])
    data = gauss2d(4000, centres, 0.2, seed=1)
    assert in_mode_std(data.x, centres, 1.0) == pytest.approx(0.2, rel=0.03)
    assert in_mode_std(torch.full((3, 2), 9.0), centres, 0.5) != in_mode_std(data.x, centres, 1.0)
    assert rmse(data.x, data.x + torch.tensor([3.0, 4.0])) == pytest.approx(5, rel=1e-6)


def test_gauss2d_is_seeded_and_follows_its_weights():
    assert torch.equal(gauss2d(50, seed=3).x, gauss2d(50, seed=3).x)
    assert not torch.equal(gauss2d(50, seed=3).x, gauss2d(50, seed=4).x)
    data = gauss2d(3000, weights=torch.tensor([0.0, 1, 1, 0, 0, 0, 0, 2]))
    assert data.label.unique().tolist() == [1, 2, 7]
    assert (data.label == 7).float().mean().item() == pytest.approx(0.5, abs=0.04)
    assert len(blank(5)) == 5 and blank(5).batch([1, 2])["index"].tolist() == [1, 2]


def test_mlp_denoiser_reads_classes_and_any_shape():
    net = MLPDenoiser((1, 4, 4), 16, 3, classes=2, outputs=2)
    x, t = torch.randn(3, 1, 4, 4), torch.rand(3)
    assert net(x, t, torch.tensor([0, 1, 2])).shape == (3, 2, 4, 4)
    assert torch.equal(net(x, t), net(x, t, torch.full((3,), 2)))
    assert not torch.allclose(net(x, t, torch.zeros(3).long()), net(x, t, torch.ones(3).long()))
    with pytest.raises(RoleError, match="without classes"):
        MLPDenoiser()(torch.randn(1, 2), torch.rand(1), torch.zeros(1).long())
