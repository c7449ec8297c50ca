import math

import pytest
import torch
from torch import nn

from stillhouse.data.sets import TensorSet
from stillhouse.errors import ConfigError, DataError
from stillhouse.evaluate.classification import accuracy, calibration_error, per_class_accuracy, predictions
from stillhouse.evaluate.cost import counted, latency, macs, parameters, parameters_of
from stillhouse.evaluate.draws import mean_over_draws
from stillhouse.evaluate.probes import extract, few_per_class, knn_probe, linear_probe
from stillhouse.run import Run, begin


class Read(nn.Module):
    """Logits that stand in the picture itself."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(3, affine=False)

    def forward(self, image):
        return image.flatten(1) + 0 * self.norm(image.flatten(1))


def data(labels):
    return TensorSet(image=torch.eye(3)[torch.tensor([0, 1, 2, 2])].reshape(4, 3, 1, 1), label=torch.tensor(labels))


def test_accuracy_counts_and_leaves_the_model_as_it_was():
    model = Read()
    assert accuracy(model, data([0, 1, 2, 0]), batch=3) == 0.75
    assert model.training and model.norm.num_batches_tracked == 0


def test_per_class_accuracy_is_nan_for_an_absent_class():
    logits, labels = predictions(Read(), data([0, 0, 2, 0]))
    per_class = per_class_accuracy(logits, labels)
    assert per_class[0].item() == pytest.approx(1 / 3) and per_class[2] == 1 and math.isnan(per_class[1])


def test_calibration_error_by_hand():
    p = torch.tensor([0.9, 0.9, 0.6, 0.6], dtype=torch.float64)
    logits = torch.stack([p, 1 - p], 1).log()
    # bins at 0.9 (one of two right) and at 0.6 (both right): (|0.5 - 0.9| + |1 - 0.6|) / 2
    assert calibration_error(logits, torch.tensor([0, 1, 0, 0]), bins=10) == pytest.approx(0.4)
    assert calibration_error(torch.tensor([[50.0, 0], [0, 50.0]]), torch.tensor([0, 1])) == pytest.approx(0, abs=1e-12)


def test_probes_find_separated_classes_and_chance_otherwise():
    labels = torch.arange(200) % 4
    noise = torch.randn(200, 8)
    good = noise * 0.1 + torch.randn(4, 8)[labels]
    for probe in (linear_probe, knn_probe):
        assert probe(good[:100], labels[:100], good[100:], labels[100:]) == 1.0
        assert probe(noise[:100], labels[:100], noise[100:], labels[100:]) < 0.5
    with pytest.raises(DataError, match="not finite"):
        linear_probe(good * math.nan, labels, good, labels)


def test_extract_does_not_move_batchnorm():
    encoder = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(3))
    rows = extract(encoder, data([0, 1, 2, 0]), batch=3)
    assert rows.shape == (4, 3) and encoder[1].num_batches_tracked == 0 and encoder.training


def test_few_per_class_is_balanced_and_seeded():
    labels = torch.tensor([0, 1, 1, 0, 1, 0])
    chosen = few_per_class(labels, 2, seed=3)
    assert labels[chosen].tolist() == [0, 0, 1, 1] and torch.equal(chosen, few_per_class(labels, 2, seed=3))
    with pytest.raises(DataError, match="fewer than 4"):
        few_per_class(labels, 4)


def test_parameters_and_macs_by_hand():
    model = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.Flatten(), nn.Linear(4 * 64, 10))
    model[0].requires_grad_(False)
    assert parameters(model) == 4 * 9 + 4 + 2560 + 10 and parameters(model, trainable=True) == 2570
    assert macs(model, torch.zeros(2, 1, 8, 8)) == 2 * (64 * 4 * 9 + 2560)
    assert not model[0].weight.requires_grad and model[2].weight.requires_grad


def test_a_factory_is_measured_without_making_anything():
    before = torch.get_rng_state()
    assert parameters_of(lambda: nn.Linear(10**5, 10**5)) == 10**10 + 10**5
    assert torch.equal(before, torch.get_rng_state())


def test_means_over_draws_have_seeds_that_follow_from_the_run():
    seen = []

    def measure(seed):
        seen.append((seed, torch.rand(()).item()))
        return {"seed": float(seed), "one": 1.0}

    run = Run(seed=7, quiet=True)
    assert mean_over_draws(measure, 3, begin(run)) == {"seed": 7001.0, "one": 1.0}
    assert [s for s, _ in seen] == [7000, 7001, 7002] and len({r for _, r in seen}) == 3
    with pytest.raises(ConfigError, match="draws must be 1 or more"):
        mean_over_draws(measure, 0, run)


def test_latency_is_positive_and_calls_are_counted_also_on_exceptions():
    model = nn.Linear(3, 3)
    assert latency(model, torch.zeros(1, 3), repeats=3) > 0
    with pytest.raises(ConfigError, match="repeats"):
        latency(model, torch.zeros(1, 3), repeats=0)
    with pytest.raises(ZeroDivisionError), counted(model) as count:
        model(torch.zeros(2, 3))
        model(input=torch.zeros(5, 3))
        raise ZeroDivisionError
    model(torch.zeros(2, 3))
    assert (count.calls, count.samples) == (2, 7)
