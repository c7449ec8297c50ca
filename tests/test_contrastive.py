import math

import pytest
import torch
import torch.nn.functional as F

from stillhouse.errors import ConfigError, DataError
from stillhouse.measures.contrastive import clip_loss, info_nce, nt_xent, supervised_contrastive

E2 = torch.eye(2, dtype=torch.float64)


def features(n=6, d=5, seed=0):
    return torch.randn(n, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_nt_xent_of_one_pair_is_zero_and_of_two_orthogonal_pairs_log_1_plus_2_over_e():
    assert nt_xent(features(1), features(1, seed=1)).item() == 0.0
    assert nt_xent(E2, E2, temperature=1.0).item() == pytest.approx(math.log(1 + 2 / math.e), abs=1e-14)


def test_nt_xent_is_the_mean_over_both_directions_written_out():
    a, b, tau = features(4), features(4, seed=1), 0.3
    z = F.normalize(torch.cat([a, b]), dim=1)
    losses = []
    for i in range(8):
        others = [j for j in range(8) if j != i]
        j = (i + 4) % 8
        losses.append(torch.logsumexp(torch.stack([z[i] @ z[o] / tau for o in others]), 0) - z[i] @ z[j] / tau)
    assert nt_xent(a, b, tau).item() == pytest.approx(torch.stack(losses).mean().item(), abs=1e-12)
    assert torch.allclose(nt_xent(a, b, tau), nt_xent(b, a, tau))
    assert torch.allclose(nt_xent(3 * a, b / 7, tau), nt_xent(a, b, tau))


def test_info_nce_in_batch_equals_the_same_negatives_given_explicitly():
    q, k = features(5), features(5, seed=1)
    others = torch.stack([k[[j for j in range(5) if j != i]] for i in range(5)])
    assert torch.allclose(info_nce(q, k), info_nce(q, k, negatives=others), atol=1e-12)


def test_a_queue_and_shared_negatives_add_to_the_denominator():
    q, k, bank = features(5), features(5, seed=1), features(9, seed=2)
    expected = info_nce(q, k, negatives=bank)
    assert torch.allclose(info_nce(q, k, negatives=bank[:4], queue=bank[4:]), expected, atol=1e-12)
    assert torch.allclose(info_nce(q, k, queue=bank), expected, atol=1e-12)
    assert info_nce(q, k, queue=bank[:0]).item() == 0.0
    assert info_nce(q, k, queue=bank[:2]) < expected


def test_clip_is_the_mean_of_info_nce_both_ways():
    a, b = features(), features(seed=1)
    expected = (info_nce(a, b, temperature=0.07) + info_nce(b, a, temperature=0.07)) / 2
    assert torch.allclose(clip_loss(a, b, scale=1 / 0.07), expected, atol=1e-12)


def test_supervised_contrastive_with_one_positive_each_is_nt_xent():
    a, b = features(4), features(4, seed=1)
    labels = torch.arange(4).repeat(2)
    assert torch.allclose(supervised_contrastive(torch.cat([a, b]), labels), nt_xent(a, b), atol=1e-12)


def test_supervised_contrastive_leaves_out_samples_without_a_positive():
    z = features(5)
    labels = torch.tensor([0, 0, 1, 1, 2])
    each = supervised_contrastive(z, labels, reduction="none")
    assert each[4] == 0
    assert torch.allclose(supervised_contrastive(z, labels), each[:4].mean())
    mask = labels[:, None] == labels[None]
    assert torch.equal(supervised_contrastive(z, positives=mask, reduction="none"), each)
    leaf = z.clone().requires_grad_()
    supervised_contrastive(leaf, torch.arange(5)).backward()
    assert leaf.grad.abs().max() == 0


def test_weights_and_reductions():
    a, b, weight = features(4), features(4, seed=1), torch.tensor([1.0, 0.0, 2.0, 1.0], dtype=torch.float64)
    each = nt_xent(a, b, reduction="none")
    assert torch.allclose(nt_xent(a, b, reduction="sum"), each.sum())
    assert torch.allclose(nt_xent(a, b, weight=weight), (each * weight).mean())


@pytest.mark.unchecked
def test_bad_input_is_named():
    with pytest.raises(DataError, match=r"\(6, 5\) and \(5, 5\)"):
        nt_xent(features(6), features(5))
    with pytest.raises(ConfigError, match="temperature"):
        info_nce(features(), features(), temperature=0.0)
    with pytest.raises(ConfigError, match="either labels or positives"):
        supervised_contrastive(features())
    with pytest.raises(ConfigError, match="reduction"):
        nt_xent(features(), features(), reduction="max")
