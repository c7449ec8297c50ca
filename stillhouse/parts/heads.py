"""Projection and prediction heads of self-supervised methods, and the head of a classifier."""

from __future__ import annotations

import copy
import itertools

import torch
from jaxtyping import Float
from torch import Tensor, nn

from stillhouse.errors import RoleError, require


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


@torch.no_grad()
def feature_width(encoder: nn.Module, image: Tensor) -> int:
    """Length of the feature vector that `encoder` gives for one picture; the encoder is left as it was."""
    modes = [(m, m.training) for m in encoder.modules()]
    try:
        return encoder.eval()(image[:1]).flatten(1).shape[1]
    finally:
        for module, training in modes:
            module.training = training


def replace_head(model: nn.Module, classes: int | None = None) -> tuple[nn.Module, nn.Module]:
    """A copy of a classifier for another task, and its new head: the last linear layer is replaced by a fresh one of
    `classes` outputs, or taken away (an encoder) if `classes` is None.

    Raises RoleError if the model has no linear layer.
    """
    body = copy.deepcopy(model)
    linears = [name for name, module in body.named_modules() if isinstance(module, nn.Linear)]
    require(bool(linears), f"{type(model).__name__} has no linear layer that could be its head", RoleError)
    parent, _, leaf = linears[-1].rpartition(".")
    old = body.get_submodule(linears[-1])
    assert isinstance(old, nn.Linear)
    head: nn.Module = nn.Identity() if classes is None else nn.Linear(old.in_features, classes).to(old.weight)
    setattr(body.get_submodule(parent), leaf, head)
    return body, head
