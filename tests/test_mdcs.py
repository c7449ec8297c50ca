import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F

from stillhouse.data.sets import TensorSet
from stillhouse.data.variants import class_counts, long_tail_counts
from stillhouse.errors import ConfigError, DataError, RoleError
from stillhouse.evaluate.long_tail import bias_variance, disagreement, shot_accuracy
from stillhouse.hub.models import resolve_model
from stillhouse.measures.classes import logit_adjusted, self_consistency
from stillhouse.protocols import Classifier
from stillhouse.run import Run
from stillhouse.systems.compression import mdcs
from stillhouse.systems.compression.mdcs import Config, adjusted, consistency_weight, distill, diversity

COUNTS = torch.tensor([300, 120, 33, 6])


def logits(*shape, seed=0):
    return 3 * torch.randn(*shape, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def trained(**changes):
    given = mdcs.tiny()
    given["config"] = dataclasses.replace(given["config"], **changes)
    run = Run(quiet=True)
    return distill(**given, run=run), run


# ---------------------------------------------------------------- diversity loss


def test_exponent_0_is_cross_entropy_and_1_balanced_softmax():
    z, y = logits(50), torch.arange(50) % 4
    assert torch.equal(logit_adjusted(z, COUNTS, 0.0), z)
    weighted = COUNTS * z.exp()
    balanced = -(weighted[torch.arange(50), y] / weighted.sum(1)).log().mean()
    assert F.cross_entropy(logit_adjusted(z, COUNTS, 1.0), y).item() == pytest.approx(balanced.item(), abs=1e-12)
    assert diversity(z[None], y).item() == pytest.approx(F.cross_entropy(z, y).item(), abs=1e-14)


def test_counts_times_a_constant_change_nothing():
    z, y = logits(3, 20), torch.arange(20) % 4
    for powers in ((-0.5, 1.0, 2.5), (0.0, 0.3, -2.0)):
        losses = [diversity(adjusted(z, counts, powers), y)
                  for counts in (COUNTS, 7 * COUNTS, COUNTS.double() / COUNTS.sum())]
        assert max(losses) - min(losses) < 1e-12


def test_the_released_form_agrees_on_raw_counts_and_not_on_frequencies():
    z, y = logits(3, 20), torch.arange(20) % 4
    ours = diversity(adjusted(z, COUNTS, (-0.5, 1.0, 2.5)), y)
    for counts, close in ((COUNTS.double(), True), (COUNTS / COUNTS.sum().double() / 50, False)):
        shifted = torch.stack([v + (counts**p + 1e-9).log() for v, p in zip(z, (-0.5, 1.0, 2.5), strict=True)])
        assert (abs(diversity(shifted, y) - ours) < 1e-7) == close


def test_each_expert_has_its_own_shift_and_the_terms_add_up():
    z, y = logits(3, 10), torch.arange(10) % 4
    parts = [F.cross_entropy(v + p * COUNTS.double().log(), y) for v, p in zip(z, (-0.5, 1.0, 2.5), strict=True)]
    assert diversity(adjusted(z, COUNTS, (-0.5, 1.0, 2.5)), y).item() == pytest.approx(sum(parts).item(), abs=1e-12)


# ---------------------------------------------------------------- consistency


def test_weak_views_that_are_wrong_teach_nothing_and_equal_views_give_0():
    weak, strong = logits(2, 12), logits(2, 12, seed=1)
    y = weak[0].argmax(-1)
    kl, right = self_consistency(weak[:1], strong[:1], (y + 1) % 4)
    assert not right.any() and Run(quiet=True).mean(torch.where(right, kl, 0.0).sum(), right.sum()).item() == 0.0
    kl, right = self_consistency(weak[:1], weak[:1], y)
    assert right.all() and kl.abs().max() == 0.0


def test_the_weak_view_gets_no_gradient_and_the_strong_view_does():
    weak, strong = (logits(2, 12, seed=s).requires_grad_() for s in (0, 1))
    kl, right = self_consistency(weak, strong, torch.arange(12) % 4)
    (torch.where(right, kl, 0.0).sum() + 0 * weak.sum()).backward()
    assert weak.grad.abs().max() == 0 and strong.grad.abs().max() > 0
    assert torch.equal(strong.grad.abs().sum(-1) > 0, right)


def test_the_mask_is_taken_on_the_shifted_logits():
    z = torch.tensor([[[1.0, 0.9, 0.0, 0.0]]], dtype=torch.float64)
    y = torch.tensor([1])
    even = torch.tensor([10, 400, 10, 10])
    assert not self_consistency(z, z, y)[1].any()
    shifted = adjusted(z, even, (1.0,))
    assert self_consistency(shifted, shifted, y)[1].all()


def test_the_weight_grows_over_twenty_of_four_hundred_epochs():
    found = [consistency_weight(epoch / 400, Config()) for epoch in (0, 1, 5, 20, 400)]
    assert found == pytest.approx([0, 0.03, 0.15, 0.6, 0.6], abs=1e-15)


def test_every_setting_does_something():
    same, _ = trained()
    x = torch.rand(5, 1, 8, 8)
    for changes in ({"consistency": 0.0}, {"sampling": "all"}, {"exponents": (1.0, 1.0)}, {"strong": 0.0, "erase": 0.0},
                    {"weak": 0.0}, {"scale": 0.0}, {"fresh": False}, {"flip": False}, {"ramp": 0.0},
                    {"drops": (0.2,)}, {"optimizer": "adamw"}, {"warmup": 0.5}):
        other, _ = trained(**changes)
        assert not torch.allclose(other.eval()(x), same.eval()(x), atol=1e-6), changes


def test_the_logged_terms_are_those_of_the_paper():
    _, run = trained()
    assert set(run.history[0]) == {"stage", "k", "diversity", "consistency"} and run.history[0]["consistency"] == 0
    assert any(line["consistency"] > 0 for line in run.history[1:])
    _, run = trained(consistency=0.0)
    assert set(run.history[0]) == {"stage", "k", "diversity"}


def test_one_expert_without_shift_is_a_plain_classifier():
    experts, _ = trained(exponents=(0.0,), consistency=0.0)
    x = torch.rand(5, 1, 8, 8)
    assert torch.equal(experts.eval()(x), experts.logits(x)[0])


# ---------------------------------------------------------------- input, scores, real classes


def test_classes_without_pictures_and_bad_settings_are_refused():
    given = mdcs.tiny()
    for label, match in ((torch.zeros(14, dtype=torch.long), r"classes \[1, 2, 3\]"),
                         (torch.arange(14) % 5, "labels lie between 0 and 4")):
        with pytest.raises((DataError, RoleError), match=match):
            distill(**{**given, "labelled": given["labelled"].with_fields(label=label)}, run=Run(quiet=True))
    for bad in ({"exponents": ()}, {"sampling": "some"}, {"ramp": 2.0}, {"drops": (1.5,)}, {"scale": -1.0},
                {"optimizer": "adam"}, {"erase": 2.0}, {"consistency": -1.0}):
        with pytest.raises(ConfigError):
            Config(**bad)


def test_scores_of_long_tails_and_of_several_models():
    label = torch.tensor([0, 0, 1, 1, 2, 3])
    z = F.one_hot(torch.tensor([0, 1, 1, 1, 2, 0]), 4).double()
    found = shot_accuracy(z, label, COUNTS)
    assert found == {"many": 0.75, "medium": 1.0, "few": 0.0}
    assert math.isnan(shot_accuracy(z, label, torch.tensor([9, 9, 9, 9]))["many"])
    others = torch.stack([z, z, F.one_hot(label, 4).double()])
    assert disagreement(others) == pytest.approx(2 / 3 * 2 / 6)
    bias, variance = bias_variance(others, label)
    assert bias == pytest.approx(2 / 6) and variance == pytest.approx(2 / 18)
    with pytest.raises(ConfigError):
        disagreement(z[None])


def test_the_embedded_set_has_a_long_tail():
    assert long_tail_counts(10, 300, 50) == [300, 194, 126, 81, 53, 34, 22, 14, 9, 6]
    assert class_counts(mdcs.drawn(200, 1)).tolist() == [20] * 10


@pytest.mark.parametrize("name", ["vit", "resnet"])
def test_it_runs_on_models_of_transformers(name, tmp_path):
    hf = pytest.importorskip("transformers")
    torch.manual_seed(0)
    if name == "vit":
        model = hf.ViTForImageClassification(hf.ViTConfig(
            hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=8, image_size=16,
            patch_size=8, num_labels=4))
    else:
        model = hf.ResNetForImageClassification(hf.ResNetConfig(
            embedding_size=4, hidden_sizes=[4, 8, 8], depths=[1, 1, 1], layer_type="basic", num_labels=4))
    model.save_pretrained(tmp_path)
    student = resolve_model(f"hf:{tmp_path}", Classifier)
    labelled = TensorSet(image=torch.rand(12, 3, 16, 16) * 2 - 1, label=torch.arange(12) % 4)
    before = {n: p.clone() for n, p in student.named_parameters()}
    experts = distill(student, labelled, Config(steps=2, batch=4, fresh=False, optimizer="adamw", lr=1e-3, warmup=0.0),
                      Run(quiet=True))
    assert experts.logits(labelled.image[:2]).shape == (3, 2, 4)
    assert any(not torch.equal(p, before[n]) for n, p in student.named_parameters())
