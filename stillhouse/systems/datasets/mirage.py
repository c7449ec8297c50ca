"""Graph distillation by frequent computation trees (Gupta, Manchanda, Kodamana and Ranu 2024, arXiv 2310.09486).

A labelled set of graphs is distilled into a few small forests per class, without a network, a gradient or a loop. A
message-passing network of L layers sees a graph only as the multiset of the depth-L computation trees of its nodes, and
few kinds of trees cover most nodes. So

    T(G) = { canonical label of the depth-L tree of v : v in G }               a graph as a transaction,
    P_c  = { S : |{G of class c : S subset of T(G)}| >= theta |class c| }      FP-growth, sets that occur together,
    D_c  = P_c without what is in P_d of another class d,

and every set S in D_c becomes one graph: the disjoint union of its trees, edges from child to parent, with its class
and its support. Any network of at most L layers is trained on these forests, drawn in proportion to support within
their class, pooling the roots only; on ordinary graphs it pools all nodes.

Deviations: labels of trees carry separators (in the release plain digits, so that labels of two digits collide). A tree
must belong to `min_count` = 2 nodes of its class, as the paper says; the release's counter starts at one, which drops
nothing. Where several classes remain the exclusive filter holds against each. Instead of a search by validation, which
trains networks, theta is lowered in steps as long as the set stays within `budget` bytes.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import nn

from stillhouse.data.graphs import NUMBER_BYTES, GraphSet, as_graph_set, motifs
from stillhouse.data.patterns import exclusive, frequent_sets, single_trees, tree_transactions
from stillhouse.data.trees import forest_set
from stillhouse.errors import DataError, require
from stillhouse.evaluate.claims import Arms, Claim
from stillhouse.models.gnn import GNN, Kind
from stillhouse.protocols import Graphs
from stillhouse.recipes import graphs as recipe
from stillhouse.run import Run, begin

NUMBER = 25

NETWORKS: tuple[Kind, ...] = ("gcn", "sage", "gin")


def _worst_gain(a: Arms) -> float:
    return min(a["mirage"][kind] - a["random"][kind] for kind in NETWORKS)


CLAIMS = [
    Claim("networks trained on Mirage's forests rank test graphs better (AUC) than on random graphs of the same bytes",
          lambda a: a["mirage"]["auc"] - a["random"]["auc"]),
    Claim("sets of trees that occur together are better than the most frequent single trees of the same bytes",
          lambda a: a["mirage"]["auc"] - a["single_trees"]["auc"]),
    Claim("one distilled set is better than random graphs for each of GCN, GraphSAGE and GIN", _worst_gain),
    Claim("distilling takes less time than one training on all data",
          lambda a: a["full"]["seconds"] - a["mirage"]["seconds"]),
    Claim("Mirage is better than herding on the features of a trained GIN",
          lambda a: a["mirage"]["auc"] - a["herding"]["auc"], report=True),
    Claim("pooling the roots only is better than pooling all nodes of a forest",
          lambda a: a["mirage"]["auc"] - a["all_pooled"]["auc"], report=True),
    Claim("leaving out sets that are frequent in both classes helps",
          lambda a: a["mirage"]["auc"] - a["shared_too"]["auc"], report=True),
    Claim("drawing forests by their support is better than drawing them alike",
          lambda a: a["mirage"]["auc"] - a["unweighted"]["auc"], report=True),
    Claim("sets of several trees are better than exclusive single trees of the same bytes",
          lambda a: a["mirage"]["auc"] - a["exclusive_singles"]["auc"], report=True),
]


@dataclass(frozen=True)
class Config:
    """The settings released for NCI1, thresholds as parts of the class."""

    layers: int = 2  # L, depth of the computation trees: the layers of the networks that will be trained
    theta: float = 0.3  # support threshold, as a part of the graphs of a class; with a budget the first one tried
    theta_step: float = 0.01  # by how much theta is lowered at a time (20 of NCI1's 1,650 graphs of a class)
    theta_min: float = 0.05  # the lowest theta tried
    budget: int | None = None  # bytes that the set may take; None mines once, at theta
    min_count: int = 2  # nodes of the class that must have a tree for it to stay
    most_trees: int | None = None  # largest number of trees in a set; None for any
    exclusive: bool = True  # whether sets that are frequent in another class too are left out
    sampling: Literal["frequency", "alike"] = "frequency"  # how training shall draw the forests
    most_children: int | None = None  # children kept of a hub; None for all
    hubs: Literal["first", "sample"] = "first"  # which of a hub's children are kept

    def __post_init__(self) -> None:
        require(self.layers >= 1, f"layers must be at least 1, not {self.layers}")
        require(self.theta > 0 and 0 < self.theta_min <= self.theta, "thresholds must satisfy 0 < theta_min <= theta; "
                f"got theta_min = {self.theta_min} and theta = {self.theta}")
        require(self.theta_step > 0, f"theta_step must be above 0, not {self.theta_step}")
        require(self.budget is None or self.budget >= 1, f"budget must be at least 1 byte, not {self.budget}")
        require(self.min_count >= 1, f"min_count must be at least 1, not {self.min_count}")
        require(self.most_trees is None or self.most_trees >= 1,
                f"most_trees must be at least 1, not {self.most_trees}")
        require(self.most_children is None or self.most_children >= 1,
                f"most_children must be at least 1, not {self.most_children}")
        require(self.sampling in ("frequency", "alike"), f"sampling is 'frequency' or 'alike', not {self.sampling!r}")
        require(self.hubs in ("first", "sample"), f"hubs is 'first' or 'sample', not {self.hubs!r}")

    @property
    def thetas(self) -> list[float]:
        """The thresholds to try, from above."""
        if self.budget is None:
            return [self.theta]
        return [self.theta - i * self.theta_step
                for i in range(int((self.theta - self.theta_min) / self.theta_step + 1e-9) + 1)]


EMBEDDED = Config(theta=0.9, theta_step=0.01, theta_min=0.1, budget=9600)

TRAINING = recipe.Config(steps=200, batch=32, lr=5e-3)
"""How every arm's networks are trained."""

