"""Targets as safetensors and JSON: what `stillhouse.load` reads, and for data sets and scenes what one can look at."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from stillhouse.data.graphs import GraphSet
from stillhouse.deploy.formats.views import Job, Made, compare, deviation, view_of
from stillhouse.deploy.targets import WEIGHTS, load
from stillhouse.hub.architectures import TARGET
from stillhouse.models.cameras import Cameras
from stillhouse.store import load_tree

NETWORKS = ("Classifier", "Encoder", "TextClassifier", "TextEncoder", "CausalLM", "SpeechEncoder", "Denoiser",
            "Density")
"""Rows whose target is one network: its weights go under their own names, as any library reads them."""

GRAPH_FILE = "pyg.safetensors"
WRAPPED = ("Every tensor's name begins with `t.`, and nested ones with the name of their part.",)


def to_safetensors(job: Job) -> Made:
    """Write weights and target.json; and grids, meshes and graphs of targets that are no networks."""
    plain = job.row in NETWORKS
    _copy(job)
    if plain:
        save_file(own_tensors(job.target), job.folder / WEIGHTS, {"format": "pt"})
    arch = f', arch="{job.arch}"' if job.arch else ""
    rung = "" if job.steps is None else f"[{job.steps}]"
    code = f'import stillhouse\n\ntarget = stillhouse.load("."{arch}){rung}'
    if job.row in ("DistilledSet", "GraphSet", "SceneSet"):
        return _set(job, code)
    again = load(job.folder, job.arch)
    again = again if job.steps is None else again[job.steps]
    view = job.view
    checks = compare(view, view_of(again, job.row, job.about))
    notes = () if plain else WRAPPED
    if plain:
        code += ('\n\nfrom safetensors.torch import load_file  # without Stillhouse: the tensors by their names\n\n'
                 f'weights = load_file("{WEIGHTS}")')
    if job.row == "QuantizedModel":
        notes = ("weights.safetensors is the packed file as it was saved: indices of a few bits each, the ends of their"
                 " buckets, and what is not quantised; quantized.json says how they lie.",)
    return Made(checks, 0.0, code, (f"{TARGET} describes the network in JSON; loading it runs no code.", *notes))


def _copy(job: Job) -> None:
    """The files of the saved target: those of the one sampler where it is of a ladder, and no other exports."""
    for path in job.place.iterdir():
        if path.is_file():
            shutil.copy2(path, job.folder)
        elif path.name == "tokenizer" or path.name == f"steps-{job.steps}":
            shutil.copytree(path, job.folder / path.name)


def own_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The state of a network, tied tensors once, each with memory of its own."""
    seen: set[tuple[Any, ...]] = set()
    found: dict[str, Tensor] = {}
    for name, value in model.state_dict().items():
        layout = (value.data_ptr(), tuple(value.shape), value.stride())
        if value.numel() and layout in seen:
            continue
        seen.add(layout)
        found[name] = value.detach().cpu().clone().contiguous()
    return found


# ---------------------------------------------------------------------------------- sets


def _set(job: Job, code: str) -> Made:
    again: Any = load(job.folder, job.arch)
    if job.row == "DistilledSet":
        checks = {name: deviation(getattr(again, name), getattr(job.target, name)) for name in ("images", "labels")}
        return Made(checks, 0.0, code, (
            "distilled.safetensors holds `t.images` (in the space in which networks are trained on them), `t.labels` "
            "and what goes with them; pictures.png shows the pictures.",))
    if job.row == "GraphSet":
        save_file(flat_graphs(job.target), job.folder / GRAPH_FILE, {"format": "pt"})
        return Made({**_same(again.data, job.target.data), **_graphs_again(job)}, 0.0, code + GRAPH_CODE, (
            f"{GRAPH_FILE} holds all graphs end to end: node_label [nodes], edge_index [2, edges] (counted within each "
            "graph), edge_label [edges], label [graphs], and the offsets node_ptr and edge_ptr [graphs + 1].",))
    state = load_tree(job.folder / "scenes.safetensors")
    checks = {name: deviation(value, state[name]) for name, value in job.target.state_dict().items()}
    return Made(checks, 0.0, code, (_scene_files(job.target, job.folder),))


GRAPH_CODE = f"""

from safetensors.torch import load_file  # without Stillhouse: a list for torch_geometric
from torch_geometric.data import Data

t = load_file("{GRAPH_FILE}")
nodes, edges = t["node_ptr"].tolist(), t["edge_ptr"].tolist()
graphs = [Data(x=t["node_label"][nodes[i]:nodes[i + 1]], edge_index=t["edge_index"][:, edges[i]:edges[i + 1]],
               edge_attr=t["edge_label"][edges[i]:edges[i + 1]], y=t["label"][i:i + 1])
          for i in range(len(t["label"]))]"""


def flat_graphs(graphs: GraphSet) -> dict[str, Tensor]:
    """All graphs of a set end to end, with the offsets of each."""
    fields: Any = graphs.data

    def offsets(counts: list[int]) -> Tensor:
        return torch.tensor([0, *counts]).cumsum(0)

    return {"node_label": torch.cat(list(fields["node_label"])), "label": torch.as_tensor(fields["label"]).clone(),
            "edge_index": torch.cat(list(fields["edge_index"]), 1).contiguous(),
            "edge_label": torch.cat(list(fields["edge_label"])),
            "node_ptr": offsets([len(v) for v in fields["node_label"]]),
            "edge_ptr": offsets([len(v) for v in fields["edge_label"]])}


def _graphs_again(job: Job) -> dict[str, float]:
    t, found = load_file(job.folder / GRAPH_FILE), {}
    fields: Any = job.target.data
    for name, dim, ptr in (("node_label", 0, "node_ptr"), ("edge_index", 1, "edge_ptr"), ("edge_label", 0, "edge_ptr")):
        parts = t[name].split(t[ptr].diff().tolist(), dim)
        found[f"{GRAPH_FILE} {name}"] = max(deviation(a, b) for a, b in zip(parts, fields[name], strict=True))
    return found


def _same(found: dict[str, Any], wanted: dict[str, Any]) -> dict[str, float]:
    checks: dict[str, float] = {}
    for name, value in wanted.items():
        pairs = zip(found[name], value, strict=True)
        checks[name] = max(deviation(a, b) for a, b in pairs)
    return checks


@torch.no_grad()
def _scene_files(scenes: Any, folder: Path) -> str:
    """PNG files of pictures, and renders of what has a shape; says what they are."""
    import matplotlib.image

    if scenes.kind == "mesh":
        return ("Each mesh is an .obj file with the colours of its corners; scenes.safetensors holds what it is made "
                "from.")
    if scenes.kind == "points":
        return "scenes.safetensors holds the points as they are."
    if scenes.kind == "pictures":
        shown = scenes.render(torch.arange(len(scenes)))
    else:
        around = Cameras(torch.full((4,), 0.3), torch.arange(4) * math.pi / 2, torch.full((4,), 1.25),
                         torch.ones(4))
        shown = torch.cat([scenes.render(torch.full((4,), i), around) for i in range(len(scenes))])
    for i, picture in enumerate(shown):
        image = picture if picture.shape[0] == 3 else picture.mean(0, keepdim=True).expand(3, -1, -1)
        matplotlib.image.imsave(folder / f"scene-{i}.png", ((image + 1) / 2).clamp(0, 1).permute(1, 2, 0).numpy())
    return ("scene-*.png are the pictures, from [-1, 1]." if scenes.kind == "pictures" else
            "scene-*.png show each scene from four sides; as meshes they are got from scenes.meshes(resolution).")
