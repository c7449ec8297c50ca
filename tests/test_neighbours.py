import math

import pytest
import torch
import torch.nn.functional as F

from stillhouse.data.augment import RAND_AUGMENT, RAND_AUGMENT_GREY, rand_augment
from stillhouse.data.digits import digits
from stillhouse.data.neighbours import chosen, members, nearest_neighbours, purity
from stillhouse.data.sets import TensorSet
from stillhouse.errors import ConfigError, DataError
from stillhouse.measures.clustering import balance, consistency, mean_entropy, neighbour_loss, pseudo_labels
from stillhouse.recipes.views import strong_view
from stillhouse.run import Run

LOG10 = math.log(10)


def one_hot(labels, clusters=10):
    return F.one_hot(torch.tensor(labels), clusters).double()


def scan(p, q, weight=5.0):
    return (consistency(p, q) - weight * mean_entropy(p)).item()


# ---------------------------------------------------------------- the clustering loss


def test_the_loss_of_sure_uniform_and_collapsed_predictions():
    balanced = one_hot(list(range(10)) * 3)
    assert scan(balanced, balanced) == pytest.approx(-5 * LOG10, abs=1e-12)
    uniform = torch.full((30, 10), 0.1, dtype=torch.double)
    assert consistency(uniform, uniform).item() == pytest.approx(LOG10, abs=1e-12)
    assert scan(uniform, uniform) == pytest.approx(LOG10 - 5 * LOG10, abs=1e-12)
    collapsed = one_hot([3] * 30)
    assert scan(collapsed, collapsed) == pytest.approx(0, abs=1e-12)
    assert consistency(one_hot([0]), one_hot([1])).item() == pytest.approx(-math.log(1e-8))


def test_the_entropy_has_no_gradient_in_the_logits_where_all_clusters_are_used_alike():
    logits = 4 * one_hot(range(10)).requires_grad_()
    logits.retain_grad()
    mean_entropy(logits.softmax(-1)).backward()
    assert logits.grad.abs().max() < 1e-15
    p = torch.full((5, 10), 0.1, dtype=torch.double, requires_grad=True)
    mean_entropy(p).backward()
    assert torch.allclose(p.grad, torch.full_like(p, (LOG10 - 1) / 5))
    z = torch.zeros(3, 10, dtype=torch.double)
    z[:, 0] = 100
    z.requires_grad_()
    mean_entropy(z.softmax(-1)).backward()
    assert torch.isfinite(z.grad).all()


def test_renaming_the_clusters_changes_nothing():
    p, q = torch.randn(2, 20, 6, dtype=torch.double, generator=torch.Generator().manual_seed(0)).softmax(-1)
    order = torch.randperm(6, generator=torch.Generator().manual_seed(1))
    assert scan(p[:, order], q[:, order]) == pytest.approx(scan(p, q), abs=1e-12)


def test_the_loss_of_all_pairs():
    p = torch.randn(9, 4, dtype=torch.double, generator=torch.Generator().manual_seed(0)).softmax(-1)
    ids = torch.randint(9, (9, 3), generator=torch.Generator().manual_seed(1))
    by_hand = torch.stack([consistency(p, p[ids[:, j]]) for j in range(3)]).mean() - mean_entropy(p)
    assert neighbour_loss(p, ids, chunk=4).item() == pytest.approx(by_hand.item(), abs=1e-12)


def test_pseudo_labels_and_their_balance():
    p = torch.tensor([[0.995, 0.005, 0], [0.9, 0.1, 0], [0, 0.001, 0.999]])
    label, sure = pseudo_labels(p, 0.99)
    assert label.tolist() == [0, 0, 2] and sure.tolist() == [True, False, True]
    labels = torch.tensor([0, 0, 2, 2, 4, 4, 1])
    sure = torch.tensor([True] * 6 + [False])
    assert balance(labels, sure, 6).tolist() == [3, 1, 3, 1, 3, 1]
    assert balance(torch.tensor([0, 0, 0, 1]), torch.ones(4, dtype=torch.bool), 2).tolist() == pytest.approx([4 / 3, 4])
    assert balance(labels, torch.zeros(7, dtype=torch.bool), 6).tolist() == [1] * 6
    with pytest.raises(ConfigError, match="threshold"):
        pseudo_labels(p, 1.0)


# ---------------------------------------------------------------- neighbours


