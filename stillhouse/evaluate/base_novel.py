"""The base-to-novel protocol: some classes have labels, the others only names (Zhou et al. 2022, CoCoOp)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from stillhouse.errors import DataError, require
from stillhouse.evaluate.classification import predictions


def base_and_novel(classes: int) -> tuple[list[int], list[int]]:
    """The first half of the classes (rounded up) and the second."""
    require(classes >= 2, f"a split into base and novel classes needs at least two, not {classes}", DataError)
    middle = (classes + 1) // 2
    return list(range(middle)), list(range(middle, classes))


def of_classes(labels: Int[Tensor, " n"], chosen: Sequence[int]) -> Int[Tensor, " m"]:
    """Positions of the samples whose label is among the chosen classes."""
    return torch.isin(labels, torch.tensor(list(chosen))).nonzero().flatten()


def harmonic_mean(base: float, novel: float) -> float:
    """HM = 2 B N / (B + N); 0 where both are 0."""
    return 2 * base * novel / (base + novel) if base + novel else 0.0


def accuracy_among(logits: Float[Tensor, "n classes"], labels: Int[Tensor, " n"], chosen: Sequence[int]) -> float:
    """Accuracy on the samples of the chosen classes, with those classes alone to choose from."""
    where = of_classes(labels, chosen)
    require(len(where) > 0, f"no sample has one of the {len(chosen)} classes", DataError)
    columns = torch.tensor(list(chosen))
    return (columns[logits[where][:, columns].argmax(1)] == labels[where]).double().mean().item()


def base_to_novel(
    model: nn.Module, data: Any, base: Sequence[int], novel: Sequence[int], device: torch.device | str = "cpu"
) -> dict[str, float]:
    """Accuracies on base and novel pictures, each among its own classes; their harmonic mean; accuracy among all."""
    logits, labels = predictions(model, data, device=device)
    b, n = accuracy_among(logits, labels, base), accuracy_among(logits, labels, novel)
    return {"base": b, "novel": n, "hm": harmonic_mean(b, n),
            "all": accuracy_among(logits, labels, [*base, *novel])}
