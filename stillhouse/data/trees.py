"""Computation trees: what a message-passing network of depth L sees of a graph, node by node.

The tree of node v has v as its root and as the children of each node all its neighbours, the parent included, down to
depth L: the unrolling of L rounds of messages, not a breadth-first search. Its canonical label is a string, equal for
isomorphic trees only: "(l" for the node label l, then for each child " e" for the label of its edge and the child's
own string, children sorted, then ")". The brackets and the blank keep labels of several digits apart. A label can be
read back into its tree, so the label is all that has to be kept.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

import torch
from jaxtyping import Int
from torch import Tensor

from stillhouse.data.graphs import GraphSet
from stillhouse.errors import DataError, require

TOKEN = re.compile(r"\(|\)|\d+")


def canonical_labels(
    node_label: Int[Tensor, " nodes"],
    edge_index: Int[Tensor, "2 edges"],
    depth: int,
    edge_label: Int[Tensor, " edges"] | None = None,
    most_children: int | None = None,
    generator: torch.Generator | None = None,
) -> list[str]:
    """The canonical label of the depth-`depth` computation tree of every node.

    Trees of depth d are put together from those of depth d - 1 of the neighbours, so each costs its own length. Hubs
    make trees explode: `most_children` keeps so many children of a node, with a `generator` drawn at random for each
    depth, without one the first in canonical order (then isomorphic trees stay equal).

    Raises ConfigError for a negative depth or `most_children` below 1.
    """
    require(depth >= 0, f"depth must be 0 or more, not {depth}")
    require(most_children is None or most_children >= 1, f"most_children must be at least 1, not {most_children}")
    names = [str(label) for label in node_label.tolist()]
    kinds = [0] * edge_index.shape[1] if edge_label is None else edge_label.tolist()
    incoming: list[list[tuple[int, int]]] = [[] for _ in names]
    for source, target, kind in zip(*edge_index.tolist(), kinds, strict=True):
        incoming[target].append((kind, source))
    trees = [f"({name})" for name in names]
    for _ in range(depth):
        grown = []
        for name, sources in zip(names, incoming, strict=True):
            children = sorted(f" {kind}{trees[source]}" for kind, source in _sampled(sources, most_children, generator))
            grown.append(f"({name}{''.join(children[:most_children])})")
        trees = grown
    return trees


def parse_tree(label: str) -> tuple[list[int], list[tuple[int, int]], list[int]]:
    """Node labels, edges (child, parent) and edge labels of a canonical label; node 0 is the root."""
    nodes: list[int] = []
    edges: list[tuple[int, int]] = []
    kinds: list[int] = []
    path: list[int] = []
    tokens = iter(TOKEN.findall(label))
    for token in tokens:
        if token == "(":
            if path:
                edges.append((len(nodes), path[-1]))
            path.append(len(nodes))
            nodes.append(int(next(tokens)))
        elif token == ")":
            path.pop()
        else:
            kinds.append(int(token))
    require(not path and len(kinds) == len(edges) == len(nodes) - 1, f"not the label of a tree: {label!r}", DataError)
    return nodes, edges, kinds


def forest_set(
    patterns: Sequence[Sequence[str]],
    label: Sequence[int],
    frequency: Sequence[int] | None,
    like: GraphSet,
) -> GraphSet:
    """Each pattern, a set of canonical labels, as one graph: the disjoint union of its trees, edges from child to
    parent, with the roots (the nodes without outgoing edge) as its pool mask. Label counts are those of `like`."""
    fields: dict[str, list] = {"node_label": [], "edge_index": [], "edge_label": [], "pool_mask": []}
    for pattern in patterns:
        nodes: list[int] = []
        edges: list[tuple[int, int]] = []
        kinds: list[int] = []
        for tree in pattern:
            own_nodes, own_edges, own_kinds = parse_tree(tree)
            edges += [(child + len(nodes), parent + len(nodes)) for child, parent in own_edges]
            nodes += own_nodes
            kinds += own_kinds
        edge_index = torch.tensor(edges, dtype=torch.long).reshape(-1, 2).T.contiguous()
        fields["node_label"].append(torch.tensor(nodes, dtype=torch.long))
        fields["edge_index"].append(edge_index)
        fields["edge_label"].append(torch.tensor(kinds, dtype=torch.long))
        fields["pool_mask"].append(roots(len(nodes), edge_index))
    optional = {} if frequency is None else {"frequency": torch.tensor(list(frequency), dtype=torch.long)}
    return GraphSet(node_label=fields["node_label"], edge_index=fields["edge_index"], edge_label=fields["edge_label"],
                    pool_mask=fields["pool_mask"], label=torch.tensor(list(label), dtype=torch.long),
                    node_classes=like.node_classes, edge_classes=like.edge_classes, **optional)


def roots(nodes: int, edge_index: Int[Tensor, "2 edges"]) -> Tensor:
    """Which nodes have no outgoing edge, bool [nodes]."""
    mask = torch.ones(nodes, dtype=torch.bool)
    mask[edge_index[0]] = False
    return mask


def unrolled(
    edge_index: Int[Tensor, "2 edges"], starts: Iterable[int], depth: int
) -> tuple[Int[Tensor, " nodes"], Int[Tensor, "2 edges"], Int[Tensor, " edges"]]:
    """The forest of the computation trees of the nodes `starts`, in their order and with the origin of each part kept.

    Returns for each tree node the node, for each edge (child -> parent) its ends, and the edge of the graph it is.
    """
    incoming: dict[int, list[tuple[int, int]]] = {}
    for number, (source, target) in enumerate(edge_index.T.tolist()):
        incoming.setdefault(target, []).append((source, number))
    origin: list[int] = []
    edges: list[tuple[int, int]] = []
    numbers: list[int] = []
    for start in starts:
        layer = [len(origin)]
        origin.append(start)
        for _ in range(depth):
            following = []
            for parent in layer:
                for source, number in incoming.get(origin[parent], []):
                    following.append(len(origin))
                    edges.append((len(origin), parent))
                    numbers.append(number)
                    origin.append(source)
            layer = following
    return (torch.tensor(origin, dtype=torch.long), torch.tensor(edges, dtype=torch.long).reshape(-1, 2).T.contiguous(),
            torch.tensor(numbers, dtype=torch.long))


def full_forests(data: GraphSet, depth: int) -> GraphSet:
    """Every graph as the forest of the computation trees of all its nodes, with their original degrees: a network of at
    most `depth` layers that pools the roots gives what it gives on the graphs."""
    fields: dict[str, list] = {"node_label": [], "edge_index": [], "edge_label": [], "pool_mask": [], "degree": []}
    for nodes, edges, kinds in zip(data.node_label, data.edge_index, data.edge_label, strict=True):
        origin, own, numbers = unrolled(edges, range(len(nodes)), depth)
        fields["node_label"].append(nodes[origin])
        fields["edge_index"].append(own)
        fields["edge_label"].append(kinds[numbers])
        fields["pool_mask"].append(roots(len(origin), own))
        fields["degree"].append(edges[1].bincount(minlength=len(nodes))[origin].float())
    return GraphSet(node_label=fields["node_label"], edge_index=fields["edge_index"], edge_label=fields["edge_label"],
                    pool_mask=fields["pool_mask"], degree=fields["degree"], label=data.label,
                    node_classes=data.node_classes, edge_classes=data.edge_classes)


def _sampled(sources: list[tuple[int, int]], most: int | None, generator: torch.Generator | None
             ) -> list[tuple[int, int]]:
    if most is None or generator is None or len(sources) <= most:
        return sources
    return [sources[i] for i in torch.randperm(len(sources), generator=generator)[:most].tolist()]
