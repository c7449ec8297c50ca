import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from stillhouse.data.sets import TensorSet
from stillhouse.errors import ConfigError, DataError
from stillhouse.evaluate.task_similarity import (
    label_cka,
    leep,
    logme,
    nce,
    parc,
    power_weights,
    reduced,
    rsa,
    source_outputs,
    task_similarity,
)

KINDS = ["parc", "rsa", "cka", "logme", "leep", "nce"]


def draw(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


LABEL = torch.arange(20) % 4


def test_features_that_are_the_labels_have_a_parc_rsa_and_cka_of_1():
    x = F.one_hot(LABEL).double()
    for score in (parc, rsa, label_cka):
        assert score(x, LABEL) == pytest.approx(1, abs=1e-12)
    assert task_similarity(x, x, LABEL, components=None) == pytest.approx(1, abs=1e-12)


def test_parc_is_the_rank_correlation_of_the_two_triangles():
    import numpy as np
    from scipy.stats import spearmanr

    x = draw(20, 7)
    d_f, d_y = 1 - np.corrcoef(x.numpy()), 1 - np.corrcoef(F.one_hot(LABEL).double().numpy())
    below = np.tril_indices(20, -1)
    assert parc(x, LABEL) == pytest.approx(spearmanr(d_f[below], d_y[below].round(10)).statistic, abs=1e-12)


def test_an_increasing_map_of_the_distances_changes_nothing():
    from stillhouse.evaluate.task_similarity import _rank_correlation

    a, b = draw(12, 12).abs(), draw(12, 12, seed=1).abs()
    assert _rank_correlation(a, b) == pytest.approx(_rank_correlation(a**3 + a, b), abs=1e-12)
    assert _rank_correlation(a, torch.ones(12, 12).double()) == 0.0


@pytest.mark.parametrize("kind", KINDS)
def test_the_order_of_the_samples_and_the_names_of_the_classes_do_not_matter(kind):
    x, z = draw(20, 6), draw(20, 3, seed=1)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(2))
    score = task_similarity(x, z, LABEL, kind)
    assert score == pytest.approx(task_similarity(x[order], z[order], LABEL[order], kind), abs=1e-9)
    assert score == pytest.approx(task_similarity(x, z, 7 - 2 * LABEL + 1, kind), abs=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_outputs_that_know_the_labels_score_higher_than_noise(kind):
    noise, noisy_z = draw(20, 6), draw(20, 4, seed=1)
    knowing = torch.cat([3 * F.one_hot(LABEL).double(), noise[:, :2]], 1)
    z = noisy_z + 4 * F.one_hot(LABEL).double()
    assert task_similarity(knowing, z, LABEL, kind) > task_similarity(noise, noisy_z, LABEL, kind) + 0.02


def test_principal_components_keep_the_geometry():
    x = draw(10, 40)
    kept = reduced(x, 32)
    assert kept.shape == (10, 10) and reduced(x, None) is x and reduced(x[:, :32], 32) is not None
    assert torch.allclose(torch.cdist(kept, kept), torch.cdist(x, x), atol=1e-10)
    assert reduced(draw(50, 40), 32).shape == (50, 32)


def test_logme_is_the_highest_evidence_of_a_bayesian_linear_model():
    x, y = draw(15, 4), torch.arange(15) % 2
    one = logme(x, y)

    def evidence(alpha, beta):
        cov = torch.eye(15).double() / beta + x @ x.T / alpha
        normal = torch.distributions.MultivariateNormal(torch.zeros(15).double(), cov)
        return [normal.log_prob((y == c).double()).item() / 15 for c in (0, 1)]

    alphas, betas = torch.logspace(-2, 3, 60).tolist(), torch.logspace(-1, 2, 60).tolist()
    grid = [evidence(alpha, beta) for alpha in alphas for beta in betas]
    best = sum(max(pair[c] for pair in grid) for c in (0, 1)) / 2
    assert best <= one + 1e-6 and one == pytest.approx(best, abs=2e-3)
    wide = draw(8, 30)
    assert math.isfinite(logme(wide, torch.arange(8) % 2))


def test_leep_and_nce_in_closed_form():
    sure = 100 * F.one_hot(LABEL).double()
    assert leep(sure, LABEL) == pytest.approx(0, abs=1e-9) and nce(sure, LABEL) == pytest.approx(0, abs=1e-12)
    nothing = torch.zeros(20, 5).double()
    assert leep(nothing, LABEL) == pytest.approx(-math.log(4), abs=1e-12)
    assert nce(nothing, LABEL) == pytest.approx(-math.log(4), abs=1e-12)
    z = draw(20, 3)
    theta = z.softmax(1)
    joint = torch.stack([theta[c == LABEL].sum(0) / 20 for c in range(4)])
    by_hand = sum(math.log(sum((joint[y, k] / joint[:, k].sum() * theta[i, k]).item() for k in range(3)))
                  for i, y in enumerate(LABEL.tolist())) / 20
    assert leep(z, LABEL) == pytest.approx(by_hand, abs=1e-12)


def test_the_mean_over_balanced_subsets():
    x, z = draw(40, 6), draw(40, 3, seed=1)
    label = torch.arange(40) % 4
    whole = task_similarity(x, z, label)
    assert task_similarity(x, z, label, subsets=3, per_class=10) == pytest.approx(whole, abs=1e-12)
    few = [task_similarity(x, z, label, subsets=1, per_class=4, seed=s) for s in (5, 6)]
    assert task_similarity(x, z, label, subsets=2, per_class=4, seed=5) == pytest.approx(sum(few) / 2, abs=1e-12)
    assert few[0] != few[1]


def test_power_weights():
    e = torch.tensor([0.3, -0.2, 0.6, 0.0, 0.15], dtype=torch.float64)
    assert torch.allclose(power_weights(e, 0.0), torch.tensor([1 / 3, 0, 1 / 3, 0, 1 / 3]).double())
    assert torch.allclose(power_weights(e, 1.0), e.clamp_min(0) / 1.05)
    for p in (0.0, 0.5, 3.0, 12.0, 1000.0, math.inf):
        w = power_weights(e, p)
        assert w.sum().item() == pytest.approx(1, abs=1e-12) and w[1] == 0 and w[3] == 0
    for p in (1000.0, math.inf):
        assert torch.allclose(power_weights(e, p), torch.tensor([0.0, 0, 1, 0, 0]).double(), rtol=0, atol=1e-300)
    with pytest.warns(UserWarning, match="positive"):
        assert torch.allclose(power_weights(-e.abs() - 0.1, 12.0), torch.full((5,), 0.2, dtype=torch.float64))
    with pytest.raises(ConfigError):
        power_weights(e, -1.0)
    with pytest.raises(DataError):
        power_weights(torch.tensor([math.nan]), 1.0)


def test_outputs_of_a_source_are_read_without_changing_it():
    torch.manual_seed(0)
    source = nn.Sequential(nn.Flatten(), nn.Linear(16, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 3)).train()
    data = TensorSet(image=torch.randn(11, 1, 4, 4))
    features, logits = source_outputs(source, data, batch=4)
    assert source.training and source[2].num_batches_tracked == 0 and not source[4]._forward_pre_hooks
    source.eval()
    assert torch.allclose(features, source[:4](data.image)) and torch.allclose(logits, source(data.image))
    assert torch.allclose(source_outputs(source, data, "1")[0], source[:2](data.image))


def test_wrong_input_is_named():
    x = draw(20, 3)
    with pytest.raises(ConfigError, match="similarity"):
        task_similarity(x, x, LABEL, "cosine")
    with pytest.raises(DataError, match="finite"):
        task_similarity(x * math.nan, x, LABEL)
    with pytest.raises(DataError, match="two classes"):
        task_similarity(x, x, torch.zeros(20, dtype=torch.long))
    with pytest.raises(DataError, match="class 0 has 5"):
        task_similarity(x, x, LABEL, per_class=6)
