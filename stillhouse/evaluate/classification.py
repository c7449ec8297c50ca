"""Scores of a classifier on labelled pictures."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from stillhouse.data.sets import fetch
from stillhouse.errors import DataError, require
from stillhouse.run import frozen


def predictions(
    model: nn.Module, data: Any, batch: int = 512, device: torch.device | str = "cpu"
) -> tuple[Float[Tensor, "n classes"], Int[Tensor, " n"]]:
    """Logits and labels of the whole set, on the CPU; the model in eval mode, without gradient, left as it was."""
    require(len(data) > 0, "there is nothing to evaluate on: the set is empty", DataError)
    logits, labels = [], []
    with frozen(model), torch.no_grad():
        for start in range(0, len(data), batch):
            part = fetch(data, range(start, min(start + batch, len(data))))
            require("label" in part, "evaluation needs labels: the set has no field 'label'", DataError)
            logits.append(model(part["image"].to(device)).float().cpu())
            labels.append(part["label"].cpu())
    return torch.cat(logits), torch.cat(labels)


def accuracy(model: nn.Module, data: Any, batch: int = 512, device: torch.device | str = "cpu") -> float:
    """Share of pictures whose most probable class is the label, in [0, 1]."""
    logits, labels = predictions(model, data, batch, device)
    return (logits.argmax(-1) == labels).double().mean().item()


def per_class_accuracy(logits: Float[Tensor, "n classes"], labels: Int[Tensor, " n"]) -> Float[Tensor, " classes"]:
    """Accuracy on the pictures of each class (recall); NaN for a class that does not occur."""
    right = (logits.argmax(-1) == labels).double()
    classes = logits.shape[-1]
    counts = torch.bincount(labels, minlength=classes).double()
    return torch.bincount(labels, weights=right, minlength=classes) / counts


def calibration_error(logits: Float[Tensor, "n classes"], labels: Int[Tensor, " n"], bins: int = 15) -> float:
    """Expected calibration error (Guo et al. 2017, equation 3) over equally wide bins of the highest probability."""
    require(bins >= 1, f"bins must be at least 1, not {bins}")
    confidence, predicted = logits.double().softmax(-1).max(-1)
    gap = (predicted == labels).double() - confidence
    place = (confidence * bins).ceil().long().clamp(1, bins) - 1
    return torch.zeros(bins, dtype=torch.double).index_add(0, place, gap).abs().sum().item() / len(labels)
