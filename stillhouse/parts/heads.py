"""Projection and prediction heads of self-supervised methods, and the head of a classifier."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from stillhouse.errors import DamagedFileError, RoleError, StoreError, require
from stillhouse.store import load_tree, save_tree

HEADS = "heads.safetensors"


def mlp(*widths: int, norm: bool = False, last_norm: bool = False) -> nn.Sequential:
    """Linear layers between the `widths`, with ReLU (after BatchNorm if `norm`) between them.

    `last_norm` puts a BatchNorm without scale and shift after the last layer (SimCLR v1 and v2, MoCo v3).
    """
    require(len(widths) >= 2 and min(widths) >= 1, f"an MLP needs at least two widths of 1 or more; got {widths}")
    layers: list[nn.Module] = []
    for i, (a, b) in enumerate(itertools.pairwise(widths)):
        last = i == len(widths) - 2
        normed = last_norm if last else norm
        layers.append(nn.Linear(a, b, bias=not normed))
        if normed:
            layers.append(nn.BatchNorm1d(b, affine=not last))
        if not last:
            layers.append(nn.ReLU())
    return nn.Sequential(*layers)


def projector(features: int, hidden: int, out: int, layers: int = 2, norm: bool = False) -> nn.Sequential:
    """Projection head g with `layers` linear layers: 2 in SimCLR (Chen et al. 2020, section 2.1), 3 in SimCLR v2."""
    require(layers >= 1, f"a projector needs at least 1 layer, not {layers}")
    return mlp(features, *[hidden] * (layers - 1), out, norm=norm)


def normed_projector(features: int, out: int = 128, layers: int = 3) -> nn.Sequential:
    """Projection head of SimCLR v2 (Chen et al. 2020b, section 2): `layers` linear layers without bias, all but the
    last as wide as the encoder's features, a BatchNorm after each (the last one without shift), ReLU between them."""
    require(min(features, out, layers) >= 1, f"features, out and layers must be at least 1; got {features}, {out}, "
            f"{layers}")
    parts: list[nn.Module] = []
    for _ in range(layers - 1):
        parts += [nn.Linear(features, features, bias=False), nn.BatchNorm1d(features), nn.ReLU()]
    last = nn.BatchNorm1d(out)
    last.register_parameter("bias", None)
    return nn.Sequential(*parts, nn.Linear(features, out, bias=False), last)


def predictor(features: int, hidden: int, norm: bool = False) -> nn.Sequential:
    """Prediction head q of two layers that keeps the width (BYOL, Grill et al. 2020, section 3.1)."""
    return mlp(features, hidden, features, norm=norm)


class Projected(nn.Module):
    """An encoder h with a projection head g and, if given, a prediction head q.

    Calling it gives z = g(h(x)); `encode` gives h(x) alone, flattened, and `predict` gives q(z).
    """

    def __init__(self, encoder: nn.Module, projector: nn.Module, predictor: nn.Module | None = None):
        super().__init__()
        self.encoder, self.projector, self.predictor = encoder, projector, predictor

    def encode(self, image: Tensor) -> Float[Tensor, "n features"]:
        return self.encoder(image).flatten(1)

    def predict(self, z: Float[Tensor, "n width"]) -> Float[Tensor, "n width"]:
        """q(z); raises RoleError without a prediction head."""
        if self.predictor is None:
            raise RoleError("this network has no prediction head; give Projected(…, predictor=…)")
        return self.predictor(z)

    def forward(self, image: Tensor) -> Float[Tensor, "n width"]:
        return self.projector(self.encode(image))

    def save(self, folder: Path | str) -> Path:
        """Write the encoder's weights and the heads into `folder`; `Projected.load(folder, encoder)` reads them.

        Raises StoreError for a head that is not made of linear layers, BatchNorm and ReLU.
        """
        folder = Path(folder)
        heads = {name: None if head is None else {"layers": _layers_of(head), "state": dict(_flat(head).state_dict())}
                 for name, head in (("projector", self.projector), ("predictor", self.predictor))}
        save_tree(folder / HEADS, heads)
        save_tree(folder / "model.safetensors", dict(self.encoder.state_dict()))
        return folder

    @classmethod
    def load(cls, folder: Path | str, encoder: nn.Module) -> Projected:
        """Read what `save` wrote, in eval mode; the weights go into `encoder`.

        Raises StoreError where the folder holds none or the encoder has other weights, DamagedFileError for heads that
        are not as they were written.
        """
        folder = Path(folder)
        weights, saved = load_tree(folder / "model.safetensors"), load_tree(folder / HEADS)
        try:
            encoder.load_state_dict(weights)
        except RuntimeError as error:
            raise StoreError(f"the encoder given does not have the weights saved in {folder}: {error}") from error
        try:
            q = saved["predictor"]
            return cls(encoder, _head_from(**saved["projector"]), None if q is None else _head_from(**q)).eval()
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise DamagedFileError(f"{folder / HEADS} does not hold the heads of an encoder ({error})") from error


def _flat(head: nn.Module) -> nn.Sequential:
    return nn.Sequential(*(m for m in head.modules() if not isinstance(m, nn.Sequential)))


def _layers_of(head: nn.Module) -> list[list[Any]]:
    """Kind and widths of each layer of a head."""
    layers: list[list[Any]] = []
    for m in _flat(head):
        if isinstance(m, nn.Linear):
            layers.append(["linear", m.in_features, m.out_features, m.bias is not None])
        elif isinstance(m, nn.BatchNorm1d):
            layers.append(["norm", m.num_features, m.weight is not None, m.bias is not None])
        elif isinstance(m, nn.ReLU):
            layers.append(["relu"])
        else:
            raise StoreError(f"a head with a {type(m).__name__} cannot be saved; only linear layers, BatchNorm and "
                             "ReLU are understood")
    return layers


