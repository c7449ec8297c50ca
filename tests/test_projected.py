"""Divergences from hidden states: the same as on whole logits, gradients included."""

import math
from typing import get_args

import pytest
import torch
from torch import nn

from stillhouse.errors import ConfigError, DataError
from stillhouse.measures import projected
from stillhouse.measures.projected import (
    Kind,
    plain_divergence,
    projected_cross_entropy,
    projected_divergence,
    projected_topk_divergence,
    projected_topk_kl,
    topk_divergence,
)

N, V, D, E = 11, 37, 6, 9
KINDS = list(get_args(Kind))


def make(*shape, dtype=torch.double):
    return torch.randn(*shape, dtype=dtype)


def models_of(dtype=torch.double, scale=1.0):
    torch.manual_seed(0)
    return (make(N, E, dtype=dtype) * scale, make(V, E, dtype=dtype), (make(N, D, dtype=dtype) * scale)
            .requires_grad_(), make(V, D, dtype=dtype).requires_grad_())


@pytest.fixture
def models():
    return models_of()


def gradients(loss, *leaves):
    return torch.autograd.grad(loss, leaves)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.9, 1.0])
def test_value_and_gradient_are_those_of_the_whole_logits(models, kind, alpha):
    h_t, w_t, h_s, w_s = models
    weight = torch.linspace(0, 2, N, dtype=torch.double)
    for temperature, chunk in ((1.0, None), (2.5, 4), (0.7, 1)):
        p, q = h_t @ w_t.T / temperature, h_s @ w_s.T / temperature
        expected = temperature**2 * plain_divergence(kind, alpha)(p, q, weight=weight, reduction="sum") + 0 * q.sum()
        found = projected_divergence(h_t, w_t, h_s, w_s, kind, alpha, temperature, weight, "sum", chunk)
        assert math.isclose(found.item(), expected.item(), rel_tol=1e-11, abs_tol=1e-13)
        for ours, theirs in zip(gradients(found, h_s, w_s), gradients(expected, h_s, w_s), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_is_the_slope_of_the_value(models, kind):
    h_t, w_t, h_s, w_s = models
    assert torch.autograd.gradcheck(
        lambda h, w: projected_divergence(h_t[:3], w_t, h, w, kind, 0.3, 1.5, chunk=2), (h_s[:3], w_s),
        fast_mode=True)


@pytest.mark.parametrize("kind", KINDS)
def test_single_precision_is_that_of_the_plain_formula(kind):
    """Against the plain formula in float64: within 1e-5 of the largest entry, as float32 on whole logits is too."""
    h_t, w_t, h_s, w_s = models_of()
    exact = plain_divergence(kind, 0.3)(h_t @ w_t.T, h_s @ w_s.T)
    narrow = [x.detach().float() for x in (h_t, w_t, h_s, w_s)]
    narrow[2:] = [x.requires_grad_() for x in narrow[2:]]
    found = projected_divergence(*narrow, kind, 0.3, chunk=3)
    assert found.dtype == torch.float32 and math.isclose(found.item(), exact.item(), rel_tol=1e-5)
    for ours, theirs in zip(gradients(found, *narrow[2:]), gradients(exact, h_s, w_s), strict=True):
        assert (ours - theirs).abs().max() < 1e-5 * theirs.abs().max()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_logits_of_ten_thousand_are_finite_and_right(kind, dtype):
    h_t, w_t, h_s, w_s = models_of(dtype, scale=1e3)
    p, q = h_t @ w_t.T, h_s @ w_s.T
    assert q.abs().max() > 5e3
    expected = plain_divergence(kind, 0.3)(p, q)
    found = projected_divergence(h_t, w_t, h_s, w_s, kind, 0.3)
    loose = 1e-4 if dtype == torch.float32 else 1e-11
    assert math.isclose(found.item(), expected.item(), rel_tol=loose, abs_tol=loose)
    for ours, theirs in zip(gradients(found, h_s, w_s), gradients(expected, h_s, w_s), strict=True):
        assert torch.isfinite(ours).all()
        assert (ours - theirs).abs().max() <= 10 * loose * max(1, theirs.abs().max())


def test_cross_entropy_is_that_of_the_whole_logits(models):
    _, _, h_s, w_s = models
    target, weight = torch.randint(0, V, (N,)), (torch.arange(N) % 3).double()
    for reduction, count in (("sum", 1), ("mean", (weight > 0).sum())):
        each = nn.functional.cross_entropy(h_s @ w_s.T, target, reduction="none")
        expected = (weight * each).sum() / count
        found = projected_cross_entropy(target, h_s, w_s, weight, reduction, chunk=4)
        assert math.isclose(found.item(), expected.item(), rel_tol=1e-12)
        for ours, theirs in zip(gradients(found, h_s, w_s), gradients(expected, h_s, w_s), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
    unread = torch.where(weight > 0, target, -100)
    assert projected_cross_entropy(unread, h_s, w_s, weight).item() == pytest.approx(found.item(), rel=1e-12)


@pytest.mark.parametrize("tail", ["renormalise", "bucket"])
def test_topk_is_the_plain_formula_on_the_known_outcomes(models, tail):
    h_t, w_t, h_s, w_s = models
    log_p, index = (h_t @ w_t.T / 2).log_softmax(1).topk(5, 1)
    log_q = (h_s @ w_s.T / 2).log_softmax(1)
    lq = log_q.gather(1, index)
    if tail == "renormalise":
        lp = log_p.log_softmax(1)
        expected = 4 * (lp.exp() * (lp - lq)).sum(1).mean()
    else:
        rest_p, rest_q = 1 - log_p.exp().sum(1), 1 - lq.exp().sum(1)
        expected = 4 * ((log_p.exp() * (log_p - lq)).sum(1) + rest_p * (rest_p / rest_q).log()).mean()
    found = projected_topk_kl(log_p, index, h_s, w_s, tail, 2.0, chunk=3)
    assert math.isclose(found.item(), expected.item(), rel_tol=1e-10)
    for ours, theirs in zip(gradients(found, h_s, w_s), gradients(expected, h_s, w_s), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("kind", KINDS)
def test_topk_of_any_kind_is_a_lower_bound_that_all_entries_make_exact(models, kind):
    h_t, w_t, h_s, w_s = models
    log_p = (h_t @ w_t.T).log_softmax(1)
    whole = projected_divergence(h_t, w_t, h_s, w_s, kind, 0.3)
    values = []
    for k in (1, 3, 10, V):
        known, index = log_p.topk(k, 1)
        values.append(projected_topk_divergence(known, index, h_s, w_s, kind, 0.3, chunk=4))
    numbers = [v.item() for v in values]
    assert numbers == sorted(numbers) and numbers[0] < 0.9 * whole.item()
    assert math.isclose(numbers[-1], whole.item(), rel_tol=1e-10)
    assert math.isclose(topk_divergence(known, index, h_s @ w_s.T, kind, 0.3).item(), whole.item(), rel_tol=1e-10)
    for ours, theirs in zip(gradients(values[-1], h_s, w_s), gradients(whole, h_s, w_s), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_topk_gradient_is_the_slope_of_the_value_with_entries_that_are_not_known(models, kind):
    h_t, w_t, h_s, w_s = models
    log_p, index = (h_t[:3] @ w_t.T).log_softmax(1).topk(4, 1)
    holes = torch.tensor([[0, 0, 0, 0], [0, 0, 1, 1], [0, 1, 1, 1]], dtype=torch.bool)
    log_p, index = log_p.masked_fill(holes, -torch.inf), index.masked_fill(holes, 0)
    assert torch.autograd.gradcheck(
        lambda h, w: projected_topk_divergence(log_p, index, h, w, kind, 0.3, 1.5, chunk=2), (h_s[:3], w_s),
        fast_mode=True)
    found = projected_topk_divergence(log_p, index, h_s[:3], w_s, kind, 0.3)
    expected = topk_divergence(log_p, index, h_s[:3] @ w_s.T, kind, 0.3)
    assert math.isclose(found.item(), expected.item(), rel_tol=1e-11)
    for ours, theirs in zip(gradients(found, h_s, w_s), gradients(expected, h_s, w_s), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)
    alone = projected_topk_divergence(log_p[1:2, :2], index[1:2, :2], h_s[1:2], w_s, kind, 0.3)
    among = projected_topk_divergence(log_p[1:2], index[1:2], h_s[1:2], w_s, kind, 0.3)
    assert math.isclose(alone.item(), among.item(), rel_tol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_a_teacher_that_is_sure_in_single_precision_gives_finite_numbers(kind):
    h_t, w_t, h_s, w_s = models_of(torch.float32, scale=100.0)
    log_p, index = (h_t @ w_t.T).log_softmax(1).topk(3, 1)
    loss = projected_topk_divergence(log_p, index, h_s, w_s, kind, 0.3)
    assert all(torch.isfinite(x).all() for x in (loss, *gradients(loss, h_s, w_s)))


def test_identical_models_have_no_divergence_and_no_gradient(models):
    _, _, h, w = models
    for kind in KINDS:
        loss = projected_divergence(h.detach(), w.detach(), h, w, kind, 0.4)
        assert abs(loss.item()) < 1e-12
        assert all(g.abs().max() < 1e-12 for g in gradients(loss, h, w))


def test_mean_counts_the_positions_with_a_weight_and_the_others_cost_nothing(models):
    h_t, w_t, h_s, w_s = models
    mask = (torch.arange(N) < 4).double()
    some = projected_divergence(h_t, w_t, h_s, w_s, weight=mask)
    alone = projected_divergence(h_t[:4], w_t, h_s[:4], w_s)
    assert math.isclose(some.item(), alone.item(), rel_tol=1e-12)
    gradient, = gradients(some, h_s)
    assert gradient[4:].abs().max() == 0 < gradient[:4].abs().max()
    none = projected_divergence(h_t, w_t, h_s, w_s, weight=torch.zeros(N, dtype=torch.double))
    assert none.item() == 0 and gradients(none, h_s)[0].abs().max() == 0


def test_batched_half_precision_and_frozen_sides():
    torch.manual_seed(0)
    h_t, h_s = torch.randn(2, 5, E).bfloat16(), torch.randn(2, 5, D).bfloat16().requires_grad_()
    w_t, w_s = torch.randn(V, E).bfloat16(), nn.Parameter(torch.randn(V, D).bfloat16(), requires_grad=False)
    exact = plain_divergence("jsd", 0.5)(h_t.double() @ w_t.double().T, h_s.double() @ w_s.double().T)
    loss = projected_divergence(h_t, w_t, h_s, w_s, "jsd")
    loss.backward()
    assert loss.item() == pytest.approx(exact.item(), rel=1e-5)
    assert loss.dtype == torch.float32 and h_s.grad.dtype == torch.bfloat16 and w_s.grad is None
    with torch.no_grad():
        assert projected_divergence(h_t, w_t, h_s, w_s, "jsd").item() == pytest.approx(loss.item())


def test_inputs_are_left_as_they_were_and_backward_may_be_asked_twice(models):
    before = [x.detach().clone() for x in models]
    loss = projected_divergence(*models, "jsd")
    first = torch.autograd.grad(loss, models[2:], retain_graph=True)
    second = torch.autograd.grad(3 * loss, models[2:])
    assert all(torch.equal(a, b) for a, b in zip(before, models, strict=True))
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(3 * a, b, rtol=1e-12, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_no_chunk_holds_more_logits_than_it_may(models, monkeypatch, kind):
    h_t, w_t, h_s, w_s = models
    monkeypatch.setitem(projected.CHUNK_ENTRIES, "cpu", 2 * V)
    seen, softmax = [], projected._softmax
    monkeypatch.setattr(projected, "_softmax", lambda *a: seen.append(tuple(a[3].shape)) or softmax(*a))
    projected_divergence(h_t, w_t, h_s, w_s, kind)
    assert seen == [(2, V)] * 10 + [(1, V)] * 2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("kind", KINDS)
def test_on_a_gpu_it_is_what_it_is_on_the_cpu(models, kind):
    h_t, w_t, h_s, w_s = models
    there = [x.detach().cuda().requires_grad_() for x in models]
    log_p, index = (h_t @ w_t.T).log_softmax(1).topk(3, 1)
    target = torch.arange(N)
    for here, on_gpu in (
            (projected_divergence(*models, kind, 0.3), projected_divergence(*there, kind, 0.3)),
            (projected_topk_divergence(log_p, index, h_s, w_s, kind, 0.3),
             projected_topk_divergence(log_p.cuda(), index.cuda(), *there[2:], kind, 0.3)),
            (projected_cross_entropy(target, h_s, w_s), projected_cross_entropy(target.cuda(), *there[2:]))):
        assert math.isclose(here.item(), on_gpu.item(), rel_tol=1e-10)
        for a, b in zip(gradients(here, h_s, w_s), gradients(on_gpu, *there[2:]), strict=True):
            torch.testing.assert_close(a, b.cpu(), rtol=1e-8, atol=1e-11)


@pytest.mark.unchecked
def test_what_does_not_fit_is_refused():
    h, w = torch.randn(3, 4), torch.randn(7, 4)
    with pytest.raises(DataError, match=r"teacher has 7 vocabulary entries and the student 8.*answers written"):
        projected_divergence(h, w, h, torch.randn(8, 4))
    with pytest.raises(DataError, match="student's hidden states have 4 features"):
        projected_divergence(h, w, h, torch.randn(7, 5))
    with pytest.raises(DataError, match="differ in their positions"):
        projected_divergence(h, w, h[:2], w)
    with pytest.raises(ConfigError, match="kind is one of"):
        projected_divergence(h, w, h, w, "hellinger")
    with pytest.raises(ConfigError, match="alpha lies between 0 and 1"):
        projected_divergence(h, w, h, w, "skew_kl", 1.5)
    with pytest.raises(ConfigError, match="temperature"):
        projected_divergence(h, w, h, w, temperature=0.0)
    with pytest.raises(DataError, match="outside of the student's vocabulary of 7"):
        projected_topk_kl(torch.zeros(3, 2), torch.full((3, 2), 7), h, w)
    with pytest.raises(DataError, match="no known outcome"):
        projected_topk_kl(torch.full((3, 2), -torch.inf), torch.zeros(3, 2, dtype=torch.long), h, w)
    with pytest.raises(DataError, match="target names entries outside"):
        projected_cross_entropy(torch.full((3,), -100), h, w)