def test_a_normalised_vector_is_its_own_nearest_neighbour():
    x = torch.randn(50, 8, generator=torch.Generator().manual_seed(0)) * torch.rand(50, 1) * 9
    ids = nearest_neighbours(x, 5, chunk=7)
    assert ids.shape == (50, 6) and torch.equal(ids[:, 0], torch.arange(50))
    z = F.normalize(x, dim=1)
    assert torch.equal(ids, (z @ z.T).argsort(1, descending=True)[:, :6])
    long = torch.tensor([[1.0, 0], [10.0, 1.0], [0, 1]])
    assert nearest_neighbours(long, 0, normalise=False)[0, 0] == 1


def test_exact_copies_are_mutual_neighbours():
    x = torch.randn(10, 4, generator=torch.Generator().manual_seed(0))
    ids = nearest_neighbours(torch.cat([x, x]), 1)
    assert all({i, i + 10} == set(ids[i].tolist()) == set(ids[i + 10].tolist()) for i in range(10))


def test_purity_leaves_the_sample_itself_out():
    ids = torch.tensor([[0, 1], [1, 0], [2, 0]])
    assert purity(ids, torch.tensor([0, 0, 1])) == pytest.approx(2 / 3)
    assert purity(ids[:, :1], torch.tensor([0, 0, 1])) == 0


def test_members_are_drawn_evenly_from_the_stored_ones():
    data = TensorSet(image=torch.arange(20.0).view(20, 1, 1, 1))
    ids = torch.arange(20)[:, None] + torch.tensor([0, 1, 2, 3])
    ids = ids % 20
    index, u = torch.tensor([5, 5, 5, 5, 19]), torch.tensor([0.0, 0.26, 0.5, 0.999, 0.3])
    assert members(data, ids, index, u)["image"].flatten().tolist() == [5, 6, 7, 8, 0]
    drawn = chosen(ids, torch.zeros(4000, dtype=torch.long), torch.rand(4000))
    assert (torch.bincount(drawn, minlength=4) / 4000 - 0.25).abs().max() < 0.03
    with pytest.raises(DataError, match="no 20 neighbours"):
        nearest_neighbours(torch.rand(20, 3), 20)
    with pytest.raises(DataError, match="finite"):
        nearest_neighbours(torch.rand(20, 3) / 0, 2)


# ---------------------------------------------------------------- strong views


def test_each_operation_of_randaugment_does_something_and_strength_0_nothing():
    x = digits(16, "labelled").image[:32]
    x = torch.cat([x, x.flip(-1), x * 0.5], 1)
    for i, name in enumerate(dict.fromkeys((*RAND_AUGMENT, *RAND_AUGMENT_GREY))):
        operations = tuple(dict.fromkeys((*RAND_AUGMENT, *RAND_AUGMENT_GREY)))
        choice, u = torch.full((32, 1), i), torch.full((32, 1), 0.9)
        y = rand_augment(x, choice, u, operations, 1.0)
        assert y.shape == x.shape and torch.isfinite(y).all()
        assert y.amin() >= x.amin() - 1e-5 and y.amax() <= x.amax() + 1e-5
        assert torch.allclose(y, x, atol=1e-5) == (name == "identity"), name
        if name not in ("autocontrast", "posterize"):
            assert torch.allclose(rand_augment(x, choice, u, operations, 0.0), x, atol=1e-5), name
    with pytest.raises(DataError, match="equalize"):
        rand_augment(x, choice, u, ("equalize",))


def test_operations_add_up_and_pictures_differ():
    x = digits(16, "labelled").image[:4]
    i = RAND_AUGMENT_GREY.index("translate_x")
    shifts = torch.tensor([[1.0, 1.0]] * 4)
    twice = rand_augment(x, torch.full((4, 2), i), shifts, RAND_AUGMENT_GREY, 1.0)
    once = rand_augment(x, torch.full((4, 1), i), shifts[:, :1], RAND_AUGMENT_GREY, 2.0)
    assert torch.allclose(twice, once, atol=1e-5)
    run = Run(quiet=True)
    y = strong_view(x[:1].expand(8, -1, -1, -1), run, 1.0)
    assert len({tuple(v.flatten().tolist()) for v in y}) == 8
    assert torch.equal(strong_view(x, run, 0.0, erase=0.0), x)


def test_a_strong_view_erases_to_the_background_and_may_be_alike_everywhere():
    x = digits(16, "labelled").image[:8]
    y = strong_view(x, Run(quiet=True), 0.0, erase=0.5)
    changed = (y != x).flatten(1)
    assert changed.any(1).all() and (y[y != x] == -1).all() and changed.sum(1).max() <= 64
    views = [strong_view(x, Run(seed=1, quiet=True), 1.0, noise=0.1, flip=True, alike=True) for _ in range(2)]
    assert torch.equal(*views)
