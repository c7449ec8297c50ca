"""Losses that make a network name clusters: agreeing, confident pairs, all clusters in use, confident pseudo-labels.

p and q are probabilities [n, clusters]. Over several processes gather them first (`run.gather`).
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from stillhouse.errors import require
from stillhouse.measures.divergences import Reduction, reduce_samples

Probabilities = Float[Tensor, "n clusters"]
EPS = 1e-8


def consistency(
    p: Probabilities, q: Probabilities, weight: Float[Tensor, " n"] | None = None, reduction: Reduction = "mean"
) -> Tensor:
    """-log <p, q> (SCAN, equation 2, first term): 0 only where both name the same cluster with certainty. The inner
    product is clamped at 1e-8."""
    return reduce_samples(-(p * q).sum(-1).clamp_min(EPS).log(), weight, reduction=reduction)


def mean_entropy(p: Probabilities) -> Tensor:
    """H(mean of p over the samples), in nats: log of the number of clusters where all are used alike, 0 for one.

    0 log 0 = 0. Its gradient in the logits vanishes where all clusters are used alike.
    """
    used = p.mean(0)
    return -(used * used.clamp_min(EPS).log()).sum()


def neighbour_loss(p: Probabilities, neighbours: Int[Tensor, "n columns"], chunk: int = 4096) -> Tensor:
    """consistency - H over all stored pairs (sample, neighbour), by which SCAN chooses a head: the entropy has weight 1
    whatever it had in training. Computed `chunk` samples at a time."""
    agreement = [torch.einsum("nc,nkc->nk", p[i : i + chunk], p[neighbours[i : i + chunk]]).clamp_min(EPS).log().sum()
                 for i in range(0, len(p), chunk)]
    return -torch.stack(agreement).sum() / neighbours.numel() - mean_entropy(p)


def pseudo_labels(p: Probabilities, threshold: float) -> tuple[Int[Tensor, " n"], Bool[Tensor, " n"]]:
    """The most probable cluster of every sample, and whether its probability exceeds the threshold."""
    require(0 <= threshold < 1, f"threshold is a probability in [0, 1), not {threshold}")
    confidence, label = p.max(-1)
    return label, confidence > threshold


def balance(labels: Int[Tensor, " n"], confident: Bool[Tensor, " n"], clusters: int) -> Float[Tensor, " clusters"]:
    """Weight of each cluster: the number of confident samples over those of the cluster, 1 where it has none."""
    counts = torch.bincount(labels[confident], minlength=clusters).float()
    return torch.where(counts > 0, counts.sum() / counts.clamp_min(1), 1.0)
