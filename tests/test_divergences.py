"""Divergences: bounds, symmetry, gradients, limits, and agreement with scipy."""

import math

import numpy as np
import pytest
import torch
from scipy.spatial.distance import jensenshannon
from scipy.special import rel_entr
from scipy.special import softmax as np_softmax

from stillhouse.errors import ConfigError, DataError
from stillhouse.measures import divergences as dv

ALL = {
    "kl": dv.kl,
    "reverse_kl": lambda p, q, **o: dv.kl(q, p, **o),
    "js": dv.js,
    "jeffreys": dv.jeffreys,
    "skew_kl": dv.skew_kl,
    "skew_reverse_kl": dv.skew_reverse_kl,
    "generalized_jsd": lambda p, q, **o: dv.generalized_jsd(p, q, 0.3, **o),
    "total_variation": dv.total_variation,
    "binary_kl": dv.binary_kl,
}


@pytest.fixture
def logits():
    generator = torch.Generator().manual_seed(0)
    return (2 * torch.randn(2, 4, 3, 6, dtype=torch.float64, generator=generator)).unbind(0)


def log(*probabilities):
    return torch.tensor(probabilities, dtype=torch.float64).log()


@pytest.mark.parametrize("name", ALL)
def test_zero_with_zero_gradient_at_equality_and_positive_elsewhere(name, logits):
    p, q = logits
    assert (ALL[name](p, q, reduction="none") > 0).all()
    same = p.clone().requires_grad_()
    value = ALL[name](p, same)
    assert abs(value.item()) < 1e-14
    if name != "total_variation":
        value.backward()
        assert same.grad.abs().max() < 1e-14


@pytest.mark.parametrize("name", ALL)
def test_gradients_by_finite_differences(name, logits):
    p, q = (x[0, :2].clone().requires_grad_() for x in logits)
    assert torch.autograd.gradcheck(lambda a, b: ALL[name](a, b), (p, q))


@pytest.mark.parametrize("name", ALL)
def test_weight_mask_and_reduction(name, logits):
    p, q = logits
    measure = ALL[name]
    each = measure(p, q, reduction="none")
    assert each.shape == p.shape[:-1]
    mask = torch.tensor([[1, 0, 1], [0, 0, 0], [1, 1, 1], [1, 0, 0]])
    weight = torch.arange(4, dtype=torch.float64)
    assert torch.allclose(measure(p, q), each.mean())
    assert torch.allclose(measure(p, q, reduction="sum"), each.sum())
    assert torch.allclose(measure(p, q, mask=mask), each[mask.bool()].mean())
    assert torch.allclose(measure(p, q, weight=weight), (each * weight[:, None]).mean())
    weighted = (each * weight[:, None])[mask.bool()]
    assert torch.allclose(measure(p, q, weight=weight, mask=mask), weighted.sum() / mask.sum())
    assert measure(p, q, mask=torch.zeros(4, 3)).item() == 0


