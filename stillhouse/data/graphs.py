"""Labelled graphs with discrete node and edge labels: the set, its bytes, the embedded `motifs`, and conversion."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from stillhouse.data.sets import TensorSet
from stillhouse.errors import DamagedFileError, DataError, require
from stillhouse.store import load_tree, save_tree

FILE = "graphs.safetensors"
NUMBER_BYTES = 8


class GraphSet(TensorSet):
    """Graphs with a class each; items are {"index", "graph": torch_geometric Data, "label"}.

    node_label: for each graph int64 [nodes].
    edge_index: for each graph int64 [2, edges]; messages flow from row 0 to row 1, so an undirected edge stands twice.
    edge_label: for each graph int64 [edges], by default 0.
    label: int64 [graphs], the classes.
    pool_mask: for each graph bool [nodes], the nodes whose embeddings are pooled in training; all if left out.
    degree: for each graph float32 [nodes], in-degrees that a degree-normalised layer shall use; by default those found.
    frequency: int64 [graphs], how often each stands for something in the data it was made from.

    `node_classes` and `edge_classes` count the labels, also those that do not occur here.
    Raises DataError where lengths do not fit, a label is out of range or an edge leads to a node that does not exist.
    """

    def __init__(self, *, node_label: list, edge_index: list, label: Tensor, edge_label: list | None = None,
                 node_classes: int | None = None, edge_classes: int | None = None, **optional: Any):
        edge_label = [e.new_zeros(e.shape[1]) for e in edge_index] if edge_label is None else edge_label
        unknown = set(optional) - {"pool_mask", "degree", "frequency"}
        require(not unknown, f"a GraphSet has no field {', '.join(sorted(unknown))}", DataError)
        super().__init__(node_label=node_label, edge_index=edge_index, edge_label=edge_label, label=label, **optional)
        self.node_classes = _classes(node_label, node_classes, "node_label")
        self.edge_classes = _classes(edge_label, edge_classes, "edge_label")
        for i, (nodes, edges, kinds) in enumerate(zip(node_label, edge_index, edge_label, strict=True)):
            require(edges.dim() == 2 and len(edges) == 2 and edges.shape[1] == len(kinds),
                    f"graph {i}: edge_index must be [2, edges] with one edge_label each, got {tuple(edges.shape)} and "
                    f"{tuple(kinds.shape)}", DataError)
            require(edges.numel() == 0 or (int(edges.min()) >= 0 and int(edges.max()) < len(nodes)),
                    f"graph {i} has {len(nodes)} nodes, but an edge to node {int(edges.max()) if edges.numel() else 0}",
                    DataError)
        self._graphs: dict[int, Any] = {}

    @property
    def fields(self) -> tuple[str, ...]:
        return ("graph", "label")

    @property
    def classes(self) -> int:
        return int(self.label.max()) + 1 if len(self) else 0

    def graph(self, index: int) -> Any:
        """Graph `index` as a torch_geometric Data: x (one-hot node labels), edge_index, edge_attr (one-hot edge labels,
        where there is more than one), y, and pool_mask and degree where given."""
        if index not in self._graphs:
            from torch_geometric.data import Data

            data = Data(x=F.one_hot(self.node_label[index], self.node_classes).float(),
                        edge_index=self.edge_index[index], y=self.label[index].reshape(1))
            if self.edge_classes > 1:
                data.edge_attr = F.one_hot(self.edge_label[index], self.edge_classes).float()
            for name in ("pool_mask", "degree"):
                if name in self.data:
                    data[name] = self.data[name][index]
            self._graphs[index] = data
        return self._graphs[index]

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        index %= len(self)
        return {"index": index, "graph": self.graph(index), "label": self.label[index]}

    def batch(self, indices: Sequence[int] | Tensor) -> dict[str, Any]:
        where = torch.as_tensor(indices, dtype=torch.long)
        return {"index": where, "graph": [self.graph(i) for i in where.tolist()], "label": self.label[where]}

    def select(self, indices: Sequence[int] | Tensor) -> GraphSet:
        return self._like(super().select(indices).data)

    def with_fields(self, **fields: Tensor | list) -> GraphSet:
        return self._like({**self.data, **fields})

    def without(self, *names: str) -> GraphSet:
        return self._like({name: value for name, value in self.data.items() if name not in names})

    def _like(self, fields: dict[str, Any]) -> GraphSet:
        return GraphSet(**fields, node_classes=self.node_classes, edge_classes=self.edge_classes)

    def numbers(self, index: int) -> int:
        """How many numbers graph `index` takes: one a node, two an edge (an undirected edge counted once), one more an
        edge where there are several edge labels, the class, and the frequency where given."""
        width = 3 if self.edge_classes > 1 else 2
        edges = _stored_edges(self.edge_index[index], self.edge_label[index])
        return len(self.node_label[index]) + width * edges + 1 + ("frequency" in self.data)

    @property
    def bytes(self) -> int:
        """Storage of all graphs at `NUMBER_BYTES` a number, counted alike for real graphs and for forests."""
        return NUMBER_BYTES * sum(self.numbers(i) for i in range(len(self)))

    def save(self, folder: Path | str) -> Path:
        """Write the set into `folder`. Raises StoreError where that is not possible."""
        folder = Path(folder)
        save_tree(folder / FILE, {"fields": self.data, "node_classes": self.node_classes,
                                  "edge_classes": self.edge_classes})
        return folder

    @classmethod
    def load(cls, folder: Path | str) -> GraphSet:
        """Read a set written by `save`. Raises StoreError if it is not there, DamagedFileError if it is not one."""
        path = Path(folder) / FILE
        tree = load_tree(path)
        try:
            return cls(**tree["fields"], node_classes=tree["node_classes"], edge_classes=tree["edge_classes"])
        except (KeyError, TypeError) as error:
            raise DamagedFileError(f"{path} does not hold a set of graphs ({error})") from error


def as_graph_set(data: Any) -> GraphSet:
    """A GraphSet from one, from a torch_geometric dataset or list of Data, or from a map-style set of
    {"graph": Data, "label"}; attributes become labels as in `Labels.fit`. Raises DataError for anything else."""
    if isinstance(data, GraphSet):
        return data
    require(hasattr(data, "__len__") and hasattr(data, "__getitem__"),
            f"expected a set of graphs, got {type(data).__name__}; give a GraphSet or a torch_geometric dataset",
            DataError)
    items = [data[i] for i in range(len(data))]
    require(bool(items), "the set of graphs is empty; give at least one graph", DataError)
    if isinstance(items[0], dict):
        require({"graph", "label"} <= set(items[0]), f"items need graph and label, they have {', '.join(items[0])}",
                DataError)
        items = [item["graph"].clone().update({"y": torch.as_tensor(item["label"])}) for item in items]
    return Labels.fit(items).apply(items)


@dataclass(frozen=True)
class Labels:
    """How the attributes of torch_geometric graphs become discrete labels; fit on the training graphs, apply to all.

    A column that is not made of whole numbers is cut at its quantiles; then each distinct row of columns is a label,
    and rows that were not there when fitting share the last one. Nodes without attributes are labelled by their
    in-degree, up to `most_degree`; edges without attributes are all labelled 0.
    """

    node_cuts: list[Tensor | None] | None
    node_rows: list[tuple[int, ...]]
    edge_cuts: list[Tensor | None] | None
    edge_rows: list[tuple[int, ...]]
    most_degree: int

    @classmethod
    def fit(cls, graphs: Iterable[Any], bins: int = 4, most_degree: int = 10) -> Labels:
        """`bins` equally filled bins for continuous columns. Raises DataError for attributes that are not finite."""
        require(bins >= 2 and most_degree >= 1, f"bins must be 2 or more and most_degree 1 or more, not {bins} and "
                f"{most_degree}")
        graphs = list(graphs)
        require(bool(graphs), "the set of graphs is empty; give at least one graph", DataError)
        nodes, edges = (_columns(graphs, name) for name in ("x", "edge_attr"))
        node_cuts, edge_cuts = _cuts(nodes, bins), _cuts(edges, bins)
        return cls(node_cuts, _distinct(nodes, node_cuts), edge_cuts, _distinct(edges, edge_cuts), most_degree)

    def apply(self, graphs: Iterable[Any]) -> GraphSet:
        """The graphs with labels. Raises DataError for a graph without one class as its `y`."""
        graphs = list(graphs)
        fields: dict[str, list] = {"node_label": [], "edge_index": [], "edge_label": [], "label": []}
        for i, graph in enumerate(graphs):
            edges = graph.edge_index.cpu().long()
            n = int(graph.num_nodes)
            require(graph.y is not None and graph.y.numel() == 1 and float(graph.y) == int(graph.y) >= 0,
                    f"graph {i} needs one class, a whole number of 0 or more, as its y; it has {graph.y}", DataError)
            fields["node_label"].append(_rows_to_labels(graph.x, self.node_cuts, self.node_rows) if self.node_cuts
                                        else edges[1].bincount(minlength=n).clamp_max(self.most_degree))
            fields["edge_label"].append(_rows_to_labels(graph.edge_attr, self.edge_cuts, self.edge_rows)
                                        if self.edge_cuts else edges.new_zeros(edges.shape[1]))
            fields["edge_index"].append(edges)
            fields["label"].append(int(graph.y))
        return GraphSet(node_label=fields["node_label"], edge_index=fields["edge_index"],
                        edge_label=fields["edge_label"], label=torch.tensor(fields["label"], dtype=torch.long),
                        node_classes=len(self.node_rows) + 1 if self.node_cuts else self.most_degree + 1,
                        edge_classes=len(self.edge_rows) + 1 if self.edge_cuts else 1)


def chosen_within(data: GraphSet, order: Int[Tensor, " n"], size: int) -> GraphSet:
    """The first graphs of `order` of each class in turn, until they take at least `size` bytes.

    `order` lists positions of `data`, best first; classes get equally many graphs, as long as they have any.
    """
    queues = {c: [i for i in order.tolist() if int(data.label[i]) == c] for c in data.label.unique().tolist()}
    chosen: list[int] = []
    taken = 0
    while taken < size and any(queues.values()):
        for queue in queues.values():
            if queue and taken < size:
                chosen.append(queue.pop(0))
                taken += NUMBER_BYTES * data.numbers(chosen[-1])
    return data.select(chosen)


RINGS = ((0, 1, 2, 3, 4), (0, 2, 4, 1, 3))
"""Node labels around the planted ring of each class: the same labels in another order."""

LABEL_FREQUENCY = (0.65, 0.2, 0.08, 0.05, 0.02)
"""Of node labels on the backbone: so skewed that some trees of it are frequent, in both classes alike."""


def motifs(split: str = "train", n: int | None = None, seed: int = 0, wrong: float = 0.15) -> GraphSet:
    """Sparse graphs in two classes told apart by planted rings: 300 for "train", 100 for "test", classes equally many.

    A backbone of 15 to 25 nodes (a chain on which every fifth node or so sits on an earlier one) with 5 node labels of
    unequal frequency, and two rings of 5 nodes, each tied to the backbone by one edge. The order of labels around a
    ring is that of the graph's class, or with probability `wrong` that of the other. Mean degree about 2.
    """
    sizes = {"train": 300, "test": 100, "validation": 100}
    require(split in sizes, f"split is one of {', '.join(sizes)}, not {split!r}", DataError)
    require(n is None or n >= 2, f"n must be at least 2, not {n}", DataError)
    generator = torch.Generator().manual_seed(seed * 3 + list(sizes).index(split))

    def whole(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    def chance(p: float) -> bool:
        return bool(torch.rand((), generator=generator) < p)

    node_label, edge_index, label = [], [], []
    for i in range(n or sizes[split]):
        length = whole(15, 26)
        nodes = torch.multinomial(torch.tensor(LABEL_FREQUENCY), length, True, generator=generator).tolist()
        pairs = [(whole(0, v) if chance(0.2) else v - 1, v) for v in range(1, length)]
        for _ in range(2):
            ring = RINGS[1 - i % 2 if chance(wrong) else i % 2]
            first = len(nodes)
            nodes += list(ring)
            pairs += [(first + j, first + (j + 1) % 5) for j in range(5)]
            pairs.append((whole(0, length), first + whole(0, 5)))
        edges = torch.tensor(pairs).T
        node_label.append(torch.tensor(nodes))
        edge_index.append(torch.cat([edges, edges.flip(0)], 1))
        label.append(i % 2)
    return GraphSet(node_label=node_label, edge_index=edge_index, label=torch.tensor(label), node_classes=5)


def _classes(labels: list, given: int | None, name: str) -> int:
    values = [x for x in labels if len(x)]
    low = min((int(x.min()) for x in values), default=0)
    high = max((int(x.max()) for x in values), default=0)
    require(low >= 0, f"{name} must be 0 or more, found {low}", DataError)
    require(given is None or high < given, f"{name} holds {high}, but only {given} classes were announced", DataError)
    return given if given is not None else high + 1


def _stored_edges(edges: Int[Tensor, "2 edges"], kinds: Int[Tensor, " edges"]) -> int:
    """Edges to store: half of them (and all loops) where each has its mirror image of the same kind."""
    triples = list(zip(*edges.tolist(), kinds.tolist(), strict=True))
    if sorted(triples) != sorted((v, u, k) for u, v, k in triples):
        return len(triples)
    loops = sum(u == v for u, v, _ in triples)
    return (len(triples) - loops) // 2 + loops


def _columns(graphs: list[Any], name: str) -> Float[Tensor, "rows columns"] | None:
    values = [getattr(graph, name, None) for graph in graphs]
    if all(v is None or v.numel() == 0 for v in values):
        return None
    require(all(v is not None for v in values), f"some graphs have '{name}' and some do not", DataError)
    rows = torch.cat([_flat(v) for v in values if v is not None])
    require(bool(torch.isfinite(rows).all()), f"'{name}' is not finite in some graphs; remove or repair them",
            DataError)
    return rows


def _flat(attribute: Tensor) -> Float[Tensor, "rows columns"]:
    return attribute.cpu().double().reshape(len(attribute), -1)


def _cuts(rows: Tensor | None, bins: int) -> list[Tensor | None] | None:
    if rows is None:
        return None
    inner = torch.linspace(0, 1, bins + 1, dtype=rows.dtype)[1:-1]
    return [None if bool((column == column.round()).all()) else torch.from_numpy(_quantiles(column, inner))
            for column in rows.T]


def _quantiles(column: Tensor, at: Tensor) -> Any:
    import numpy as np

    return np.unique(np.quantile(column.numpy(), at.numpy()))


def _codes(rows: Tensor, cuts: list[Tensor | None]) -> list[tuple[int, ...]]:
    columns = [column.round().long() if cut is None else torch.bucketize(column.contiguous(), cut)
               for column, cut in zip(rows.T, cuts, strict=True)]
    return [tuple(row) for row in torch.stack(columns, 1).tolist()]


def _distinct(rows: Tensor | None, cuts: list[Tensor | None] | None) -> list[tuple[int, ...]]:
    return [] if rows is None or cuts is None else sorted(set(_codes(rows, cuts)))


def _rows_to_labels(attribute: Tensor, cuts: list[Tensor | None] | None, rows: list[tuple[int, ...]]) -> Tensor:
    numbers = {row: i for i, row in enumerate(rows)}
    codes = _codes(_flat(attribute), cuts or []) if len(attribute) else []
    return torch.tensor([numbers.get(code, len(rows)) for code in codes], dtype=torch.long)
