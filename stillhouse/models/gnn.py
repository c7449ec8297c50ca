"""Message-passing graph classifiers on the layers of torch_geometric: GCN, GraphSAGE, GAT, GIN."""

from __future__ import annotations

from itertools import pairwise
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from stillhouse.errors import require

Kind = Literal["gcn", "sage", "gat", "gin"]


class GNN(nn.Module):
    """`layers` rounds of messages, the sum of node embeddings, dropout and a linear layer: a `GraphModel`.

    Nothing is normalised over nodes or the batch, so that a node's embedding depends on its computation tree alone.
    GAT and GIN (then GINE) read edge features where `edge_features` is above 0; GCN and GraphSAGE have no use for them.
    """

    def __init__(self, kind: Kind, features: int, classes: int, width: int = 128, layers: int = 2,
                 dropout: float = 0.5, edge_features: int = 0):
        super().__init__()
        require(kind in get_args(Kind), f"kind is one of {', '.join(get_args(Kind))}, not {kind!r}")
        require(features >= 1 and classes >= 2 and width >= 1 and layers >= 1,
                f"a GNN needs features, width and layers of at least 1 and 2 classes; got {features}, {width}, "
                f"{layers} and {classes}")
        require(0 <= dropout < 1, f"dropout must lie in [0, 1), not {dropout}")
        self.kind, self.dropout = kind, dropout
        widths = [features] + [width] * layers
        self.layers = nn.ModuleList(_layer(kind, a, b, edge_features) for a, b in pairwise(widths))
        self.head = nn.Linear(width, classes)

    def embed(
        self,
        x: Float[Tensor, "nodes features"],
        edge_index: Int[Tensor, "2 edges"],
        edge_attr: Float[Tensor, "edges kinds"] | None = None,
        degree: Float[Tensor, " nodes"] | None = None,
    ) -> Float[Tensor, "nodes width"]:
        """The embedding of every node. `degree` (in-degrees, used by GCN alone) is by default that of `edge_index`."""
        for number, layer in enumerate(self.layers):
            if number:
                x = F.relu(x)
            if self.kind == "gcn":
                x = layer(x, *_normalised(edge_index, x, degree))
            elif self.kind == "sage" or edge_attr is None:
                x = layer(x, edge_index)
            else:
                x = layer(x, edge_index, edge_attr)
        return x

    def forward(
        self,
        x: Float[Tensor, "nodes features"],
        edge_index: Int[Tensor, "2 edges"],
        batch: Int[Tensor, " nodes"],
        pool_mask: Bool[Tensor, " nodes"] | None = None,
        **extra: Any,
    ) -> Float[Tensor, "graphs classes"]:
        """Class logits; only the nodes of `pool_mask` are pooled, all without one. `extra`: edge_attr, degree, and
        `graphs`, the number of graphs, where the last ones may have no node."""
        graphs = extra.pop("graphs", None)
        pooled = self.pool(self.embed(x, edge_index, **extra), batch, pool_mask, graphs)
        return self.head(F.dropout(pooled, self.dropout, self.training))

    def pool(self, nodes: Float[Tensor, "nodes width"], batch: Int[Tensor, " nodes"],
             pool_mask: Bool[Tensor, " nodes"] | None = None, graphs: int | None = None
             ) -> Float[Tensor, "graphs width"]:
        """The sum of the node embeddings of each graph, within `pool_mask`."""
        return read_out(nodes, batch, pool_mask, graphs)


def read_out(
    nodes: Float[Tensor, "nodes width"],
    batch: Int[Tensor, " nodes"],
    pool_mask: Bool[Tensor, " nodes"] | None = None,
    graphs: int | None = None,
    how: str = "sum",
) -> Float[Tensor, "graphs width"]:
    """The "sum", "mean" or "max" of the nodes of each graph within `pool_mask`; `graphs` says how many there are, where
    the last ones may have no node."""
    from torch_geometric.utils import scatter

    graphs = int(batch.max()) + 1 if graphs is None else graphs
    if pool_mask is not None:
        nodes, batch = nodes[pool_mask], batch[pool_mask]
    return scatter(nodes, batch, dim=0, dim_size=graphs, reduce=how)


def _layer(kind: Kind, inputs: int, width: int, edge_features: int) -> nn.Module:
    from torch_geometric import nn as layers

    if kind == "gcn":
        return layers.GCNConv(inputs, width, normalize=False, add_self_loops=False)
    if kind == "sage":
        return layers.SAGEConv(inputs, width)
    if kind == "gat":
        return layers.GATConv(inputs, width, edge_dim=edge_features or None)
    update = nn.Sequential(nn.Linear(inputs, width), nn.ReLU(), nn.Linear(width, width))
    return layers.GINEConv(update, edge_dim=edge_features) if edge_features else layers.GINConv(update)


def _normalised(edge_index: Tensor, x: Tensor, degree: Tensor | None) -> tuple[Tensor, Tensor]:
    """Edges with self-loops and their weights 1 / sqrt((d_u + 1)(d_v + 1)) (Kipf and Welling 2017, equation 2)."""
    n = len(x)
    if degree is None:
        degree = torch.bincount(edge_index[1], minlength=n)
    scale = (degree.to(x.dtype) + 1).rsqrt()
    loops = torch.arange(n, device=edge_index.device)
    edges = torch.cat([edge_index, torch.stack([loops, loops])], 1)
    return edges, scale[edges[0]] * scale[edges[1]]
