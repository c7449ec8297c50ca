"""Wrong labels, few of each class, a long tail."""

import pytest
import torch

from stillhouse.data.digits import digits
from stillhouse.data.sets import TensorSet
from stillhouse.data.variants import (
    balanced,
    balanced_indices,
    class_counts,
    long_tail_counts,
    long_tailed,
    noisy_labels,
    noisy_split,
)
from stillhouse.errors import DataError


def test_exactly_a_share_of_the_labels_is_wrong_and_the_true_ones_are_kept():
    data = digits(8, "train")
    noisy = noisy_labels(data, 0.3, seed=1)
    assert torch.equal(noisy.clean, data.label) and int((noisy.label != noisy.clean).sum()) == 360
    assert torch.equal(noisy.label, noisy_labels(data, 0.3, seed=1).label)
    assert not torch.equal(noisy.label, noisy_labels(data, 0.3, seed=2).label)
    wrong = noisy.label != noisy.clean
    offsets = (noisy.label - noisy.clean)[wrong] % 10
    assert torch.bincount(offsets, minlength=10)[1:].min() > 20
    assert torch.equal(noisy_labels(data, 0.0).label, data.label)


def test_a_noisy_part_and_a_clean_part_share_no_sample():
    data = digits(8, "train")
    train, held_out = noisy_split(data, 300, 100, 0.2, seed=4)
    assert len(train) == 300 and len(held_out) == 100 and int((train.label != train.clean).sum()) == 60
    rows = {row.numpy().tobytes() for row in train.image}
    assert not rows & {row.numpy().tobytes() for row in held_out.image}
    with pytest.raises(DataError, match="1000 and 300 samples of 1200"):
        noisy_split(data, 1000, 300, 0.2)


def test_structured_noise_confuses_a_class_with_its_partner_alone():
    data = digits(8, "labelled")
    partner = [1, 0, *range(2, 10)]
    noisy = noisy_labels(data, 1.0, into=partner)
    assert torch.equal(noisy.label, torch.tensor(partner)[data.label])
    with pytest.raises(DataError, match="a class for each of 10"):
        noisy_labels(data, 0.5, into=[1, 0])


def test_balanced_subsets_by_number_and_by_fraction():
    label = torch.tensor([0] * 10 + [1] * 20)
    assert torch.bincount(label[balanced_indices(label, 3)]).tolist() == [3, 3]
    assert torch.bincount(label[balanced_indices(label, 0.25)]).tolist() == [2, 5]
    assert torch.equal(balanced_indices(label, 1.0), torch.arange(30))
    with pytest.raises(DataError, match="class 0 has 10 samples, not 11"):
        balanced(TensorSet(label=label), 11)


def test_a_long_tail_falls_exponentially():
    assert long_tail_counts(10, 100, 50) == [100, 65, 42, 27, 18, 11, 7, 5, 3, 2]
    counts = class_counts(long_tailed(digits(8, "train"), 100, 50))
    assert counts.tolist() == long_tail_counts(10, 100, 50)
    assert long_tail_counts(3, 7, 1) == [7, 7, 7]
