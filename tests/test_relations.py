import math

import pytest
import torch

from stillhouse.errors import ConfigError, DataError
from stillhouse.measures.divergences import kl
from stillhouse.measures.relations import (
    cka,
    cosine_matrix,
    distances,
    gram,
    relational_js,
    rkd_angle,
    rkd_distance,
    similarity_preserving,
)


def features(n=6, d=5, seed=0):
    return torch.randn(n, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def rotation(d=5, seed=9):
    return torch.linalg.qr(features(d, d, seed)).Q


def test_relational_js_is_zero_for_equal_views_at_equal_temperatures_only():
    a, bank = features(), features(8, seed=1)
    assert relational_js(a, a, bank).abs().item() < 1e-14
    assert relational_js(a, a, bank, temperature=0.1, target_temperature=0.05) > 1e-3
    expected = kl(cosine_matrix(a, bank) / 0.05, cosine_matrix(a, bank) / 0.1)
    assert torch.allclose(relational_js(a, a, bank, 0.1, 0.05), expected, atol=1e-12)


def test_relational_js_ignores_scale_and_the_order_of_the_views():
    a, b, bank = features(), features(seed=1), features(8, seed=2)
    expected = relational_js(a, b, bank)
    assert torch.allclose(relational_js(b, a, bank), expected, atol=1e-14)
    scale = torch.rand(6, 1, dtype=torch.float64) + 0.1
    assert torch.allclose(relational_js(a * scale, b, bank), expected, atol=1e-12)
    assert torch.allclose(relational_js(a, b * scale, bank), expected, atol=1e-12)
    assert torch.allclose(relational_js(a, b, bank * 7), expected, atol=1e-12)


def test_relational_js_written_out_with_gradient_through_the_target():
    a, b, bank = features().requires_grad_(), features(seed=1), features(8, seed=2)
    u, v = (torch.softmax(cosine_matrix(x, bank) / 0.2, 1) for x in (a, b))
    t = (torch.softmax(cosine_matrix(a, bank) / 0.1, 1) + torch.softmax(cosine_matrix(b, bank) / 0.1, 1)) / 2
    written = ((t * (t.log() - u.log())).sum(1).mean() + (t * (t.log() - v.log())).sum(1).mean()) / 2
    loss = relational_js(a, b, bank, temperature=0.2, target_temperature=0.1)
    assert torch.allclose(loss, written, atol=1e-12)
    assert torch.allclose(*(torch.autograd.grad(x, a)[0] for x in (loss, written)), atol=1e-12)


def test_gram_and_cosine():
    a = features()
    unit = a / a.norm(dim=1, keepdim=True)
    assert torch.allclose(cosine_matrix(a, a), gram(unit), atol=1e-14)
    assert torch.allclose(gram(a.view(6, 5, 1, 1)), a @ a.T)


def test_rkd_does_not_see_rotation_shift_or_scale():
    a = features()
    moved = 3 * a @ rotation() + 1
    for loss in (rkd_distance, rkd_angle):
        assert loss(a, moved).abs().item() < 1e-14
        assert loss(a, features(seed=1)) > 1e-3


def test_rkd_on_a_right_angle_by_hand():
    corner = torch.tensor([[1.0, 0], [0, 0], [0, 1]], dtype=torch.float64)
    line = torch.tensor([[0.0, 0], [1, 0], [2, 0]], dtype=torch.float64)
    mean_corner, mean_line = (2 + math.sqrt(2)) / 3, 4 / 3
    gaps = [1 / mean_corner - 1 / mean_line] * 2 + [math.sqrt(2) / mean_corner - 2 / mean_line]
    assert rkd_distance(corner, line).item() == pytest.approx(2 * sum(g * g / 2 for g in gaps) / 9, abs=1e-14)
    half = math.sqrt(0.5)
    # cosines at the three corners, corner against line: (half, 1), (0, -1), (half, 1); each occurs twice in 27
    expected = 2 * (2 * (1 - half) ** 2 / 2 + 1 / 2) / 27
    assert rkd_angle(corner, line).item() == pytest.approx(expected, abs=1e-14)


def test_distances_have_a_finite_gradient_at_equal_rows():
    a = torch.ones(3, 2, dtype=torch.float64, requires_grad=True)
    distances(a).sum().backward()
    assert torch.equal(a.grad, torch.zeros_like(a))


def test_similarity_preserving():
    a = features()
    assert similarity_preserving(a, 5 * a @ rotation()).item() < 1e-25
    eye, ones = torch.eye(2, dtype=torch.float64), torch.ones(2, 1, dtype=torch.float64)
    # rows (1, 0), (0, 1) against (1, 1)/sqrt 2 twice
    assert similarity_preserving(eye, ones).item() == pytest.approx(2 * ((1 - 0.5**0.5) ** 2 + 0.5) / 4, abs=1e-14)
    assert similarity_preserving(a.view(6, 5, 1, 1), a).item() == 0.0


def test_cka():
    a, b = features(50), features(50, 3, seed=1)
    assert cka(a, 2 * a @ rotation() + 3).item() == pytest.approx(1.0, abs=1e-12)
    centred = torch.eye(50, dtype=torch.float64) - 1 / 50
    k, m = gram(a), gram(b)
    hsic = [torch.trace(x @ centred @ y @ centred) for x, y in ((k, m), (k, k), (m, m))]
    assert cka(a, b).item() == pytest.approx((hsic[0] / (hsic[1] * hsic[2]).sqrt()).item(), abs=1e-12)
    assert 0 < cka(a, b) < 0.5


@pytest.mark.unchecked
def test_bad_input_is_named():
    with pytest.raises(DataError, match="reference bank"):
        relational_js(features(), features(), features(8, 4))
    with pytest.raises(ConfigError, match="temperature"):
        relational_js(features(), features(), features(), temperature=0.0)
    with pytest.raises(DataError, match="6 and 5 rows"):
        cka(features(6), features(5))
    with pytest.raises(DataError, match="at least 3"):
        rkd_angle(features(2), features(2))