def _head_from(layers: list[list[Any]], state: dict[str, Tensor]) -> nn.Sequential:
    made: list[nn.Module] = []
    for kind, *sizes in layers:
        if kind == "linear":
            made.append(nn.Linear(sizes[0], sizes[1], bias=sizes[2]))
        elif kind == "norm":
            norm = nn.BatchNorm1d(sizes[0], affine=sizes[1])
            if not sizes[2]:
                norm.register_parameter("bias", None)
            made.append(norm)
        elif kind == "relu":
            made.append(nn.ReLU())
        else:
            raise ValueError(f"no layer '{kind}'")
    head = nn.Sequential(*made)
    head.load_state_dict(state)
    return head


class ClusterNet(nn.Module):
    """An encoder with `count` linear heads side by side, each with its own guess at `clusters` clusters.

    Features are multiplied by the buffer `scale` before the heads; the reciprocal of their standard deviation lets a
    head start at a learning rate that does not depend on the encoder.
    """

    scale: Tensor

    def __init__(self, encoder: nn.Module, features: int, clusters: int, count: int = 1):
        super().__init__()
        require(clusters >= 2 and count >= 1, f"clusters must be 2 or more and heads 1 or more; got {clusters} and "
                f"{count}")
        self.encoder, self.clusters, self.count = encoder, clusters, count
        self.heads = nn.Linear(features, count * clusters)
        self.register_buffer("scale", torch.ones(()))

    def classify(self, features: Float[Tensor, "n features"]) -> Float[Tensor, "n heads clusters"]:
        return self.heads(features * self.scale).unflatten(1, (self.count, self.clusters))

    def forward(self, image: Tensor) -> Float[Tensor, "n heads clusters"]:
        """Logits of every head."""
        return self.classify(self.encoder(image).flatten(1))


class Cut(nn.Module):
    """An encoder f, the first layers of its projection head, and a linear classifier on top.

    `features` gives what the classifier reads; calling it gives the logits.
    """

    def __init__(self, encoder: nn.Module, kept: nn.Module, linear: nn.Linear):
        super().__init__()
        self.encoder, self.kept, self.linear = encoder, kept, linear

    def features(self, image: Tensor) -> Float[Tensor, "n features"]:
        return self.kept(self.encoder(image).flatten(1))

    def forward(self, image: Tensor) -> Float[Tensor, "n classes"]:
        return self.linear(self.features(image))


def first_layers(head: nn.Module, k: int) -> nn.Sequential:
    """The modules of a head (an nn.Sequential, nested or not) up to its linear layer k + 1: k linear layers with the
    normalisations and activations behind them. Raises RoleError if the head has fewer than k."""
    leaves = [m for m in head.modules() if not isinstance(m, nn.Sequential)]
    starts = [i for i, m in enumerate(leaves) if isinstance(m, nn.Linear)]
    require(0 <= k <= len(starts), f"a head of {len(starts)} linear layers cannot be cut after layer {k}", RoleError)
    return nn.Sequential(*leaves[: ([*starts, len(leaves)])[k]])


def classifier_from_head(model: Projected, classes: int, features: int, layer: int = 1) -> Cut:
    """A classifier that keeps the first `layer` layers of the projection head (SimCLR v2, section 2: 1; v1: 0).

    `features` is the width of the encoder's vectors. Encoder and head are copied; the classifier starts at zero.
    Raises RoleError if the head has fewer layers.
    """
    encoder, head = copy.deepcopy((model.encoder, model.projector))
    kept = first_layers(head, layer)
    widths = [m.out_features for m in kept if isinstance(m, nn.Linear)]
    linear = nn.Linear(([features, *widths])[-1], classes).to(next(model.parameters()))
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    return Cut(encoder, kept, linear)


@torch.no_grad()
def feature_width(encoder: nn.Module, image: Tensor) -> int:
    """Length of the feature vector that `encoder` gives for one picture; the encoder is left as it was."""
    modes = [(m, m.training) for m in encoder.modules()]
    home = next((p.device for p in encoder.parameters()), image.device)
    try:
        return encoder.eval()(image[:1].to(home)).flatten(1).shape[1]
    finally:
        for module, training in modes:
            module.training = training


def last_linear(model: nn.Module) -> tuple[str, nn.Linear]:
    """Path and module of the last linear layer, the head of a classifier. Raises RoleError where there is none."""
    linears = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    require(bool(linears), f"{type(model).__name__} has no linear layer that could be its head", RoleError)
    return linears[-1]


def replace_head(model: nn.Module, classes: int | None = None) -> tuple[nn.Module, nn.Module]:
    """A copy of a classifier for another task, and its new head: the last linear layer is replaced by a fresh one of
    `classes` outputs, or taken away (an encoder) if `classes` is None.

    Raises RoleError if the model has no linear layer.
    """
    body = copy.deepcopy(model)
    path, old = last_linear(body)
    parent, _, leaf = path.rpartition(".")
    head: nn.Module = nn.Identity() if classes is None else nn.Linear(old.in_features, classes).to(old.weight)
    setattr(body.get_submodule(parent), leaf, head)
    return body, head


def identity_linear(inputs: int, outputs: int) -> nn.Linear:
    """A linear layer that passes its input on: identity weight and zero bias. Where the widths differ there is no
    identity, and the layer starts at random."""
    linear = nn.Linear(inputs, outputs)
    if inputs == outputs:
        nn.init.eye_(linear.weight)
        nn.init.zeros_(linear.bias)
    return linear
