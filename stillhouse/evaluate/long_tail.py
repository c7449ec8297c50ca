"""Scores for classes of unequal size, and for several classifiers of the same pictures."""

from __future__ import annotations

import itertools
import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from stillhouse.errors import require
from stillhouse.evaluate.classification import per_class_accuracy


def shot_accuracy(
    logits: Float[Tensor, "n classes"], labels: Int[Tensor, " n"], counts: Int[Tensor, " classes"],
    many: int = 100, few: int = 20,
) -> dict[str, float]:
    """Mean accuracy of the classes with more than `many` training pictures ("many"), fewer than `few` ("few") and those
    between ("medium") (Liu et al. 2019); NaN for a group without classes."""
    require(many >= few, f"many must be at least few, got {many} and {few}")
    each = per_class_accuracy(logits, labels)
    groups = {"many": counts > many, "medium": (counts <= many) & (counts >= few), "few": counts < few}
    return {name: each[group].mean().item() if group.any() else math.nan for name, group in groups.items()}


def disagreement(logits: Float[Tensor, "models n classes"]) -> float:
    """How often two of the models predict different classes for the same picture: the mean over all pairs, in [0, 1].
    Raises ConfigError for fewer than two models."""
    require(len(logits) >= 2, f"disagreement needs two models or more, not {len(logits)}")
    chosen = logits.argmax(-1)
    pairs = [(chosen[i] != chosen[j]).double().mean() for i, j in itertools.combinations(range(len(chosen)), 2)]
    return torch.stack(pairs).mean().item()


def bias_variance(logits: Float[Tensor, "models n classes"], labels: Int[Tensor, " n"]) -> tuple[float, float]:
    """Bias and variance of the 0-1 loss over models (Domingos 2000): how often the class that most models predict (of
    equals the lowest) is not the label, and how often a model predicts another class than that one."""
    chosen = logits.argmax(-1)
    main = torch.nn.functional.one_hot(chosen, logits.shape[-1]).sum(0).argmax(-1)
    return (main != labels).double().mean().item(), (chosen != main).double().mean().item()
