"""Graphs from disk: the text files of the TU collection, and a way from torch_geometric's data sets to ours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stillhouse.data.graphs import GraphSet, as_graph_set
from stillhouse.errors import DataError, require


def graphs_of(dataset: Any, folder: Path | str | None = None) -> GraphSet:
    """A torch_geometric data set, or list of Data, as a GraphSet; written into `folder` if one is given.

    Attributes become labels as in `stillhouse.data.graphs.Labels`. Raises DataError for graphs without one class each,
    StoreError where the folder cannot be written.
    """
    graphs = as_graph_set(dataset)
    if folder is not None:
        graphs.save(folder)
    return graphs


def is_processed(folder: Path) -> bool:
    """Whether torch_geometric wrote a folder: what it processed is pickled."""
    return (folder / "processed").is_dir() and any(folder.glob("processed/*.pt"))


def read_tu(folder: Path | str) -> GraphSet:
    """Graphs from the files NAME_A.txt, NAME_graph_indicator.txt, NAME_graph_labels.txt and, where there are any,
    NAME_node_labels.txt and NAME_edge_labels.txt, of a folder or of its `raw`.

    Labels are numbered in their order; nodes without labels get their in-degree, up to 10. Attributes are not read.
    Raises DataError for files that are missing, damaged, or do not fit each other.
    """
    folder = Path(folder).expanduser()
    require(folder.is_dir(), f"there is no folder {folder} (seen from {Path.cwd()})", DataError)
    found = sorted([*folder.glob("*_A.txt"), *folder.glob("raw/*_A.txt")])
    require(len(found) == 1, f"{folder} must hold one file NAME_A.txt (the edges), itself or in raw/; it has "
            f"{len(found)}", DataError)
    stem = found[0].name.removesuffix("_A.txt")

    def table(name: str, width: int, needed: bool = False) -> Tensor | None:
        path = found[0].with_name(f"{stem}_{name}.txt")
        if not path.is_file():
            require(not needed, f"{path} is missing; the files of a set are {stem}_A.txt, {stem}_graph_indicator.txt, "
                    f"{stem}_graph_labels.txt and, if any, {stem}_node_labels.txt", DataError)
            return None
        try:
            rows = np.loadtxt(path, delimiter=",", dtype=np.int64, ndmin=2)
        except ValueError as error:
            raise DataError(f"{path} is damaged: whole numbers are expected, {width} a line ({error})") from error
        require(rows.size == 0 or rows.shape[1] >= width, f"{path} has {rows.shape[1]} numbers a line, not {width}",
                DataError)
        return torch.from_numpy(rows[:, :width] if rows.size else rows.reshape(0, width))

    edges, graph, label = (table(n, w, True) for n, w in (("A", 2), ("graph_indicator", 1), ("graph_labels", 1)))
    nodes, kinds = table("node_labels", 1), table("edge_labels", 1)
    assert edges is not None and graph is not None and label is not None
    owner = graph.flatten() - 1
    count, total = len(label), len(owner)
    require(count > 0 and total > 0, f"{folder} holds no graphs", DataError)
    require(int(owner.min()) >= 0 and int(owner.max()) < count, f"{stem}_graph_indicator.txt names graph "
            f"{int(owner.max()) + 1} of {count}", DataError)
    require(bool((owner.diff() >= 0).all()), f"{stem}_graph_indicator.txt is not sorted by graph", DataError)
    for what, rows, wanted in (("node", nodes, total), ("edge", kinds, len(edges))):
        have = wanted if rows is None else len(rows)
        require(have == wanted, f"{stem}_{what}_labels.txt has {have} lines for {wanted} {what}s", DataError)
    source, target = (edges - 1).T
    require(len(edges) == 0 or (int(edges.min()) >= 1 and int(edges.max()) <= total), f"{stem}_A.txt names a node that "
            f"is not among the {total}", DataError)
    require(bool((owner[source] == owner[target]).all()), f"{stem}_A.txt has an edge between two graphs", DataError)
    degree = target.bincount(minlength=total).clamp_max(10)
    node_label = degree if nodes is None else _ranked(nodes)
    edge_label = torch.zeros(len(edges), dtype=torch.long) if kinds is None else _ranked(kinds)
    sizes = owner.bincount(minlength=count)
    first = sizes.cumsum(0) - sizes
    order = torch.argsort(owner[source], stable=True)
    cuts = owner[source].bincount(minlength=count).tolist()
    pairs = torch.stack([source, target])[:, order] - first[owner[source[order]]]
    return GraphSet(node_label=list(node_label.split(sizes.tolist())), edge_index=list(pairs.split(cuts, 1)),
                    edge_label=list(edge_label[order].split(cuts)), label=_ranked(label),
                    node_classes=11 if nodes is None else None)


def _ranked(values: Tensor) -> Tensor:
    """Numbers as their position among the distinct ones."""
    return values.flatten().unique(return_inverse=True)[1]
