import itertools

import pytest
import torch

from stillhouse.data.clusters import kmeans, nearest_centre, principal_components
from stillhouse.data.digits import digits
from stillhouse.data.label_shift import dirichlet_proportions, draw_domains, with_styles
from stillhouse.data.sets import TensorSet, column
from stillhouse.data.topics import anchors, frequencies, nmf, normalised
from stillhouse.errors import ConfigError, DataError
from stillhouse.measures.label_shift import (
    adjusted,
    class_posterior,
    domain_given_class,
    identified,
    proportion_error,
)

SPARSE = torch.tensor([[0.7, 0, 0.3, 0], [0.3, 0.6, 0, 0.2], [0, 0.4, 0.7, 0.8]], dtype=torch.double)
POSITIVE = torch.tensor([[0.6, 0.2, 0.2, 0.4], [0.2, 0.6, 0.2, 0.3], [0.2, 0.2, 0.6, 0.3]], dtype=torch.double)


def words(m=12, k=3):
    """p(x | y) over m words, the first k of them anchors of one class each."""
    C = torch.rand(m, k, dtype=torch.double, generator=torch.Generator().manual_seed(0))
    C[:k] = torch.diag(C.diagonal() + 0.2)
    return C / C.sum(0)


def apart(A, B):
    """Largest difference of two matrices under the best order of A's rows."""
    return min((A[list(order)] - B).abs().max().item() for order in itertools.permutations(range(len(A))))


# ---------------------------------------------------------------- factors


def test_nmf_finds_the_factors_from_any_start_where_classes_are_missing_from_domains():
    C = words()
    for seed in range(4):
        c, w = nmf(C @ SPARSE, 3, starts=1, iterations=20_000, tolerance=1e-14, seed=seed)
        assert apart(w, SPARSE) < 1e-4 and apart(c.T, C.T) < 1e-4


def test_nmf_reaches_zero_residual_with_wrong_factors_where_every_class_is_everywhere():
    Q = words() @ POSITIVE
    for seed in range(4):
        c, w = nmf(Q, 3, starts=1, iterations=20_000, tolerance=1e-14, seed=seed)
        assert (c @ w - Q).abs().max() < 1e-10 and apart(w, POSITIVE) > 0.1


@pytest.mark.parametrize("W", [SPARSE, POSITIVE])
def test_anchors_find_both(W):
    C = words()
    order = torch.randperm(12, generator=torch.Generator().manual_seed(1))
    c, w, chosen = anchors((C @ W)[order], 3)
    assert apart(w, W) < 1e-12 and apart(c.T, C[order].T) < 1e-12
    assert sorted(order[chosen].tolist()) == [0, 1, 2]


def test_rare_words_are_no_anchors():
    Q = torch.cat([words() @ POSITIVE, 1e-6 * torch.eye(4, dtype=torch.double)])
    _, w, chosen = anchors(Q / Q.sum(0), 3, smallest=1e-3)
    assert apart(w, POSITIVE) < 1e-3 and int(chosen.max()) < 12
    assert apart(anchors(Q / Q.sum(0), 3)[1], POSITIVE) > 0.1


def test_normalised_factors_have_columns_that_sum_to_1_and_the_same_product():
    C, scale = words(), torch.tensor([2.0, 0.5, 3.0], dtype=torch.double)
    c, w = normalised(C * scale, POSITIVE / scale[:, None])
    ones = torch.ones(4, dtype=torch.double)
    assert torch.allclose(c.sum(0), ones[:3]) and torch.allclose(w.sum(0), ones)
    assert torch.allclose(c @ w, C @ POSITIVE, atol=1e-15)
    for c, w in (nmf(C @ POSITIVE, 3), anchors(C @ POSITIVE, 3)[:2]):
        assert torch.allclose(c.sum(0), ones[:3]) and torch.allclose(w.sum(0), ones)


