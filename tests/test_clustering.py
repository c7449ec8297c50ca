"""Scores of clusters against classes."""

import pytest
import torch

from stillhouse.errors import DataError
from stillhouse.evaluate.clustering import ari, clustering_accuracy, contingency, matching, nmi

LABELS = torch.arange(60) % 3


def test_a_renamed_partition_is_perfect():
    renamed = torch.tensor([2, 0, 1])[LABELS]
    assert clustering_accuracy(renamed, LABELS) == 1.0
    assert nmi(renamed, LABELS) == pytest.approx(1.0) and ari(renamed, LABELS) == pytest.approx(1.0)
    assert matching(renamed, LABELS).tolist() == [1, 2, 0]


def test_one_cluster_scores_as_the_largest_class():
    one = torch.zeros(60, dtype=torch.long)
    assert clustering_accuracy(one, LABELS) == pytest.approx(1 / 3)
    assert ari(one, LABELS) == pytest.approx(0.0) and nmi(one, LABELS) == pytest.approx(0.0)


def test_many_to_one_credits_what_one_to_one_does_not():
    finer = LABELS * 2 + (torch.arange(60) // 30)
    assert clustering_accuracy(finer, LABELS, many_to_one=True) == 1.0
    assert clustering_accuracy(finer, LABELS) == pytest.approx(0.5)
    assert sorted(matching(finer, LABELS).tolist()) == [-1, -1, -1, 0, 1, 2]


def test_the_matching_is_the_best_of_all_permutations():
    from itertools import permutations

    clusters = torch.randint(4, (50,), generator=torch.Generator().manual_seed(0))
    labels = torch.randint(4, (50,), generator=torch.Generator().manual_seed(1))
    best = max((torch.tensor(p)[clusters] == labels).double().mean().item() for p in permutations(range(4)))
    assert clustering_accuracy(clusters, labels) == pytest.approx(best)
    assert contingency(clusters, labels).sum() == 50


@pytest.mark.unchecked
def test_unequal_lengths_are_refused():
    with pytest.raises(DataError, match="one length"):
        clustering_accuracy(torch.zeros(3, dtype=torch.long), torch.zeros(4, dtype=torch.long))
