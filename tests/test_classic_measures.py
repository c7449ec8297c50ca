"""The classic measures of distillation: exact checks, and the same numbers as peer libraries where they import."""

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from stillhouse.errors import DataError
from stillhouse.measures import classes, contrastive, crd, divergences, feature_maps, relations

torch.manual_seed(0)
T, S = torch.randn(6, 5, dtype=torch.float64), torch.randn(6, 5, dtype=torch.float64)
Y = torch.tensor([0, 1, 2, 3, 4, 0])
A, B = torch.randn(3, 4, 6, 6, dtype=torch.float64), torch.randn(3, 7, 3, 3, dtype=torch.float64)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_kd_is_its_two_decoupled_parts(temperature):
    target, others, p_y = classes.decoupled_parts(T, S, Y, temperature)
    whole = divergences.kl(T, S, temperature, reduction="none") / temperature**2
    torch.testing.assert_close(target + (1 - p_y) * others, whole, rtol=1e-12, atol=1e-12)


def test_nckd_does_not_see_the_logit_of_the_label_and_tckd_sees_nothing_else_among_the_rest():
    shifted = S + 3.0 * F.one_hot(Y, 5)
    assert torch.allclose(classes.decoupled_parts(T, shifted, Y)[1], classes.decoupled_parts(T, S, Y)[1], atol=1e-12)
    assert not torch.allclose(classes.decoupled_parts(T, shifted, Y)[0], classes.decoupled_parts(T, S, Y)[0])


def test_dkd_weighs_its_parts_and_is_zero_for_the_teacher_itself():
    target, others, _ = classes.decoupled_parts(T, S, Y, 4.0)
    wanted = 16 * (2 * target + 5 * others).mean()
    torch.testing.assert_close(classes.decoupled_kd(T, S, Y, 2.0, 5.0, 4.0), wanted)
    assert classes.decoupled_kd(T, T, Y).abs() < 1e-12
    confident = 200.0 * F.one_hot(Y, 5).double()
    assert torch.isfinite(classes.decoupled_kd(confident, S, Y))


def test_dist_is_zero_for_the_teacher_and_blind_to_scale_and_shift_of_rows():
    assert classes.dist(T, T).abs() < 1e-12
    rows = torch.randn(4, 9, dtype=torch.float64)
    assert torch.allclose(classes.correlation(rows, 3 * rows + 2), torch.ones(4, dtype=torch.float64))
    assert torch.allclose(classes.correlation(rows, -rows), -torch.ones(4, dtype=torch.float64))
    only_inter = classes.dist(T, S, 1.0, 0.0)
    torch.testing.assert_close(only_inter, 1 - classes.correlation(T.softmax(1), S.softmax(1)).mean())


def test_large_temperature_turns_kd_into_matching_of_centred_logits():
    c = T.shape[1]
    centred = ((T - T.mean(1, keepdim=True)) - (S - S.mean(1, keepdim=True))).square().sum(1).mean() / (2 * c)
    torch.testing.assert_close(divergences.kl(T, S, 1e4), centred, rtol=1e-3, atol=0)


def test_attention_ignores_scale_channels_and_is_zero_for_itself():
    assert feature_maps.attention_transfer(A, A) == 0
    torch.testing.assert_close(feature_maps.attention_map(A), feature_maps.attention_map(5 * A))
    assert feature_maps.attention_transfer(A, 7 * A) < 1e-24
    assert feature_maps.attention_transfer(A, B).ndim == 0
    torch.testing.assert_close(feature_maps.attention_map(A).norm(dim=1), torch.ones(3, dtype=torch.float64))


def test_the_flow_of_maps_of_ones_is_all_ones():
    ones = feature_maps.flow_matrix(torch.ones(2, 3, 4, 4), torch.ones(2, 5, 2, 2))
    assert ones.shape == (2, 3, 5) and (ones == 1).all()


def test_neuron_selectivity_is_a_distance_of_sets_of_channels():
    assert feature_maps.neuron_selectivity(A, A[:, [2, 0, 3, 1]]).abs() < 1e-12
    assert feature_maps.neuron_selectivity(A, B) > 0


def test_hints_need_one_shape():
    torch.testing.assert_close(feature_maps.hint(A, A + 2), torch.tensor(4.0, dtype=torch.float64))
    with pytest.raises(DataError, match="regressor"):
        feature_maps.hint(A, B)


# ---------------------------------------------------------------- peer libraries


def test_the_numbers_of_torchdistill():
    """Not its SPKDLoss, which gives rows an L1 norm of 1; the paper's equation 2 has the L2 norm."""
    peer = pytest.importorskip("torchdistill.losses.mid_level")
    a, b = A[:, :, :3, :3], B

    def io(value):
        return {"f": {"output": value, "input": value}, "g": {"output": value[:, :2], "input": value[:, :2]}}

    pair = {"pair": {"teacher": {"io": "output", "path": "f"}, "student": {"io": "output", "path": "f"}, "weight": 1}}
    at = peer.ATLoss(pair, mode="code")(io(b), io(a))
    torch.testing.assert_close(feature_maps.attention_transfer(a, b), at)
    dist = peer.DISTLoss("f", "output", "f", "output", beta=0.7, gamma=1.3, tau=2.0)({"f": {"output": S}},
                                                                                      {"f": {"output": T}})
    torch.testing.assert_close(classes.dist(T, S, 0.7, 1.3, 2.0), dist)
    rkd = peer.RKDLoss("f", "f", 1.0, 2.0, "mean")({"f": {"output": S}}, {"f": {"output": T}})
    torch.testing.assert_close(relations.rkd_distance(T, S) + 2 * relations.rkd_angle(T, S), rkd, rtol=1e-5, atol=1e-7)
    flow = peer.FSPLoss.compute_fsp_matrix(A, B)
    torch.testing.assert_close(feature_maps.flow_matrix(A, B), flow)
    kd = peer.KDLoss("f", "output", "f", "output", 4.0, alpha=0.3, beta=0.7, reduction="batchmean")
    wanted = kd({"f": {"output": S}}, {"f": {"output": T}}, targets=Y)
    torch.testing.assert_close(0.3 * F.cross_entropy(S, Y) + 0.7 * divergences.kl(T, S, 4.0), wanted)


def test_the_number_of_torchdistill_s_contrastive_distillation():
    peer = pytest.importorskip("torchdistill.losses.mid_level")
    positive, negatives = torch.randn(6, dtype=torch.float64), torch.randn(6, 9, dtype=torch.float64)
    loss = SimpleNamespace(num_samples=40, eps=0.0)
    e = (torch.cat([positive[:, None], negatives], 1) / 0.07).exp() / 3.0
    wanted = peer.CRDLoss.compute_contrast_loss(loss, e)
    torch.testing.assert_close(crd.crd_nce(positive, negatives, 40, math.log(3.0)), wanted[0])


def test_the_numbers_of_pytorch_metric_learning():
    peer = pytest.importorskip("pytorch_metric_learning.losses")
    a, b = torch.randn(2, 6, 5, dtype=torch.float64)
    pairs = torch.arange(6).repeat(2)
    torch.testing.assert_close(contrastive.nt_xent(a, b, 0.2), peer.NTXentLoss(0.2)(torch.cat([a, b]), pairs))
    label = torch.tensor([0, 0, 1, 1, 1, 2])
    torch.testing.assert_close(contrastive.supervised_contrastive(a, label, temperature=0.3),
                               peer.SupConLoss(0.3)(a, label))
