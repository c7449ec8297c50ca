import itertools

import pytest
import torch

pytest.importorskip("torch_geometric")
pytest.importorskip("mlxtend")

from torch_geometric.data import Data, InMemoryDataset

from stillhouse.data.graphs import RINGS, GraphSet, Labels, as_graph_set, chosen_within, motifs
from stillhouse.data.patterns import exclusive, frequent_sets, single_trees, tree_transactions
from stillhouse.data.trees import canonical_labels, forest_set, full_forests, parse_tree, unrolled
from stillhouse.errors import ConfigError, DamagedFileError, DataError, RoleError
from stillhouse.models.gnn import GNN
from stillhouse.recipes import graphs as recipe
from stillhouse.run import Run


def undirected(*pairs):
    edges = torch.tensor(pairs).T
    return torch.cat([edges, edges.flip(0)], 1)


def with_edge_labels(data, kinds=3):
    """Edge labels that are the same in both directions."""
    return GraphSet(node_label=data.node_label, edge_index=data.edge_index, label=data.label,
                    edge_label=[(e[0] + e[1]) % kinds for e in data.edge_index], node_classes=data.node_classes)


def embeddings(model, graph):
    return model.embed(graph.x, graph.edge_index, graph.edge_attr, graph.degree if "degree" in graph else None)


