"""Frequent sets: which items occur together in at least so many transactions; and trees as such items."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Hashable, Mapping, Sequence
from typing import TypeVar

import torch

from stillhouse.data.graphs import GraphSet
from stillhouse.data.trees import canonical_labels, forest_set
from stillhouse.errors import require

Item = TypeVar("Item", bound=Hashable)


def frequent_sets(
    transactions: Sequence[Collection[Item]], support: int, most_items: int | None = None
) -> dict[frozenset[Item], int]:
    """Every non-empty set of items that at least `support` transactions contain, with how many do (FP-growth, Han et
    al. 2000, of mlxtend). Ordered by support, then size, then items: the same whatever the order of the input.

    With low support and long transactions there are exponentially many; `most_items` bounds the size of a set.
    Raises ConfigError for a support below 1.
    """
    require(support >= 1, f"support must be at least 1 transaction, not {support}")
    require(most_items is None or most_items >= 1, f"most_items must be at least 1, not {most_items}")
    counts = Counter(item for transaction in transactions for item in set(transaction))
    frequent = sorted((item for item, n in counts.items() if n >= support), key=str)
    if not frequent:
        return {}
    import numpy as np
    import pandas as pd
    from mlxtend.frequent_patterns import fpgrowth

    place = {item: i for i, item in enumerate(frequent)}
    table = np.zeros((len(transactions), len(frequent)), dtype=bool)
    for row, transaction in enumerate(transactions):
        table[row, [place[item] for item in set(transaction) if item in place]] = True
    found = fpgrowth(pd.DataFrame(table), min_support=(support - 0.5) / len(transactions), max_len=most_items)
    sets = [(round(share * len(transactions)), sorted(items))
            for share, items in zip(found["support"], found["itemsets"], strict=True)]
    sets.sort(key=lambda pair: (-pair[0], len(pair[1]), pair[1]))
    return {frozenset(frequent[i] for i in items): n for n, items in sets}


def exclusive(found: Mapping[int, Mapping[frozenset[Item], int]]) -> dict[int, dict[frozenset[Item], int]]:
    """The sets of each class that are frequent in no other class."""
    return {c: {s: n for s, n in own.items() if not any(s in other for d, other in found.items() if d != c)}
            for c, own in found.items()}


def tree_transactions(
    data: GraphSet,
    depth: int,
    min_count: int = 2,
    most_children: int | None = None,
    generator: torch.Generator | None = None,
) -> dict[int, list[set[str]]]:
    """For each class its graphs as sets of canonical tree labels, of which those stay that are the tree of at least
    `min_count` nodes of the class."""
    require(min_count >= 1, f"min_count must be at least 1, not {min_count}")
    trees: dict[int, list[list[str]]] = {c: [] for c in data.label.unique().tolist()}
    for i, c in enumerate(data.label.tolist()):
        trees[c].append(canonical_labels(data.node_label[i], data.edge_index[i], depth, data.edge_label[i],
                                         most_children, generator))
    counts = {c: Counter(tree for graph in graphs for tree in graph) for c, graphs in trees.items()}
    return {c: [{tree for tree in graph if counts[c][tree] >= min_count} for graph in graphs]
            for c, graphs in trees.items()}


def single_trees(data: GraphSet, depth: int, size: int) -> GraphSet:
    """The baseline without co-occurrence: of each class the trees that occur in most of its graphs, one a forest, with
    their frequencies, until they take at least `size` bytes."""
    queues: dict[int, list[tuple[str, int]]] = {}
    for c, transactions in tree_transactions(data, depth, min_count=1).items():
        counts = Counter(tree for transaction in transactions for tree in transaction)
        queues[c] = sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))
    chosen: list[tuple[int, str, int]] = []
    taken = 0
    while taken < size and any(queues.values()):
        for c, queue in queues.items():
            if queue and taken < size:
                tree, n = queue.pop(0)
                chosen.append((c, tree, n))
                taken += forest_set([[tree]], [c], [n], data).bytes
    return forest_set([[t] for _, t, _ in chosen], [c for c, _, _ in chosen], [n for _, _, n in chosen], data)
