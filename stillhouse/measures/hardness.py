"""How hard a labelled sample is, from what a model says of it."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from stillhouse.errors import DataError, require
from stillhouse.measures.divergences import log_probs


def el2n(logits: Float[Tensor, "n classes"], label: Int[Tensor, " n"]) -> Float[Tensor, " n"]:
    """EL2N (Paul et al. 2021, definition 2.2) of one network: || softmax(z) - onehot(y) ||_2, in [0, sqrt 2]."""
    require(label.shape == logits.shape[:1], f"{tuple(label.shape)} labels for logits of shape {tuple(logits.shape)}",
            DataError)
    p = log_probs(logits).exp()
    return (p - F.one_hot(label, logits.shape[1]).to(p)).norm(dim=1)


def gradient_norms(
    model: nn.Module, image: Float[Tensor, "n ..."], label: Int[Tensor, " n"], chunk: int = 64
) -> Float[Tensor, " n"]:
    """GraNd (Paul et al. 2021, definition 2.1) of one network: the norm of the gradient of each sample's cross-entropy
    in all parameters; in the model's present mode, which must not be that of training where it has BatchNorm."""
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    buffers = {name: b.detach() for name, b in model.named_buffers()}

    def loss(given: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        logits = torch.func.functional_call(model, (given, buffers), (x[None],))
        return F.cross_entropy(logits, y[None])

    each: Callable[..., dict[str, Tensor]] = torch.func.vmap(torch.func.grad(loss), (None, 0, 0), chunk_size=None)
    parts = []
    for start in range(0, len(image), chunk):
        where = slice(start, start + chunk)
        grads = each(parameters, image[where], label[where])
        parts.append(torch.stack([g.flatten(1).square().sum(1) for g in grads.values()]).sum(0).sqrt())
    return torch.cat(parts)


def from_the_median(features: Float[Tensor, "n features"], label: Int[Tensor, " n"]) -> Float[Tensor, " n"]:
    """Moderate (Xia et al. 2023): how far a sample's distance to the mean of its class is from the median of all such
    distances; small for samples that are neither typical nor odd."""
    distance = torch.empty(len(features), dtype=features.dtype)
    for y in label.unique().tolist():
        own = (label == y).nonzero().flatten()
        distance[own] = (features[own] - features[own].mean(0)).norm(dim=1)
    return (distance - distance.median()).abs()