def test_frequencies_count_per_document():
    Q = frequencies(torch.tensor([0, 0, 1, 2, 2]), torch.tensor([0, 0, 0, 1, 1]), 3, 2)
    assert torch.allclose(Q, torch.tensor([[2 / 3, 0], [1 / 3, 0], [0, 1]], dtype=torch.double))
    with pytest.raises(DataError, match="document 1"):
        frequencies(torch.tensor([0]), torch.tensor([0]), 1, 3)
    with pytest.raises(DataError, match="5 topics"):
        nmf(words() @ POSITIVE, 5)
    with pytest.raises(DataError, match="0 or more"):
        anchors(-words() @ POSITIVE, 2)


# ---------------------------------------------------------------- posteriors


def exact(C, W):
    """p(y | x) and p(d | x) of every word, under uniform p(d)."""
    joint = C * W.mean(1)
    posterior = joint / joint.sum(1, keepdim=True)
    return posterior, posterior @ domain_given_class(W).T


@pytest.mark.parametrize("W", [SPARSE, POSITIVE])
def test_the_pseudo_inverse_gives_the_true_posterior(W):
    posterior, f = exact(words(), W)
    assert torch.allclose(f, (words() @ W) / (words() @ W).sum(1, keepdim=True), atol=1e-14)
    found = class_posterior(f, W)
    assert torch.allclose(found, posterior, atol=1e-12)
    assert torch.allclose(found[:3], torch.eye(3, dtype=torch.double), atol=1e-12)
    assert identified(W)


def test_with_full_rank_it_sums_to_1_whenever_the_domains_do():
    f = torch.rand(20, 4, dtype=torch.double, generator=torch.Generator().manual_seed(2))
    f = f / f.sum(1, keepdim=True)
    P = domain_given_class(POSITIVE)
    f = f @ torch.linalg.pinv(P).T @ P.T  # within the column space of P
    f = f / f.sum(1, keepdim=True)
    found = class_posterior(f, POSITIVE)
    assert torch.allclose(found.sum(1), torch.ones(20, dtype=torch.double), atol=1e-12)
    assert torch.allclose(found @ P.T, f, atol=1e-12)


def test_too_few_domains_or_equal_classes_are_not_identified():
    few = POSITIVE[:, :2] / POSITIVE[:, :2].sum(0)
    equal = torch.stack([POSITIVE[0], POSITIVE[0], POSITIVE[2]])
    for W in (few, equal / equal.sum(0)):
        assert not identified(W)
        posterior, f = exact(words(), W)
        found = class_posterior(f, W)
        assert not torch.allclose(found, posterior, atol=1e-3)
        assert torch.allclose(found @ domain_given_class(W).T, f, atol=1e-10)
        assert (found.norm(dim=1) <= posterior.norm(dim=1) + 1e-12).all()


def test_domain_ids_may_be_permuted_and_domains_doubled():
    _, f = exact(words(), POSITIVE)
    d = torch.arange(12) % 4
    ours = adjusted(class_posterior(f, POSITIVE), POSITIVE, d)
    truth = words() * POSITIVE[:, d].T
    assert torch.allclose(ours, truth / truth.sum(1, keepdim=True), atol=1e-12)
    order = torch.tensor([2, 0, 3, 1])
    again = adjusted(class_posterior(f[:, order], POSITIVE[:, order]), POSITIVE[:, order], order.argsort()[d])
    assert torch.allclose(again, ours, atol=1e-12)
    doubled = torch.cat([POSITIVE, POSITIVE[:, :1]], 1)
    assert torch.allclose(adjusted(class_posterior(exact(words(), doubled)[1], doubled), doubled, d), ours, atol=1e-12)


def test_negative_entries_count_as_none_and_nothing_left_gives_the_prior():
    posterior = torch.tensor([[1.2, -0.2, 0.0], [-1.0, -1.0, -1.0]], dtype=torch.double)
    p = adjusted(posterior, POSITIVE, torch.tensor([0, 1]))
    assert torch.allclose(p[0], torch.tensor([1.0, 0, 0], dtype=torch.double))
    assert torch.allclose(p[1], POSITIVE[:, 1])


