"""Exact teachers: their scores are the gradients of their log densities."""

import pytest
import torch

from stillhouse.data.densities import gauss2d, ring
from stillhouse.diffusion.exact import GaussianMixture, fit_class_mixture, smoothed_data
from stillhouse.diffusion.process import VE, Flow, TrigFlow, VPCosine
from stillhouse.errors import DataError, RoleError

F64 = torch.float64


def covariances(count, dim):
    root = torch.randn(count, dim, dim, dtype=F64) * 0.4
    return root @ root.mT + 0.1 * torch.eye(dim, dtype=F64)


def mixture(process, full, shape=(3,)):
    torch.manual_seed(3)
    spread = covariances(5, 3) if full else torch.rand(5, dtype=F64) + 0.1
    return GaussianMixture(process, torch.randn(5, 3, dtype=F64), spread, torch.rand(5, dtype=F64),
                           torch.tensor([0, 0, 1, 1, 2]), shape)


@pytest.mark.parametrize("full", [False, True], ids=["isotropic", "full"])
@pytest.mark.parametrize("process", [VPCosine(), VE(), Flow(), TrigFlow(0.5)], ids=repr)
def test_score_is_the_gradient_of_the_log_density(process, full):
    teacher = mixture(process, full)
    t = torch.linspace(0.1, 1, 12, dtype=F64)
    x = torch.randn(12, 3, dtype=F64, requires_grad=True)
    for condition in (None, torch.arange(12) % 4):
        (gradient,) = torch.autograd.grad(teacher.log_density(x, t, condition).sum(), x)
        assert torch.allclose(teacher.score(x, t, condition), gradient, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("full", [False, True], ids=["isotropic", "full"])
def test_log_density_is_normalised_and_classes_are_conditionals(full):
    process = VPCosine()
    teacher = mixture(process, full)
    t, x = torch.full((1,), 0.4, dtype=F64), torch.randn(1, 3, dtype=F64)
    a, s = process.alpha(t), process.sigma(t)
    expected = 0.0
    for weight, mean, variance, label in zip(teacher.log_weights.exp(), teacher.means, teacher.variances,
                                             teacher.labels, strict=True):
        index = int((teacher.means == mean).all(1).nonzero())
        axes = teacher.axes[index] if full else torch.eye(3, dtype=F64)
        covariance = a**2 * (axes * variance) @ axes.T + s**2 * torch.eye(3, dtype=F64)
        normal = torch.distributions.MultivariateNormal(a * mean, covariance)
        if label == 1:
            expected = expected + weight * normal.log_prob(x).exp()
    share = teacher.log_weights.exp()[teacher.labels == 1].sum()
    assert torch.allclose(teacher.log_density(x, t, torch.tensor([1])).exp(), expected / share)
    posterior = teacher.class_log_probability(x, t).exp()
    everywhere = teacher.log_density(x, t).exp()
    assert torch.allclose(posterior[:, 1], expected / everywhere)
    assert torch.allclose(posterior.sum(1), posterior.new_ones(1))


def test_full_and_isotropic_agree():
    process, means = Flow(), torch.randn(4, 2, dtype=F64)
    one = GaussianMixture(process, means, torch.full((4,), 0.3))
    other = GaussianMixture(process, means, (0.3**2 * torch.eye(2)).expand(4, 2, 2))
    x, t = torch.randn(6, 2, dtype=F64), torch.linspace(0.1, 1, 6, dtype=F64)
    assert torch.allclose(one(x, t), other(x, t), atol=1e-7)
    assert torch.allclose(one.log_density(x, t), other.log_density(x, t), atol=1e-6)


def test_null_condition_means_no_condition_and_one_point_is_its_own_estimate():
    teacher = mixture(VPCosine(), True)
    x, t = torch.randn(4, 3), torch.rand(4)
    null = teacher.null_condition.expand(4)
    assert torch.equal(teacher(x, t), teacher(x, t, null))
    point = GaussianMixture(VPCosine(), torch.tensor([[1.0, -2.0]]), torch.tensor([1e-9]))
    assert torch.allclose(point(torch.randn(5, 2), torch.rand(5)), torch.tensor([1.0, -2.0]).expand(5, 2))


def test_smoothed_data_is_a_softmax_mean_of_the_samples():
    torch.manual_seed(0)
    data = torch.randn(7, 1, 2, 2, dtype=F64)
    process, std = VPCosine(), 1e-6
    teacher = smoothed_data(process, data, std)
    t = torch.tensor([0.3, 0.8], dtype=F64)
    x_t = process.noise(data[:2], t, torch.randn(2, 1, 2, 2, dtype=F64))
    a, s = process.alpha(t)[:, None], process.sigma(t)[:, None]
    distance = (x_t.flatten(1)[:, None] - a[..., None] * data.flatten(1)).square().sum(-1)
    shares = (-distance / (2 * s**2)).softmax(1)
    assert torch.allclose(teacher(x_t, t).flatten(1), shares @ data.flatten(1), atol=1e-6)


def test_samples_have_the_moments_of_their_mixture():
    teacher = mixture(VPCosine(), True)
    generator = torch.Generator().manual_seed(0)
    x, component = teacher.sample(20_000, generator=generator)
    own = x[component == 2].double()
    covariance = (teacher.axes[2] * teacher.variances[2]) @ teacher.axes[2].T
    assert torch.allclose(own.mean(0), teacher.means[2], atol=0.05)
    assert torch.allclose(own.T.cov(), covariance, atol=0.05)
    _, component = teacher.sample(50, torch.full((50,), 1), generator)
    assert set(component.tolist()) <= {2, 3}


def test_fitted_class_mixture_knows_its_classes():
    centres = ring(4)
    data = gauss2d(800, centres, std=0.2)
    teacher = fit_class_mixture(VPCosine(), data.x, data.label % 2, components=2)
    assert teacher.means.shape == (4, 2) and teacher.labels.tolist() == [0, 0, 1, 1]
    x, _ = teacher.sample(200, torch.ones(200, dtype=torch.long), torch.Generator().manual_seed(0))
    nearest = torch.cdist(x, centres).argmin(1)
    assert (nearest % 2 == 1).all()
    assert teacher.variances.sqrt().mean().item() == pytest.approx(0.2, rel=0.1)
    with pytest.raises(DataError, match="too few"):
        fit_class_mixture(VPCosine(), data.x[:4], torch.arange(4))


def test_digits_teacher_is_a_class_conditional_picture_denoiser(tmp_path, monkeypatch):
    monkeypatch.setenv("STILLHOUSE_CACHE", str(tmp_path))
    from stillhouse.zoo.denoisers import digits_teacher

    teacher = digits_teacher(VPCosine())
    assert teacher.means.shape == (30, 64) and teacher.classes == 10
    x, component = teacher.sample(40, generator=torch.Generator().manual_seed(0))
    assert x.shape == (40, 1, 8, 8)
    guess = teacher.class_log_probability(x.double(), torch.full((40,), 0.02, dtype=F64)).argmax(1)
    assert (guess == teacher.labels[component]).float().mean() > 0.9
    t = torch.full((4,), 0.5, dtype=F64)
    y = torch.randn(4, 1, 8, 8, dtype=F64, requires_grad=True)
    (gradient,) = torch.autograd.grad(teacher.log_density(y, t, torch.tensor([0, 3, 9, 10])).sum(), y)
    assert torch.allclose(teacher.score(y, t, torch.tensor([0, 3, 9, 10])), gradient, atol=1e-8)


@pytest.mark.unchecked
def test_exact_teachers_ignore_autocast_and_refuse_bad_input():
    teacher = mixture(VPCosine(), False)
    x, t = torch.randn(3, 3), torch.rand(3)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(teacher(x, t), teacher(x, t)) and teacher(x, t).dtype == torch.float32
        inside = teacher(x, t)
    assert torch.equal(inside, teacher(x, t))
    with pytest.raises(RoleError, match="shape"):
        teacher(torch.randn(3, 4), t)
    with pytest.raises(DataError, match="spread"):
        GaussianMixture(VPCosine(), torch.randn(2, 2), torch.ones(3))
    with pytest.raises(DataError, match="positive"):
        GaussianMixture(VPCosine(), torch.randn(1, 2), torch.tensor([[[1.0, 2.0], [2.0, 1.0]]]))
    plain = GaussianMixture(VPCosine(), torch.randn(2, 2), torch.ones(2))
    with pytest.raises(RoleError, match="no classes"):
        plain(torch.randn(1, 2), torch.rand(1), torch.zeros(1, dtype=torch.long))