def test_the_value_of_a_masked_sample_is_not_read(logits):
    p, q = (x.clone() for x in logits)
    q[0, 0] = torch.nan
    mask = torch.ones(4, 3)
    mask[0, 0] = 0
    assert torch.isfinite(dv.kl(p, q, mask=mask))


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_against_scipy(logits, temperature):
    p, q = logits
    a, b = (np_softmax(x.numpy() / temperature, -1) for x in (p, q))
    square = temperature**2
    pairs = {
        dv.kl: square * rel_entr(a, b).sum(-1),
        dv.js: square * jensenshannon(a, b, axis=-1) ** 2,
        dv.jeffreys: square * (rel_entr(a, b) + rel_entr(b, a)).sum(-1),
        dv.soft_cross_entropy: square * -(a * np.log(b)).sum(-1),
    }
    for measure, expected in pairs.items():
        assert np.allclose(measure(p, q, temperature=temperature, reduction="none").numpy(), expected, atol=1e-12)
    skewed = square * rel_entr(a, 0.2 * a + 0.8 * b).sum(-1)
    assert np.allclose(dv.skew_kl(p, q, 0.2, temperature, reduction="none").numpy(), skewed, atol=1e-12)
    reverse = square * rel_entr(b, 0.8 * a + 0.2 * b).sum(-1)
    assert np.allclose(dv.skew_reverse_kl(p, q, 0.2, temperature, reduction="none").numpy(), reverse, atol=1e-12)
    yes, other = (1 / (1 + np.exp(-x.numpy() / temperature)) for x in (p, q))
    binary = square * (rel_entr(yes, other) + rel_entr(1 - yes, 1 - other)).sum(-1)
    assert np.allclose(dv.binary_kl(p, q, temperature, reduction="none").numpy(), binary, atol=1e-12)
    if temperature == 1:
        assert np.allclose(dv.total_variation(p, q, reduction="none").numpy(), abs(a - b).sum(-1) / 2)


def test_symmetry_and_order(logits):
    p, q = logits
    for symmetric in (dv.js, dv.jeffreys, dv.total_variation):
        assert torch.allclose(symmetric(p, q), symmetric(q, p))
    assert not torch.allclose(dv.kl(p, q), dv.kl(q, p))
    assert torch.allclose(dv.soft_cross_entropy(p, q), dv.kl(p, q) + dv.soft_cross_entropy(p, p))
    assert torch.allclose(dv.signed_cross_entropy(p.softmax(-1), q), dv.soft_cross_entropy(p, q))
    assert torch.allclose(dv.signed_cross_entropy(-p.softmax(-1), q), -dv.soft_cross_entropy(p, q))


def test_temperature_squared_keeps_the_gradient(logits):
    """At high temperature the gradient of T^2 KL tends to (z_q - z_p) / classes for centred logits (Hinton)."""
    p, q = (x - x.mean(-1, keepdim=True) for x in logits)
    q = q.requires_grad_()
    (gradient,) = torch.autograd.grad(dv.kl(p, q, temperature=1e4, reduction="sum"), q)
    assert torch.allclose(gradient, (q - p) / 6, atol=1e-3)


def test_js_bounds_disjoint_and_gradient_of_ssld():
    """0 <= JS <= ln 2; ln 2 on disjoint one-hots; dL/dz_s = 1/2 p_s (log(p_s/m) - sum p_s log(p_s/m))."""
    one, other = log(1.0, 0.0), log(0.0, 1.0)
    assert dv.js(one, other).item() == pytest.approx(math.log(2), abs=1e-15)
    generator = torch.Generator().manual_seed(1)
    p, q = (20 * torch.randn(2, 500, 5, dtype=torch.float64, generator=generator)).unbind(0)
    values = dv.js(p, q, reduction="none")
    assert (values >= 0).all() and (values <= math.log(2) + 1e-15).all()
    z = q.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(dv.js(p, z, reduction="sum"), z)
    p_s, m = q.softmax(-1), (p.softmax(-1) + q.softmax(-1)) / 2
    ratio = (p_s / m).log()
    expected = p_s * (ratio - (p_s * ratio).sum(-1, keepdim=True)) / 2
    assert torch.allclose(gradient, expected, atol=1e-12)


def test_js_is_a_quarter_of_kl_near_equality():
    p = (0.5, 0.3, 0.2)
    q = (0.501, 0.2995, 0.1995)
    ratio = dv.js(log(*p), log(*q)) / dv.kl(log(*p), log(*q))
    assert ratio.item() == pytest.approx(0.2499945, abs=1e-7)


