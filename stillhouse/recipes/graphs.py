"""Training a graph network on a set of graphs or forests, scoring it, and choosing graphs by what it sees."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from stillhouse.data.coresets import herding
from stillhouse.data.graphs import GraphSet, as_graph_set, chosen_within
from stillhouse.data.sets import fetch
from stillhouse.errors import DataError, RoleError, require
from stillhouse.protocols import GraphModel, Graphs
from stillhouse.run import Run, begin, frozen


@dataclass(frozen=True)
class Config:
    steps: int = 3000  # optimiser steps
    batch: int = 128  # graphs a step
    lr: float = 1e-3  # Adam's learning rate
    weight_decay: float = 0.0  # lambda
    pool: Literal["mask", "all"] = "mask"  # what is pooled in training: the nodes of the pool mask, or all

    def __post_init__(self) -> None:
        require(self.steps >= 0 and self.batch >= 1, "steps must be 0 or more and batch 1 or more; got "
                f"{self.steps} and {self.batch}")
        require(self.lr > 0 and self.weight_decay >= 0, "lr must be above 0 and weight_decay 0 or more; got "
                f"{self.lr} and {self.weight_decay}")
        require(self.pool in ("mask", "all"), f"pool is 'mask' or 'all', not {self.pool!r}")


def train(student: GraphModel, labelled: Graphs, config: Config = Config(), run: Run | None = None) -> nn.Module:
    """Cross-entropy on the classes of graphs; the student is trained in place and returned.

    Graphs with a `frequency` are drawn in proportion to it within their class, classes equally often; others are gone
    through in epochs. A `pool_mask` limits pooling (Mirage: the roots). Raises DataError for an empty set or one class,
    RoleError where the student cannot process the first graphs.
    """
    run = begin(run)
    data = as_graph_set(labelled)
    run.check(Graphs, data)
    require(len(data.label.unique()) > 1, "all graphs are of one class; training needs at least two", DataError)
    assert isinstance(student, nn.Module)
    _probe(student, data, run)
    student.train()
    optimizer = torch.optim.Adam(student.parameters(), config.lr, weight_decay=config.weight_decay)
    weights = sampling_weights(data) if "frequency" in data.data else None
    source = data if weights is None else None
    batch_size = config.batch if weights is None else None
    for step in run.loop("train", source, batch=batch_size, steps=config.steps, student=student, optimizer=optimizer):
        if weights is None:
            batch = step
        else:
            batch = data.batch(torch.multinomial(weights, config.batch, True, generator=run.shared))
        logits = apply(student, batch["graph"], run.device, masked=config.pool == "mask")
        run.update(optimizer, ce=F.cross_entropy(logits, batch["label"].to(run.device)))
    return student


def sampling_weights(data: GraphSet) -> Float[Tensor, " n"]:
    """The probability of each graph: its share of the frequencies of its class, divided by the number of classes."""
    frequency = data.frequency.double()
    totals = torch.zeros(data.classes, dtype=torch.double).index_add(0, data.label, frequency)
    return frequency / totals[data.label] / len(data.label.unique())


def apply(model: Any, graphs: list[Any], device: torch.device | str = "cpu", masked: bool = True) -> Tensor:
    """Logits [graphs, classes] of a list of torch_geometric Data as one batch; with `masked` their pool masks hold."""
    from torch_geometric.data import Batch

    whole = Batch.from_data_list(graphs).to(device)
    extra = {name: whole[name] for name in ("edge_attr", "degree") if name in whole}
    mask = whole.pool_mask if masked and "pool_mask" in whole else None
    return model(whole.x, whole.edge_index, whole.batch, mask, graphs=len(graphs), **extra)


def predictions(
    model: nn.Module, data: Any, batch: int = 256, device: torch.device | str = "cpu"
) -> tuple[Float[Tensor, "n classes"], Int[Tensor, " n"]]:
    """Logits and labels of a set of graphs, on the CPU; the model in eval mode, without gradient, left as it was."""
    require(len(data) > 0, "there is nothing to evaluate on: the set is empty", DataError)
    logits, labels = [], []
    with frozen(model), torch.no_grad():
        for start in range(0, len(data), batch):
            part = fetch(data, range(start, min(start + batch, len(data))))
            logits.append(apply(model, part["graph"], device).float().cpu())
            labels.append(part["label"].cpu())
    return torch.cat(logits), torch.cat(labels)


def scores(model: nn.Module, data: Any, device: torch.device | str = "cpu") -> dict[str, float]:
    """ROC-AUC (for several classes the mean over them, one against the rest) and accuracy, both in [0, 1]."""
    from sklearn.metrics import roc_auc_score

    logits, labels = predictions(model, data, device=device)
    truth = F.one_hot(labels, logits.shape[1])
    kept = (truth.sum(0) > 0) & (truth.sum(0) < len(truth))
    require(bool(kept.any()), "AUC needs test graphs of at least two classes", DataError)
    probability = logits.double().softmax(-1)
    auc = roc_auc_score(truth[:, kept].numpy(), probability[:, kept].numpy(), average="macro")
    return {"auc": float(auc), "accuracy": (logits.argmax(-1) == labels).double().mean().item()}


def random_graphs(data: GraphSet, size: int) -> GraphSet:
    """Graphs drawn at random, classes in turn, until they take at least `size` bytes."""
    return chosen_within(data, torch.randperm(len(data)), size)


def herded_graphs(data: GraphSet, model: Any, size: int) -> GraphSet:
    """Graphs whose mean embedding by `model` (a `GNN`) stays closest to their class's, until they take `size` bytes."""
    from torch_geometric.data import Batch

    with frozen(model), torch.no_grad():
        whole = Batch.from_data_list([data.graph(i) for i in range(len(data))])
        extra = {name: whole[name] for name in ("edge_attr", "degree") if name in whole}
        features = model.pool(model.embed(whole.x, whole.edge_index, **extra), whole.batch, graphs=len(data))
    fewest = int(data.label.bincount()[data.label.unique()].min())
    return chosen_within(data, herding(features, data.label, fewest), size)


def _probe(student: nn.Module, data: GraphSet, run: Run) -> None:
    first = [data.graph(i) for i in range(min(4, len(data)))]
    try:
        with run.aside("check", student):
            logits = apply(student, first, run.device)
    except Exception as error:
        raise RoleError(f"student ({type(student).__name__}) could not process one batch of graphs with "
                        f"{data.node_classes} node and {data.edge_classes} edge labels: {type(error).__name__}: "
                        f"{error}") from error
    require(logits.dim() == 2 and len(logits) == len(first) and logits.shape[1] >= data.classes,
            f"student must return [graphs, {data.classes} or more classes]; {len(first)} graphs gave "
            f"{tuple(logits.shape)}", RoleError)
