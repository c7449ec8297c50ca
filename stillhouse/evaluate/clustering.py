"""How well clusters meet classes. Class labels are used for scoring only."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Int
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from stillhouse.errors import DataError, require


def contingency(clusters: Int[Tensor, " n"], labels: Int[Tensor, " n"]) -> Int[Tensor, "clusters classes"]:
    """How many samples of each class every cluster holds. Raises DataError for unequal lengths or no samples."""
    require(clusters.shape == labels.shape and clusters.dim() == 1 and len(labels) > 0,
            f"clusters and labels must be two vectors of one length; got {tuple(clusters.shape)} and "
            f"{tuple(labels.shape)}", DataError)
    require(int(clusters.min()) >= 0 and int(labels.min()) >= 0, "clusters and labels count from 0", DataError)
    k, c = int(clusters.max()) + 1, int(labels.max()) + 1
    pairs = clusters.long().cpu() * c + labels.long().cpu()
    return torch.bincount(pairs, minlength=k * c).view(k, c)


def matching(clusters: Int[Tensor, " n"], labels: Int[Tensor, " n"], many_to_one: bool = False
             ) -> Int[Tensor, " clusters"]:
    """The class of every cluster.

    One to one: the assignment with the most samples in place (Kuhn 1955, the "Hungarian" method; scipy); a cluster that
    is left over, where there are more clusters than classes, gets class -1. `many_to_one`: each cluster its most
    frequent class, as in over-clustering.
    """
    table = contingency(clusters, labels)
    if many_to_one:
        return table.argmax(1)
    rows, columns = linear_sum_assignment(table.numpy(), maximize=True)
    classes = torch.full((len(table),), -1)
    classes[torch.from_numpy(rows)] = torch.from_numpy(columns)
    return classes


def clustering_accuracy(clusters: Int[Tensor, " n"], labels: Int[Tensor, " n"], many_to_one: bool = False) -> float:
    """Part of the samples whose cluster is matched to their class; see `matching`."""
    found = matching(clusters, labels, many_to_one)[clusters.long().cpu()]
    return float((found == labels.cpu()).double().mean())


def nmi(clusters: Int[Tensor, " n"], labels: Int[Tensor, " n"]) -> float:
    """Normalised mutual information, arithmetic mean of the entropies (scikit-learn)."""
    from sklearn.metrics import normalized_mutual_info_score

    return float(normalized_mutual_info_score(*_arrays(clusters, labels)))


def ari(clusters: Int[Tensor, " n"], labels: Int[Tensor, " n"]) -> float:
    """Adjusted Rand index (Hubert & Arabie 1985; scikit-learn): 0 for chance, 1 for the same partition."""
    from sklearn.metrics import adjusted_rand_score

    return float(adjusted_rand_score(*_arrays(clusters, labels)))


def _arrays(clusters: Tensor, labels: Tensor) -> tuple[np.ndarray, np.ndarray]:
    contingency(clusters, labels)
    return labels.cpu().numpy(), clusters.cpu().numpy()