def test_skew_limits_and_bound(logits):
    p, q = logits
    assert torch.equal(dv.skew_kl(p, q, 0.0), dv.kl(p, q))
    assert torch.allclose(dv.skew_kl(p, q, 1e-9), dv.kl(p, q), rtol=1e-5)
    assert dv.skew_kl(p, q, 1.0).item() == 0 and dv.skew_reverse_kl(p, q, 1.0).item() == 0
    assert torch.equal(dv.skew_reverse_kl(p, q, 0.0), dv.kl(q, p))
    for alpha in (0.01, 0.1, 0.5, 0.9):
        assert (dv.skew_kl(50 * p, 50 * q, alpha, reduction="none") <= -math.log(alpha) + 1e-12).all()
    one, other = log(1.0, 0.0), log(0.0, 1.0)
    assert dv.skew_kl(one, other, 0.1).item() == pytest.approx(math.log(10), abs=1e-12)
    assert dv.kl(one, other).item() == math.inf


def test_skew_gradient_in_the_probabilities_is_bounded():
    """q free, not through a softmax: |d SKL / d q_y| <= (1 - a) / a = 9, attained at q_y = 0; unbounded for KL."""
    alpha = 0.1
    q = torch.tensor([1e-12, 1 - 1e-12], dtype=torch.float64, requires_grad=True)
    log_p = log(1 - 1e-12, 1e-12)
    value = dv.kl_of_logs(log_p, dv.log_mixture(log_p, q.log(), alpha))
    (gradient,) = torch.autograd.grad(value, q)
    assert gradient[0].item() == pytest.approx(-9, abs=1e-6)
    (plain,) = torch.autograd.grad(dv.kl_of_logs(log_p, q.log()), q)
    assert plain[0].item() < -1e11


def test_generalized_jsd_tends_to_both_kls(logits):
    p, q = logits
    assert torch.allclose(dv.generalized_jsd(p, q, 1e-7) / 1e-7, dv.kl(p, q), rtol=1e-4)
    assert torch.allclose(dv.generalized_jsd(p, q, 1 - 1e-7) / 1e-7, dv.kl(q, p), rtol=1e-4)
    assert dv.generalized_jsd(p, q, 0.0).item() == pytest.approx(0, abs=1e-15)


@pytest.mark.parametrize("name", ["js", "skew_kl", "skew_reverse_kl", "kl", "total_variation", "jeffreys"])
def test_classes_ruled_out_on_both_sides_are_harmless(name, logits):
    p, q = logits
    ruled_out = torch.full((4, 3, 1), -torch.inf, dtype=torch.float64)
    wide = torch.cat([q, ruled_out], -1).requires_grad_()
    value = ALL[name](torch.cat([p, ruled_out], -1), wide)
    assert torch.allclose(value, ALL[name](p, q))
    (gradient,) = torch.autograd.grad(value, wide)
    assert torch.isfinite(gradient).all()


def test_extreme_logits_in_single_and_half_precision_stay_finite():
    p = torch.tensor([[3e4, 0.0, -3e4]])
    q = -p
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for measure in (dv.kl, dv.js, dv.skew_kl, dv.skew_reverse_kl, dv.binary_kl):
            a, b = p.to(dtype), q.to(dtype).requires_grad_()
            value = measure(a, b)
            (gradient,) = torch.autograd.grad(value, b)
            assert value.dtype == torch.float32
            assert torch.isfinite(value) and torch.isfinite(gradient).all()


@pytest.mark.unchecked
def test_bad_input_is_named(logits):
    p, q = logits
    with pytest.raises(DataError, match=r"\(4, 3, 6\).*\(4, 3, 5\)"):
        dv.js(p, q[..., :5])
    with pytest.raises(DataError, match="mask has shape"):
        dv.kl(p, q, mask=torch.ones(3))
    with pytest.raises(ConfigError, match="temperature"):
        dv.kl(p, q, temperature=0.0)
    with pytest.raises(ConfigError, match="alpha"):
        dv.skew_kl(p, q, 1.5)
    with pytest.raises(ConfigError, match="reduction"):
        dv.kl(p, q, reduction="batchmean")