@pytest.mark.parametrize("edge_labels", [False, True])
@pytest.mark.parametrize("kind", ["gin", "sage", "gat", "gcn"])
@pytest.mark.parametrize("layers", [1, 2, 3])
def test_roots_of_the_full_forest_give_what_the_graph_gives(kind, layers, edge_labels):
    data = motifs(n=3, seed=7)
    data = with_edge_labels(data) if edge_labels else data
    forests = full_forests(data, layers)
    torch.manual_seed(0)
    model = GNN(kind, 5, 2, width=6, layers=layers, edge_features=3 if edge_labels else 0).double().eval()
    for i in range(3):
        graph, forest = data.graph(i), forests.graph(i)
        for item in (graph, forest):
            item.x = item.x.double()
            item.edge_attr = item.edge_attr.double() if edge_labels else None
        whole, roots = embeddings(model, graph), embeddings(model, forest)[forest.pool_mask]
        torch.testing.assert_close(roots, whole, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(
            model.pool(embeddings(model, forest), torch.zeros(forest.num_nodes, dtype=torch.long), forest.pool_mask),
            model.pool(whole, torch.zeros(graph.num_nodes, dtype=torch.long)), rtol=1e-10, atol=1e-10)


def test_gcn_needs_the_original_degrees_and_deeper_networks_deeper_trees():
    data = motifs(n=2, seed=7)
    graph, forest = data.graph(0), full_forests(data, 2).graph(0)
    torch.manual_seed(0)
    gcn = GNN("gcn", 5, 2, width=6)
    recomputed = gcn.embed(forest.x, forest.edge_index)[forest.pool_mask]
    assert (recomputed - gcn.embed(graph.x, graph.edge_index)).abs().max() > 1e-2
    deep = GNN("gin", 5, 2, width=6, layers=3)
    shallow_trees = deep.embed(forest.x, forest.edge_index)[forest.pool_mask]
    assert (shallow_trees - deep.embed(graph.x, graph.edge_index)).abs().max() > 1e-2


def test_trees_are_unrolled_with_the_parent_among_the_children():
    origin, edges, _ = unrolled(undirected((0, 1), (1, 2)), [0], 2)
    assert origin.tolist() == [0, 1, 0, 2] and edges.tolist() == [[1, 2, 3], [0, 1, 1]]
    data = motifs(n=2, seed=3)
    forest, graph = full_forests(data, 2).graph(0), data.graph(0)
    backwards = torch.tensor([False] * forest.edge_index.shape[1])
    origin, edges, _ = unrolled(data.edge_index[0], range(graph.num_nodes), 2)
    parent = dict(edges.T.tolist())
    for e, (child, above) in enumerate(edges.T.tolist()):
        backwards[e] = above in parent and origin[parent[above]] == origin[child]
    torch.manual_seed(0)
    sage = GNN("sage", 5, 2, width=6)
    pruned = sage.embed(forest.x, forest.edge_index[:, ~backwards])[forest.pool_mask]
    assert (pruned - sage.embed(graph.x, graph.edge_index)).abs().max() > 1e-2


def test_canonical_labels_do_not_depend_on_the_numbering():
    data = with_edge_labels(motifs(n=2, seed=1))
    nodes, edges, kinds = data.node_label[0], data.edge_index[0], data.edge_label[0]
    order = torch.randperm(len(nodes))
    place = torch.empty_like(order)
    place[order] = torch.arange(len(nodes))
    shuffled = torch.randperm(edges.shape[1])
    moved = canonical_labels(nodes[order], place[edges][:, shuffled], 3, kinds[shuffled])
    assert [moved[place[v]] for v in range(len(nodes))] == canonical_labels(nodes, edges, 3, kinds)


def test_canonical_labels_of_a_path():
    a_b_a = canonical_labels(torch.tensor([10, 2, 10]), undirected((0, 1), (1, 2)), 1)
    assert a_b_a == ["(10 0(2))", "(2 0(10) 0(10))", "(10 0(2))"]
    other_root = canonical_labels(torch.tensor([10, 3, 10]), undirected((0, 1), (1, 2)), 1)
    assert other_root[1] != a_b_a[1]


def test_canonical_labels_keep_several_digits_and_edge_labels_apart():
    def star(root, *leaves):
        edges = torch.tensor([[i + 1, 0] for i in range(len(leaves))]).T
        return canonical_labels(torch.tensor([root, *(leaf for leaf, _ in leaves)]), edges, 1,
                                torch.tensor([kind for _, kind in leaves]))[0]

    given = [star(1, *leaves) for n in (1, 2) for leaves in itertools.combinations_with_replacement(
        [(leaf, kind) for leaf in (1, 11, 111) for kind in (0, 1, 11)], n)]
    assert len(set(given)) == len(given)


@pytest.mark.parametrize("edge_labels", [False, True])
def test_a_canonical_label_is_its_tree(edge_labels):
    data = with_edge_labels(motifs(n=2, seed=1)) if edge_labels else motifs(n=2, seed=1)
    for tree in canonical_labels(data.node_label[0], data.edge_index[0], 2, data.edge_label[0]):
        nodes, edges, kinds = parse_tree(tree)
        again = canonical_labels(torch.tensor(nodes), torch.tensor(edges).T, 2, torch.tensor(kinds))
        assert again[0] == tree
    with pytest.raises(DataError, match="not the label of a tree"):
        parse_tree("(1 0(2)")


def test_hubs_are_capped():
    hub = undirected(*((0, v) for v in range(1, 8)))
    labels = torch.tensor([0, 5, 4, 3, 2, 1, 1, 1])
    first = canonical_labels(labels, hub, 1, most_children=3)[0]
    assert first == "(0 0(1) 0(1) 0(1))"
    drawn = {canonical_labels(labels, hub, 1, most_children=3, generator=torch.Generator().manual_seed(s))[0]
             for s in range(20)}
    assert len(drawn) > 3 and all(tree.count("(") == 4 for tree in drawn)
    assert len(canonical_labels(labels, hub, 4, most_children=3)[0]) < len(canonical_labels(labels, hub, 4)[0])
    with pytest.raises(ConfigError, match="most_children"):
        canonical_labels(labels, hub, 1, most_children=0)


def test_frequent_sets_of_three_transactions():
    found = frequent_sets([{"A", "B"}, {"A", "B"}, {"A"}], 2)
    assert found == {frozenset("A"): 3, frozenset("B"): 2, frozenset("AB"): 2}
    assert list(found.values()) == [3, 2, 2]


def test_frequent_sets_at_the_extremes():
    transactions = [set("ABC"), set("BD"), set("ABD")]
    assert frequent_sets(transactions, 4) == {}
    everything = {frozenset(s) for t in transactions for n in (1, 2, 3) for s in itertools.combinations(sorted(t), n)}
    found = frequent_sets(transactions, 1)
    assert set(found) == everything
    for items, n in found.items():
        assert n == sum(items <= t for t in transactions)
        for more, m in found.items():
            assert not items <= more or m <= n
    assert set(map(len, frequent_sets(transactions, 1, most_items=1))) == {1}
    with pytest.raises(ConfigError, match="support"):
        frequent_sets(transactions, 0)


@pytest.mark.parametrize("n", [3, 7, 11, 150])
def test_support_is_a_number_of_transactions_not_a_rounded_part(n):
    transactions = [{"A"}] * 3 + [set()] * (n - 3)
    assert frequent_sets(transactions, 3) == {frozenset("A"): 3} and frequent_sets(transactions, 4) == {}


def test_exclusive_sets_are_frequent_in_one_class_only():
    a, b, ab = frozenset("A"), frozenset("B"), frozenset("AB")
    assert exclusive({0: {a: 3, ab: 2}, 1: {a: 2, b: 2}, 2: {b: 9}}) == {0: {ab: 2}, 1: {}, 2: {}}


def test_trees_of_a_single_node_leave_the_transactions():
    data = motifs(n=6, seed=0)
    all_trees, repeated = tree_transactions(data, 2, min_count=1), tree_transactions(data, 2, min_count=2)
    assert all(a >= b for c in (0, 1) for a, b in zip(all_trees[c], repeated[c], strict=True))
    assert sum(map(len, repeated[0])) < sum(map(len, all_trees[0]))


def test_a_forest_has_its_trees_and_their_roots():
    like = motifs(n=2)
    forest = forest_set([["(1 0(2) 0(3 0(1)))", "(4)"]], [1], [7], like)
    assert forest.node_label[0].tolist() == [1, 2, 3, 1, 4] and forest.edge_index[0].tolist() == [[1, 2, 3], [0, 0, 2]]
    assert forest.pool_mask[0].nonzero().flatten().tolist() == [0, 4] and int(forest.frequency) == 7
    assert forest.numbers(0) == 5 + 2 * 3 + 1 + 1


def test_motifs_are_sparse_and_differ_in_the_rings_alone():
    data = motifs(seed=3)
    assert len(data) == 300 and len(motifs("test", seed=3)) == 100
    assert data.label.bincount().tolist() == [150, 150]
    edges, nodes = sum(e.shape[1] for e in data.edge_index), sum(map(len, data.node_label))
    assert 1.9 < edges / nodes < 2.2
    rings = torch.zeros(2, 2)
    for label, nodes_of, edges_of in zip(data.label.tolist(), data.node_label, data.edge_index, strict=True):
        for first in (len(nodes_of) - 10, len(nodes_of) - 5):
            order = tuple(nodes_of[first : first + 5].tolist())
            rings[label, RINGS.index(order)] += 1
            assert [first, first + 4] in edges_of.T.tolist()
    wrong = (rings[0, 1] + rings[1, 0]) / rings.sum()
    assert 0.1 < wrong < 0.2 and rings.sum() == 600
    assert torch.equal(motifs(seed=3).node_label[5], data.node_label[5])
    assert not torch.equal(motifs(seed=4).node_label[0], data.node_label[0])


def test_bytes_count_an_undirected_edge_once():
    nodes = torch.tensor([0, 1, 1])
    graph = GraphSet(node_label=[nodes, nodes], edge_index=[undirected((0, 1), (1, 2)), torch.tensor([[0, 1], [1, 2]])],
                     label=torch.tensor([0, 1]))
    assert graph.numbers(0) == graph.numbers(1) == 3 + 2 * 2 + 1
    assert graph.bytes == 8 * 16
    loop = GraphSet(node_label=[nodes], edge_index=[torch.tensor([[0, 1, 2], [1, 0, 2]])], label=torch.tensor([0]))
    assert loop.numbers(0) == 3 + 2 * 2 + 1


def test_a_set_of_graphs_is_checked_selected_saved_and_read(tmp_path):
    data = motifs(n=6, seed=2)
    part = data.select([4, 1])
    assert isinstance(part, GraphSet) and part.node_classes == 5 and torch.equal(part.node_label[1], data.node_label[1])
    assert data.batch([4, 1])["label"].tolist() == part.label.tolist()
    assert data[-1]["index"] == 5 and data[0]["graph"].x.shape == (len(data.node_label[0]), 5)
    again = GraphSet.load(data.save(tmp_path))
    assert all(torch.equal(a, b) for a, b in zip(again.edge_index, data.edge_index, strict=True))
    assert again.node_classes == 5 and torch.equal(again.label, data.label)
    (tmp_path / "graphs.safetensors").write_bytes(b"no")
    with pytest.raises(DamagedFileError):
        GraphSet.load(tmp_path)
    with pytest.raises(DataError, match="an edge to node 3"):
        GraphSet(node_label=[torch.tensor([0, 1])], edge_index=[torch.tensor([[0], [3]])], label=torch.tensor([0]))
    with pytest.raises(DataError, match="only 1 classes"):
        GraphSet(node_label=[torch.tensor([0, 1])], edge_index=[torch.zeros(2, 0, dtype=torch.long)],
                 label=torch.tensor([0]), node_classes=1)


class Molecules(InMemoryDataset):
    """An in-memory data set like those of TUDataset: one-hot atoms, one-hot bonds, a class."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        graphs = []
        for i in range(12):
            atoms = torch.randint(0, 3, (6,), generator=generator)
            edges = undirected(*((v, v + 1) for v in range(5)))
            bonds = torch.randint(0, 2, (5,), generator=generator).repeat(2)
            graphs.append(Data(x=torch.eye(3)[atoms], edge_index=edges, edge_attr=torch.eye(2)[bonds],
                               y=torch.tensor([i % 2])))
        self.data, self.slices = self.collate(graphs)


def test_a_torch_geometric_data_set_becomes_labels():
    source = Molecules()
    data = as_graph_set(source)
    assert len(data) == 12 and data.edge_classes == 3 and data.label.tolist() == [0, 1] * 6
    for i in range(12):
        same = data.node_label[i][:, None] == data.node_label[i][None]
        assert torch.equal(same, (source[i].x @ source[i].x.T) > 0)
        kinds = data.edge_label[i]
        assert torch.equal(kinds[:, None] == kinds[None], (source[i].edge_attr @ source[i].edge_attr.T) > 0)
    items = [{"graph": source[i], "label": i % 2} for i in range(12)]
    assert torch.equal(as_graph_set(items).node_label[3], data.node_label[3])


def test_degrees_and_bins_are_labels_where_there_are_none():
    edges = undirected(*((0, v) for v in range(1, 5)))
    bare = [Data(edge_index=edges, num_nodes=5, y=torch.tensor(i)) for i in (0, 1)]
    assert Labels.fit(bare, most_degree=3).apply(bare).node_label[0].tolist() == [3, 1, 1, 1, 1]
    values = torch.linspace(0.05, 0.95, 10)[:, None]
    line = undirected(*((v, v + 1) for v in range(9)))
    labels = Labels.fit([Data(x=values, edge_index=line, y=torch.tensor(0))], bins=2)
    train = labels.apply([Data(x=values, edge_index=line, y=torch.tensor(0))])
    assert train.node_label[0].bincount().tolist() == [5, 5]
    beyond = labels.apply([Data(x=values * 9, edge_index=line, y=torch.tensor(0))])
    assert beyond.node_label[0].bincount().tolist() == [1, 9]
    whole = Labels.fit([Data(x=torch.tensor([[1], [2]]), edge_index=undirected((0, 1)), y=torch.tensor(0))])
    new = whole.apply([Data(x=torch.tensor([[1], [9]]), edge_index=undirected((0, 1)), y=torch.tensor(0))])
    assert new.node_label[0].tolist() == [0, 2] and new.node_classes == 3


def test_graphs_that_cannot_be_used_are_refused():
    edges = undirected((0, 1))
    with pytest.raises(DataError, match="not finite"):
        as_graph_set([Data(x=torch.tensor([[0.5], [float("nan")]]), edge_index=edges, y=torch.tensor(0))])
    with pytest.raises(DataError, match="one class"):
        as_graph_set([Data(x=torch.ones(2, 1), edge_index=edges, y=torch.tensor([0, 1]))])
    with pytest.raises(DataError, match="empty"):
        as_graph_set([])
    with pytest.raises(DataError, match="expected a set of graphs"):
        as_graph_set(3)


def test_coresets_take_the_bytes_in_turn_of_the_classes():
    data = motifs(n=20, seed=1)
    chosen = chosen_within(data, torch.arange(19, -1, -1), 3000)
    assert chosen.label.tolist() == [i % 2 for i in range(len(chosen))]
    assert torch.equal(chosen.node_label[0], data.node_label[18]) and torch.equal(chosen.node_label[1],
                                                                                  data.node_label[19])
    assert chosen.bytes >= 3000 > chosen.select(range(len(chosen) - 1)).bytes
    singles = single_trees(data, 2, 3000)
    assert singles.bytes >= 3000 and all(int(mask.sum()) == 1 for mask in singles.pool_mask)
    assert len(recipe.herded_graphs(data, GNN("gin", 5, 2, width=4), 10**9)) == 20


def test_forests_are_drawn_by_support_with_classes_balanced():
    forest = forest_set([["(1)"], ["(2)"], ["(3)"]], [0, 0, 1], [3, 1, 9], motifs(n=2))
    torch.testing.assert_close(recipe.sampling_weights(forest), torch.tensor([3 / 8, 1 / 8, 1 / 2]).double())


def test_training_pools_the_roots_and_testing_all_nodes():
    data = motifs(n=8, seed=1)
    forests = full_forests(data, 2)
    torch.manual_seed(0)
    model = GNN("gin", 5, 2, width=8)
    seen = []
    model.pool = lambda nodes, batch, mask=None, graphs=None: seen.append(mask) or GNN.pool(model, nodes, batch, mask,
                                                                                          graphs)
    recipe.train(model, forests, recipe.Config(steps=1, batch=8), Run(quiet=True))
    assert int(seen[-1].sum()) == sum(map(len, data.node_label))
    recipe.train(model, forests, recipe.Config(steps=1, batch=8, pool="all"), Run(quiet=True))
    assert seen[-1] is None
    recipe.predictions(model, data)
    assert seen[-1] is None


def test_a_network_learns_the_motifs():
    torch.manual_seed(0)
    model = GNN("sage", 5, 2, width=16, dropout=0.0)
    before = recipe.scores(model, motifs("test"))["auc"]
    run = Run(quiet=True)
    recipe.train(model, motifs(), recipe.Config(steps=60, batch=64, lr=1e-2), run)
    assert recipe.scores(model, motifs("test"))["auc"] > max(0.75, before + 0.1)


def test_networks_and_sets_that_do_not_fit_are_refused():
    with pytest.raises(RoleError, match="5 node"):
        recipe.train(GNN("gcn", 4, 2), motifs(n=4), run=Run(quiet=True))
    with pytest.raises(DataError, match="one class"):
        recipe.train(GNN("gcn", 5, 2), motifs(n=4).select([0, 2]), run=Run(quiet=True))
    with pytest.raises(ConfigError, match="kind"):
        GNN("mlp", 4, 2)
