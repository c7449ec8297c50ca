"""Divergences from hidden states: the same as on whole logits, gradients included."""

import math

import pytest
import torch
from torch import nn

from stillhouse.errors import ConfigError, DataError
from stillhouse.measures import divergences as plain
from stillhouse.measures import projected
from stillhouse.measures.projected import projected_divergence, projected_topk_kl

N, V, D, E = 11, 37, 6, 9
FORMS = {
    "kl": lambda p, q, a, **k: plain.kl(p, q, **k), "reverse_kl": lambda p, q, a, **k: plain.kl(q, p, **k),
    "skew_kl": plain.skew_kl, "skew_reverse_kl": plain.skew_reverse_kl, "jsd": plain.generalized_jsd,
}


@pytest.fixture
def models(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "float", lambda self: self)  # everything in float64
    torch.manual_seed(0)
    make = lambda *shape: torch.randn(*shape, dtype=torch.double)  # noqa: E731
    return make(N, E), make(V, E), make(N, D).requires_grad_(), make(V, D).requires_grad_()


def gradients(loss, *leaves):
    return torch.autograd.grad(loss, leaves)


@pytest.mark.parametrize("kind", list(FORMS))
@pytest.mark.parametrize(("temperature", "chunk"), [(1.0, None), (2.5, 4), (0.7, 1)])
def test_value_and_gradient_are_those_of_the_whole_logits(models, kind, temperature, chunk):
    h_t, w_t, h_s, w_s = models
    weight = torch.linspace(0, 2, N, dtype=torch.double)
    p, q = h_t @ w_t.T, h_s @ w_s.T
    expected = FORMS[kind](p, q, 0.3, temperature=temperature, weight=weight, reduction="sum")
    found = projected_divergence(h_t, w_t, h_s, w_s, kind, 0.3, temperature, weight, "sum", chunk)
    assert math.isclose(found.item(), expected.item(), rel_tol=1e-12)
    for ours, theirs in zip(gradients(found, h_s, w_s), gradients(expected, h_s, w_s), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


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


def test_all_outcomes_known_is_the_whole_divergence(models):
    h_t, w_t, h_s, w_s = models
    log_p, index = (h_t @ w_t.T).log_softmax(1).sort(1, descending=True)
    whole = projected_divergence(h_t, w_t, h_s, w_s)
    assert math.isclose(projected_topk_kl(log_p, index, h_s, w_s).item(), whole.item(), rel_tol=1e-10)


def test_identical_models_have_no_divergence_and_no_gradient(models):
    _, _, h, w = models
    for kind in FORMS:
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
    loss = projected_divergence(h_t, w_t, h_s, w_s, "jsd")
    loss.backward()
    assert loss.dtype == torch.float32 and h_s.grad.dtype == torch.bfloat16 and w_s.grad is None
    with torch.no_grad():
        assert projected_divergence(h_t, w_t, h_s, w_s, "jsd").item() == pytest.approx(loss.item())


def test_no_chunk_holds_more_logits_than_it_may(models, monkeypatch):
    h_t, w_t, h_s, w_s = models
    monkeypatch.setattr(projected, "CHUNK_ENTRIES", 2 * V)
    seen = []
    form = projected._FORMS["kl"]
    monkeypatch.setitem(projected._FORMS, "kl", lambda p, q, a: seen.append(tuple(q.shape)) or form(p, q, a))
    projected_divergence(h_t, w_t, h_s, w_s)
    assert seen == [(2, V)] * 5 + [(1, V)]


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
    with pytest.raises(ConfigError, match="temperature"):
        projected_divergence(h, w, h, w, temperature=0.0)
    with pytest.raises(DataError, match="outside of the student's vocabulary of 7"):
        projected_topk_kl(torch.zeros(3, 2), torch.full((3, 2), 7), h, w)
