"""The table of score distillation: identities between its rows."""

import pytest
import torch

from stillhouse.errors import ConfigError
from stillhouse.measures.score_distillation import csd_row, score_gradient, sds_row, vsd_row


@pytest.fixture
def eps():
    g = torch.Generator().manual_seed(0)
    return {name: torch.randn(5, 3, 2, generator=g, dtype=torch.float64)
            for name in ("prompt", "null", "negative", "noise", "fake")}


def test_rows_are_the_published_formulas(eps):
    w = torch.rand(5, dtype=torch.float64)
    guided = eps["null"] + 7.5 * (eps["prompt"] - eps["null"])
    torch.testing.assert_close(score_gradient(eps, sds_row(7.5), w), w[:, None, None] * (guided - eps["noise"]))
    torch.testing.assert_close(score_gradient(eps, vsd_row(7.5), w), w[:, None, None] * (guided - eps["fake"]))
    expected = 3 * (eps["prompt"] - eps["null"]) + 2 * (eps["null"] - eps["negative"])
    torch.testing.assert_close(score_gradient(eps, csd_row(3.0, 2.0)), expected)


def test_sds_is_its_unguided_form_and_a_classifier(eps):
    whole = score_gradient(eps, sds_row(7.5))
    torch.testing.assert_close(whole, score_gradient(eps, sds_row(1.0)) + score_gradient(eps, csd_row(6.5)))


def test_vsd_becomes_the_other_rows_by_its_fake_score(eps):
    for scale in (1.0, 7.5):
        delta = score_gradient({**eps, "fake": eps["noise"]}, vsd_row(scale))
        assert torch.equal(delta, score_gradient(eps, sds_row(scale)))
    assert torch.equal(score_gradient({**eps, "fake": eps["null"]}, vsd_row(1.0)), score_gradient(eps, csd_row()))
    assert not score_gradient({**eps, "fake": eps["prompt"]}, vsd_row(1.0)).any()


def test_predictions_with_coefficient_zero_are_not_asked_for(eps):
    assert set(vsd_row(1.0)) == {"prompt", "fake"} and set(csd_row()) == {"prompt", "null"}
    assert set(sds_row(7.5)) == {"prompt", "null", "noise"}
    score_gradient({"prompt": eps["prompt"], "fake": eps["fake"]}, vsd_row(1.0))


def test_a_coefficient_may_differ_between_samples(eps):
    scale = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0], dtype=torch.float64)
    whole = score_gradient(eps, vsd_row(scale))
    for i, s in enumerate(scale.tolist()):
        torch.testing.assert_close(whole[i], score_gradient(eps, vsd_row(s))[i])


def test_no_gradient_flows_through_predictions(eps):
    eps = {name: value.requires_grad_() for name, value in eps.items()}
    assert not score_gradient(eps, vsd_row(7.5)).requires_grad


def test_missing_predictions_and_empty_rows_are_named(eps):
    del eps["fake"]
    with pytest.raises(ConfigError, match="'fake'"):
        score_gradient(eps, vsd_row(1.0))
    with pytest.raises(ConfigError, match="at least one"):
        score_gradient(eps, {})
