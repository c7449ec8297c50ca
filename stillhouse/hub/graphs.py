"""Graph networks of `torch_geometric` as graph classifiers."""

from __future__ import annotations

from typing import Any

from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from stillhouse.errors import ConfigError, DamagedFileError, MissingExtraError, RoleError, UnknownNameError, require
from stillhouse.models.gnn import read_out

NAMES = ("GCN", "GIN", "GraphSAGE", "GAT")
READOUTS = ("add", "mean", "max")


class PygModel(nn.Module):
    """A GCN, GIN, GraphSAGE or GAT of `torch_geometric.nn`, a readout of its nodes and a linear layer: a GraphModel.

    Edge features are read by a GAT that was given `edge_dim`; others have no use for them.
    """

    def __init__(self, name: str, readout: str, classes: int, options: dict[str, Any]):
        super().__init__()
        self.name, self.readout, self.options = name, readout, dict(options)
        self.body = _body(name, options)
        width = options.get("out_channels") or options["hidden_channels"]
        self.head = nn.Linear(width, classes)

    def spec(self) -> dict[str, Any]:
        """All but the weights, for JSON."""
        return {"name": self.name, "readout": self.readout, "classes": self.head.out_features, "options": self.options}

    @classmethod
    def from_spec(cls, spec: dict[str, Any]) -> PygModel:
        """A model as `spec` describes it, with fresh weights."""
        return cls(spec["name"], spec["readout"], spec["classes"], spec["options"])

    def embed(
        self, x: Float[Tensor, "nodes features"], edge_index: Int[Tensor, "2 edges"],
        edge_attr: Float[Tensor, "edges kinds"] | None = None, **extra: Any,
    ) -> Float[Tensor, "nodes width"]:
        """The embedding of every node."""
        expected = self.options["in_channels"]
        require(x.dim() == 2 and x.shape[1] == expected, f"this {self.name} has in_channels={expected}, but the nodes "
                f"of the graphs have {x.shape[1] if x.dim() == 2 else tuple(x.shape)} features; give pyg:{self.name}:"
                f"in_channels={x.shape[-1]},…", RoleError)
        edges = {"edge_attr": edge_attr} if self.options.get("edge_dim") else {}
        return self.body(x, edge_index, **edges)

    def pool(self, nodes: Float[Tensor, "nodes width"], batch: Int[Tensor, " nodes"],
             pool_mask: Bool[Tensor, " nodes"] | None = None, graphs: int | None = None
             ) -> Float[Tensor, "graphs width"]:
        """The readout of the nodes of each graph, within `pool_mask`."""
        return read_out(nodes, batch, pool_mask, graphs, "sum" if self.readout == "add" else self.readout)

    def forward(
        self,
        x: Float[Tensor, "nodes features"],
        edge_index: Int[Tensor, "2 edges"],
        batch: Int[Tensor, " nodes"],
        pool_mask: Bool[Tensor, " nodes"] | None = None,
        graphs: int | None = None,
        **extra: Any,
    ) -> Float[Tensor, "graphs classes"]:
        """Class logits; only the nodes of `pool_mask` are pooled, all without one."""
        return self.head(self.pool(self.embed(x, edge_index, **extra), batch, pool_mask, graphs))


def load(name: str, classes: int = 2, readout: str = "add", weights: str | None = None, **options: Any) -> PygModel:
    """The model `pyg:name:options`: those of its class in torch_geometric (`in_channels`, `hidden_channels`,
    `num_layers`, `dropout`, …), `classes`, `readout` ("add", "mean", "max"), and `weights`, a .safetensors file.

    Raises UnknownNameError for another class, ConfigError for options that it does not take, RoleError for weights that
    do not fit or are a pickle.
    """
    require(name in NAMES, f"there is no 'pyg:{name}'; there is {', '.join(NAMES)}", UnknownNameError)
    absent = [key for key in ("in_channels", "hidden_channels", "num_layers") if key not in options]
    require(not absent, f"pyg:{name} needs {', '.join(absent)}, e.g. pyg:{name}:in_channels=7,hidden_channels=16,"
            "num_layers=2,classes=2")
    require(readout in READOUTS, f"readout is one of {', '.join(READOUTS)}, not '{readout}'")
    require(isinstance(classes, int) and classes >= 2, f"classes must be 2 or more, not {classes}")
    try:
        model = PygModel(name, readout, classes, options)
    except MissingExtraError:
        raise
    except Exception as error:
        raise ConfigError(f"torch_geometric builds no {name} of {options}: {type(error).__name__}: {error}") from error
    return model if weights is None else _weighted(model, weights)


def _weighted(model: PygModel, weights: str) -> PygModel:
    from stillhouse.data.readers import PICKLES
    from stillhouse.hub.models import load_weights
    from stillhouse.hub.refusals import PICKLE

    require(not str(weights).lower().endswith(PICKLES), f"{weights}: {PICKLE}", RoleError)
    load_weights(model, weights)
    return model


def _body(name: str, options: dict[str, Any]) -> nn.Module:
    require(name in NAMES, f"torch_geometric's '{name}' is no model that is built here", DamagedFileError)
    try:
        from torch_geometric.nn import models
    except ImportError as error:
        raise MissingExtraError("pyg:… needs torch_geometric; install it with: pip install 'stillhouse[graph]'"
                                ) from error
    return getattr(models, name)(**options)
