"""Graph networks of torch_geometric by one string, and the user's own."""

import pytest
import torch
from torch import nn

pytest.importorskip("torch_geometric")

from safetensors.torch import save_file
from torch_geometric.data import Batch
from torch_geometric.nn import GAT, GCN, GIN, GraphSAGE, global_add_pool, global_mean_pool

from stillhouse.data.graphs import motifs
from stillhouse.errors import ConfigError, RoleError, UnknownNameError
from stillhouse.hub.architectures import describe, rebuild
from stillhouse.hub.models import resolve_model
from stillhouse.protocols import GraphModel, Network
from stillhouse.recipes import graphs as recipe
from stillhouse.run import Run

WORDS = "in_channels=5,hidden_channels=8,num_layers=2,classes=3"
CLASSES = {"GCN": GCN, "GIN": GIN, "GraphSAGE": GraphSAGE, "GAT": GAT}


def few(n=4):
    data = motifs("train", 8)
    return [data.graph(i) for i in range(n)]


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("readout", ["add", "mean"])
def test_logits_are_those_of_the_class_called_by_hand(name, readout):
    model = resolve_model(f"pyg:{name}:{WORDS},readout={readout}", GraphModel).eval()
    body = CLASSES[name](5, 8, 2).eval()
    body.load_state_dict(model.body.state_dict())
    whole = Batch.from_data_list(few())
    pool = global_add_pool if readout == "add" else global_mean_pool
    with torch.no_grad():
        expected = model.head(pool(body(whole.x, whole.edge_index), whole.batch))
        torch.testing.assert_close(recipe.apply(model, few()), expected, rtol=1e-5, atol=1e-6)
    assert expected.shape == (4, 3)


def test_a_mask_limits_the_readout_and_a_gat_reads_edges():
    model = resolve_model(f"pyg:GAT:{WORDS},edge_dim=1", GraphModel).eval()
    whole = Batch.from_data_list(few())
    edges = torch.rand(whole.edge_index.shape[1], 1)
    mask = torch.zeros(len(whole.x), dtype=torch.bool)
    mask[:3] = True
    with torch.no_grad():
        nodes = model.body(whole.x, whole.edge_index, edge_attr=edges)
        expected = model.head(nodes[:3].sum(0))
        got = model(whole.x, whole.edge_index, whole.batch, mask, edge_attr=edges)
    torch.testing.assert_close(got[0], expected)
    torch.testing.assert_close(got[1], model.head.bias.detach())


def test_description_weights_and_factory(tmp_path):
    text = f"pyg:GIN:{WORDS}"
    model = resolve_model(text, GraphModel, seed=1)
    again = rebuild(describe(model), lambda words: pytest.fail(words))
    assert {k: v.shape for k, v in again.state_dict().items()} == {k: v.shape for k, v in model.state_dict().items()}
    save_file(model.state_dict(), tmp_path / "gin.safetensors")
    read = resolve_model(f"{text},weights={tmp_path / 'gin.safetensors'}", GraphModel, seed=2)
    assert all(torch.equal(v, read.state_dict()[k]) for k, v in model.state_dict().items())
    make = resolve_model(text, Network)
    assert make() is not make() and describe(make)["adapter"] == "PygModel"


@pytest.mark.parametrize("name", CLASSES)
def test_a_model_is_trained(name):
    model = resolve_model(f"pyg:{name}:in_channels=5,hidden_channels=8,num_layers=2,classes=2", GraphModel)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    run = Run(quiet=True)
    recipe.train(model, motifs("train", 16), recipe.Config(steps=2, batch=8, lr=0.01), run)
    assert len(run.history) and any(not torch.equal(v, before[k]) for k, v in model.state_dict().items())


class Own(nn.Module):
    """A network of the user's that returns one number a node, not class logits a graph."""

    def __init__(self, width=1):
        super().__init__()
        self.layer = nn.Linear(5, width)

    def forward(self, x, edge_index, batch, pool_mask=None, **extra):
        return self.layer(x)


def test_one_batch_of_graphs_is_sent_through_the_users_own():
    data, run = motifs("train", 8), Run(quiet=True).begin()
    run.check(GraphModel, data, student=resolve_model("stillhouse.models.gnn:GNN:kind=gin,features=5,classes=2"))
    with pytest.raises(RoleError, match="student"):
        run.check(GraphModel, data, student=nn.Linear(5, 2))
    with pytest.raises(RoleError, match="student"):
        run.check(GraphModel, data, student=Own())


@pytest.mark.parametrize(("text", "error", "said"), [
    ("pyg:Transformer:in_channels=5", UnknownNameError, "GraphSAGE"),
    ("pyg:GIN:classes=2", ConfigError, "in_channels"),
    (f"pyg:GIN:{WORDS},readout=median", ConfigError, "mean"),
    ("pyg:GIN:in_channels=5,hidden_channels=8,num_layers=2,classes=1", ConfigError, "classes"),
    (f"pyg:GCN:{WORDS},colour=3", ConfigError, "colour"),
    (f"pyg:GIN:{WORDS},weights=gin.pt", RoleError, "pickle"),
    (f"pyg:GIN:{WORDS},weights=none.safetensors", (UnknownNameError, OSError), "none.safetensors"),
])
def test_bad_words_are_answered(text, error, said):
    with pytest.raises(error, match=said):
        resolve_model(text, GraphModel)


def test_weights_and_graphs_that_do_not_fit(tmp_path):
    small = resolve_model("pyg:GIN:in_channels=5,hidden_channels=4,num_layers=2,classes=3", GraphModel)
    save_file(small.state_dict(), tmp_path / "small.safetensors")
    with pytest.raises(RoleError, match="in the network"):
        resolve_model(f"pyg:GIN:{WORDS},weights={tmp_path / 'small.safetensors'}", GraphModel)
    wide = resolve_model("pyg:GIN:in_channels=7,hidden_channels=4,num_layers=2,classes=2", GraphModel)
    with pytest.raises(RoleError, match="in_channels=7"):
        recipe.train(wide, motifs("train", 8), recipe.Config(steps=1), Run(quiet=True))