REPEATS = 2
"""Networks of each kind in every arm; the metrics are their means."""


def distill(labelled: Graphs, config: Config = Config(), run: Run | None = None) -> GraphSet:
    """Distil labelled graphs into forests of frequent computation trees, at most `config.budget` bytes of them.

    `labelled` is a `GraphSet`, a torch_geometric dataset, or a map-style set of {"graph", "label"}; attributes are made
    discrete (`stillhouse.data.graphs.Labels`). Returns a GraphSet with `pool_mask` (the roots) and `frequency` (the
    support), for `stillhouse.recipes.graphs.train` or, by `.graph(i)`, for any training code.

    Raises DataError for an empty set, a single class, or where no set of trees reaches theta within the budget.
    """
    run = begin(run)
    data = as_graph_set(labelled)
    run.check(Graphs, data)
    require(len(data.label.unique()) > 1, "all graphs are of one class; distilling needs at least two", DataError)
    mined = run.once("mine", lambda: mine(data, config))
    require(bool(mined["patterns"]), f"no set of trees reaches theta = {config.thetas[-1]:.3g} in one class alone "
            f"within {config.budget or 'any number of'} bytes; lower theta (or theta_min) or raise the budget",
            DataError)
    run.log(theta=mined["theta"], forests=len(mined["patterns"]))
    frequency = mined["support"] if config.sampling == "frequency" else None
    return forest_set(mined["patterns"], mined["label"], frequency, data)


def mine(data: GraphSet, config: Config) -> dict[str, Any]:
    """The sets of trees to keep: {"patterns": lists of canonical labels, "label", "support", "theta"}.

    With a budget theta goes down until the set would outgrow it; the last that fits is kept, also where what follows is
    smaller for being less exclusive. An empty list where nothing is frequent.
    """
    generator = torch.default_generator if config.hubs == "sample" else None
    transactions = tree_transactions(data, config.layers, config.min_count, config.most_children, generator)
    kept: list[tuple[int, list[str], int]] = []
    used = config.thetas[0]
    for theta in config.thetas:
        found = {c: frequent_sets(own, max(1, _ceil(theta * len(own))), config.most_trees)
                 for c, own in transactions.items()}
        sets = exclusive(found) if config.exclusive else found
        patterns = [(c, sorted(s), n) for c, own in sorted(sets.items()) for s, n in own.items()]
        if config.budget is not None and size_of(patterns, data) > config.budget:
            break
        kept, used = (patterns, theta) if patterns else (kept, used)
    return {"patterns": [p for _, p, _ in kept], "label": [c for c, _, _ in kept], "support": [n for _, _, n in kept],
            "theta": used}