@pytest.mark.unchecked
def test_another_number_of_domains_is_named():
    with pytest.raises(DataError, match="2 domains, W has 4"):
        class_posterior(torch.ones(1, 2), POSITIVE.float())


def test_the_error_of_proportions():
    assert proportion_error(POSITIVE, POSITIVE) == 0
    assert proportion_error(torch.eye(3), torch.eye(3)[[1, 0, 2]]).item() == pytest.approx(4 / 3)


# ---------------------------------------------------------------- domains and clusters


def test_proportions_are_well_conditioned_and_a_function_of_their_arguments():
    W = dirichlet_proportions(5, 8, 0.5, 8.0, seed=3)
    assert torch.allclose(W.sum(0), torch.ones(8, dtype=torch.double)) and torch.linalg.cond(W) <= 8
    assert torch.equal(W, dirichlet_proportions(5, 8, 0.5, 8.0, seed=3))
    assert not torch.equal(W, dirichlet_proportions(5, 8, 0.5, 8.0, seed=4))
    with pytest.raises(DataError, match="condition number"):
        dirichlet_proportions(5, 5, 50.0, 1.5)
    with pytest.raises(DataError, match="3 domains"):
        dirichlet_proportions(5, 3)
    with pytest.raises(ConfigError, match="alpha"):
        dirichlet_proportions(5, 8, alpha=0.0)


def test_domains_have_those_proportions_and_styles_mean_nothing():
    W = dirichlet_proportions(5, 8, seed=0)
    data = with_styles(draw_domains(digits(8, "train"), W, 16_000, seed=1, noise=0.05), 3, 2.0, 0, 1)
    assert set(data.fields) == {"image", "label", "domain", "style"}
    assert torch.equal(torch.bincount(data.domain), torch.full((8,), 2000))
    assert (frequencies(data.label, data.domain, 5, 8) - W).abs().max() < 0.04
    assert (frequencies(data.style, data.label, 3, 5) - 1 / 3).abs().max() < 0.04
    assert (frequencies(data.style, data.domain, 3, 8) - 1 / 3).abs().max() < 0.04
    again = draw_domains(digits(8, "train"), W, 100, seed=1)
    assert torch.equal(again.image, draw_domains(digits(8, "train"), W, 100, seed=1).image)
    means = torch.stack([data.image[data.style == s].mean(0) for s in range(3)])
    assert (means - means.mean(0)).std() > 1
    with pytest.raises(DataError, match="no samples"):
        draw_domains(data.select((data.label == 0).nonzero().flatten()), W, 100)


def test_kmeans_finds_groups():
    x = torch.randn(90, 4, generator=torch.Generator().manual_seed(0)) + 10 * (torch.arange(90) % 3)[:, None]
    labels, centres = kmeans(x, 3, seed=1)
    assert torch.equal(labels, nearest_centre(x, centres)) and centres.dtype == x.dtype
    assert all(len(labels[i::3].unique()) == 1 for i in range(3))
    again, _ = kmeans(x, 3, seed=1)
    assert torch.equal(labels, again)
    with pytest.raises(DataError, match="cannot make"):
        kmeans(x[:2], 3)
    with pytest.raises(DataError, match="finite"):
        kmeans(x / 0, 3)


def test_principal_components_keep_the_variance():
    x = torch.randn(200, 5, generator=torch.Generator().manual_seed(0)) * torch.tensor([9.0, 5, 0.1, 0.1, 0.1])
    mean, directions = principal_components(x, 2)
    assert torch.allclose(directions.T @ directions, torch.eye(2), atol=1e-5)
    assert ((x - mean) @ directions).var(0).sum() > 0.99 * x.var(0).sum()


def test_a_column_is_read_without_the_pictures():
    data = TensorSet(image=torch.zeros(3, 1, 2, 2), domain=torch.tensor([0, 1, 1]))
    assert torch.equal(column(data, "domain"), data.domain)
    assert torch.equal(column([{"domain": 2}, {"domain": 0}], "domain"), torch.tensor([2, 0]))
    with pytest.raises(DataError, match="no field 'label'"):
        column(data, "label")
