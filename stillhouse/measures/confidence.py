"""How sure several models are of the same pictures, and which of them is the surest of each."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from stillhouse.errors import DataError, require
from stillhouse.measures.divergences import log_probs


def confidence(
    logits: Float[Tensor, "*models batch classes"], label: Int[Tensor, " batch"] | None = None
) -> Float[Tensor, "*models batch"]:
    """The logarithm of the probability of the label, or, without labels, of the most probable class."""
    log_p = log_probs(logits)
    if label is None:
        return log_p.amax(-1)
    require(label.shape == logits.shape[-2:-1], f"{tuple(label.shape)} labels for logits of shape "
            f"{tuple(logits.shape)}", DataError)
    return log_p.gather(-1, label.expand(log_p.shape[:-1])[..., None])[..., 0]


def surest(
    logits: Float[Tensor, "models batch classes"], label: Int[Tensor, " batch"] | None = None
) -> Int[Tensor, " batch"]:
    """Per sample, the position of the model with the highest `confidence`; of equals the first, so that a later one
    must be strictly surer (Roth et al. 2024, equation 4, with the frozen student before the teachers)."""
    return confidence(logits, label).argmax(0)


def of_each(
    logits: Float[Tensor, "models batch classes"], chosen: Int[Tensor, " batch"]
) -> Float[Tensor, "batch classes"]:
    """The logits of the model chosen for each sample."""
    return logits[chosen, torch.arange(len(chosen), device=logits.device)]