def size_of(patterns: list[tuple[int, list[str], int]], like: GraphSet) -> int:
    """Bytes of the forests of (class, trees, support), as `GraphSet.bytes` counts them, without building them."""
    width = 3 if like.edge_classes > 1 else 2
    nodes = [[tree.count("(") for tree in trees] for _, trees, _ in patterns]
    return NUMBER_BYTES * sum(sum(n + width * (n - 1) for n in own) + 2 for own in nodes)


def experiment(run: Run) -> dict[str, dict[str, float]]:
    """300 sparse graphs whose class is the order of labels around planted rings, distilled into 9,600 bytes at most;
    three kinds of networks trained on each arm's set with equal steps and scored by AUC on 100 other graphs. The other
    arms' sets are filled until they take at least as many bytes as Mirage's."""
    train, test = motifs("train", seed=run.seed), motifs("test", seed=run.seed)
    size = distill(train, EMBEDDED, run).bytes

    def network(kind: Kind) -> GNN:
        return GNN(kind, train.node_classes, 2, width=32, layers=EMBEDDED.layers, dropout=0.2)

    def trained(kind: Kind, data: GraphSet, name: str, config: recipe.Config = TRAINING) -> nn.Module:
        with run.scope(name):
            return recipe.train(network(kind), data, config, run)

    def score(data: GraphSet, seconds: float | None = None, config: recipe.Config = TRAINING,
              kinds: tuple[Kind, ...] = NETWORKS) -> dict[str, float]:
        metrics: dict[str, float] = {}
        accuracies, times = [], []
        for kind in kinds:
            aucs = []
            for repeat in range(REPEATS):
                start = time.perf_counter()
                model = trained(kind, data, f"{kind} {repeat}", config)
                times.append(time.perf_counter() - start)
                result = recipe.scores(model, test, run.device)
                aucs.append(result["auc"])
                accuracies.append(result["accuracy"])
            metrics[kind] = sum(aucs) / len(aucs)
        return {"auc": sum(metrics.values()) / len(metrics), **metrics, "accuracy": sum(accuracies) / len(accuracies),
                "bytes": float(data.bytes), "graphs": float(len(data)),
                "seconds": min(times) if seconds is None else seconds}

    def system(config: Config = EMBEDDED, training: recipe.Config = TRAINING,
               kinds: tuple[Kind, ...] = NETWORKS) -> dict[str, float]:
        start = time.perf_counter()
        data = distill(train, config, run)
        return score(data, time.perf_counter() - start, training, kinds)

    def herded() -> GraphSet:
        return recipe.herded_graphs(train, trained("gin", train, "features"), size)

    return run.arms(
        {
            "random": lambda: score(recipe.random_graphs(train, size)),
            "herding": lambda: score(herded()),
            "single_trees": lambda: score(single_trees(train, EMBEDDED.layers, size)),
            "mirage": system,
            "full": lambda: score(train),
        },
        extended={
            "all_pooled": lambda: system(training=replace(TRAINING, pool="all")),
            "shared_too": lambda: system(replace(EMBEDDED, exclusive=False)),
            "unweighted": lambda: system(replace(EMBEDDED, sampling="alike")),
            "exclusive_singles": lambda: system(replace(EMBEDDED, most_trees=1)),
            "random_gat": lambda: score(recipe.random_graphs(train, size), kinds=("gat",)),
            "mirage_gat": lambda: system(kinds=("gat",)),
        },
    )


def tiny() -> dict[str, Any]:
    """Arguments of `distill` for the contract test."""
    return {"labelled": motifs("train", n=24, seed=1), "config": Config(theta=0.8, theta_step=0.1, theta_min=0.2,
                                                                        budget=2000)}


def _ceil(x: float) -> int:
    return -int(-(x - 1e-9) // 1)
