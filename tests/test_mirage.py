from dataclasses import replace

import pytest
import torch
from test_graphs import Molecules

pytest.importorskip("torch_geometric")
pytest.importorskip("mlxtend")

from stillhouse.data.graphs import GraphSet, motifs
from stillhouse.data.patterns import exclusive, frequent_sets, tree_transactions
from stillhouse.errors import ConfigError, DataError
from stillhouse.models.gnn import GNN
from stillhouse.recipes import graphs as recipe
from stillhouse.run import Run
from stillhouse.systems.datasets import mirage
from stillhouse.testing import check_system

CONFIG = mirage.Config(theta=0.4)


def quiet():
    return Run(quiet=True)


def test_the_contract():
    check_system(mirage.distill)


def test_the_forests_are_the_exclusive_frequent_sets():
    data = motifs(n=60, seed=1)
    distilled = mirage.distill(data, CONFIG, quiet())
    transactions = tree_transactions(data, 2)
    found = exclusive({c: frequent_sets(t, 12) for c, t in transactions.items()})
    assert len(distilled) == sum(map(len, found.values())) > 4
    for c in (0, 1):
        assert sorted(distilled.frequency[distilled.label == c].tolist()) == sorted(found[c].values())
        sizes = [int(mask.sum()) for mask in distilled.select((distilled.label == c).nonzero().flatten()).pool_mask]
        assert sorted(sizes) == sorted(map(len, found[c])) and max(sizes) > 1
    shared = mirage.distill(data, replace(CONFIG, exclusive=False), quiet())
    assert len(shared) > len(distilled)
    assert set(map(int, mirage.distill(data, replace(CONFIG, most_trees=1), quiet()).label)) == {0, 1}


def test_theta_goes_down_as_far_as_the_budget_allows():
    data = motifs(n=100, seed=1)
    config = mirage.Config(theta=0.9, theta_step=0.02, theta_min=0.1, budget=4000)
    mined = mirage.mine(data, config)
    distilled = mirage.distill(data, config, quiet())
    assert 0 < distilled.bytes <= 4000
    patterns = list(zip(mined["label"], mined["patterns"], mined["support"], strict=True))
    assert mirage.size_of(patterns, data) == distilled.bytes
    below = mirage.distill(data, mirage.Config(theta=mined["theta"] - 0.02), quiet())
    assert below.bytes > 4000
    assert mirage.distill(data, replace(config, budget=8000), quiet()).bytes > distilled.bytes


def test_the_bytes_of_labelled_edges_are_counted_alike():
    data = GraphSet(**motifs(n=100, seed=1).data, node_classes=5, edge_classes=2)
    config = mirage.Config(theta=0.9, theta_min=0.1, budget=4000)
    mined = mirage.mine(data, config)
    patterns = list(zip(mined["label"], mined["patterns"], mined["support"], strict=True))
    assert mirage.size_of(patterns, data) == mirage.distill(data, config, quiet()).bytes


def test_weights_follow_the_sampling():
    assert "frequency" in mirage.distill(motifs(n=60, seed=1), CONFIG, quiet()).data
    assert "frequency" not in mirage.distill(motifs(n=60, seed=1), replace(CONFIG, sampling="alike"), quiet()).data


def test_one_set_serves_networks_of_every_kind(tmp_path):
    data = mirage.distill(motifs(seed=1), replace(CONFIG, theta=0.35), quiet())
    data = GraphSet.load(data.save(tmp_path))
    for kind in ("gcn", "sage", "gat", "gin"):
        torch.manual_seed(0)
        model = recipe.train(GNN(kind, 5, 2, width=16, dropout=0.0), data, recipe.Config(steps=30, batch=32, lr=1e-2),
                             quiet())
        assert recipe.scores(model, motifs("test", seed=1))["auc"] > 0.6


def test_mining_is_not_repeated_on_resume(tmp_path, monkeypatch):
    data = motifs(n=40, seed=1)
    with Run(tmp_path, quiet=True) as run:
        first = mirage.distill(data, CONFIG, run)
    monkeypatch.setattr(mirage, "mine", lambda *_: pytest.fail("mined again"))
    with Run(tmp_path, quiet=True) as run:
        again = mirage.distill(data, CONFIG, run)
    assert all(torch.equal(a, b) for a, b in zip(first.node_label, again.node_label, strict=True))


def test_sampled_hubs_are_a_function_of_the_seed():
    config = replace(CONFIG, theta=0.2, most_children=2, hubs="sample")
    data = motifs(n=60, seed=1)
    one, two = (mirage.distill(data, config, Run(seed=3, quiet=True)) for _ in range(2))
    assert len(one) and all(torch.equal(a, b) for a, b in zip(one.node_label, two.node_label, strict=True))
    assert max(int(e[1].bincount().max()) for e in one.edge_index if e.numel()) <= 2


def test_a_torch_geometric_data_set_is_distilled():
    distilled = mirage.distill(Molecules(), mirage.Config(theta=0.3), quiet())
    assert len(distilled) and distilled.edge_classes == 3 and distilled.graph(0).edge_attr.shape[1] == 3


def test_what_cannot_be_distilled_is_refused():
    with pytest.raises(DataError, match="one class"):
        mirage.distill(motifs(n=4).select([0, 2]), CONFIG, quiet())
    with pytest.raises(DataError, match="lower theta"):
        mirage.distill(motifs(n=40), mirage.Config(theta=1.5), quiet())
    with pytest.raises(ConfigError, match="theta_min"):
        mirage.Config(theta=0.01)
