import pytest
import torch

from stillhouse.data.partition import dirichlet_partition
from stillhouse.errors import ConfigError, DataError

LABELS = torch.arange(10).repeat(100)


def shares(parts):
    counts = torch.stack([torch.bincount(LABELS[p], minlength=10) for p in parts]).double()
    return counts / counts.sum(1, keepdim=True)


def test_every_sample_has_one_client():
    parts = dirichlet_partition(LABELS, 5, beta=0.3, seed=1)
    assert torch.equal(torch.cat(parts).sort().values, torch.arange(1000))
    assert all(len(p) >= 1 for p in parts)


def test_the_partition_is_a_function_of_its_seed_alone():
    torch.manual_seed(1)
    a = dirichlet_partition(LABELS, 5, beta=0.3, seed=1)
    torch.manual_seed(2)
    b = dirichlet_partition(LABELS, 5, beta=0.3, seed=1)
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    c = dirichlet_partition(LABELS, 5, beta=0.3, seed=2)
    assert not all(torch.equal(x, y) for x, y in zip(a, c, strict=True))


def test_small_beta_is_far_from_iid_and_large_beta_near():
    skew = [shares(dirichlet_partition(LABELS, 5, beta, seed=3)).max(1).values.mean() for beta in (0.1, 1.0, 1000.0)]
    assert skew[0] > 0.35 > skew[1] > 0.15 > skew[2] and skew[2] < 0.13


def test_the_smallest_client_is_as_large_as_asked():
    assert min(map(len, dirichlet_partition(LABELS, 5, beta=0.3, seed=0, smallest=100))) >= 100


def test_impossible_requests_are_named():
    with pytest.raises(DataError, match="cannot give"):
        dirichlet_partition(torch.zeros(3), 5, beta=1.0)
    with pytest.raises(DataError, match="1000 draws"):
        dirichlet_partition(torch.zeros(100), 5, beta=0.01, smallest=19)
    with pytest.raises(ConfigError, match="beta"):
        dirichlet_partition(LABELS, 5, beta=0.0)
