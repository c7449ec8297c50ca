"""Groups of feature vectors by k-means (scikit-learn), and the cell of new ones."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from stillhouse.errors import DataError, require


def kmeans(
    features: Float[Tensor, "n features"], k: int, restarts: int = 5, iterations: int = 100, seed: int = 0
) -> tuple[Int[Tensor, " n"], Float[Tensor, "k features"]]:
    """Cluster of every vector and the k centres: the best of `restarts` runs of k-means (k-means++ starts, Lloyd steps;
    scikit-learn), in float64. The same arguments give the same clusters on the same machine.

    Raises DataError for fewer vectors than clusters or values that are not finite.
    """
    from sklearn.cluster import KMeans

    require(k >= 1 and restarts >= 1 and iterations >= 1, "k, restarts and iterations must be at least 1; got "
            f"{k}, {restarts} and {iterations}")
    require(len(features) >= k, f"{len(features)} samples cannot make {k} clusters", DataError)
    require(bool(torch.isfinite(features).all()), "features to be clustered must be finite", DataError)
    model = KMeans(k, n_init=restarts, max_iter=iterations, random_state=seed % 2**32)
    labels = model.fit_predict(features.detach().flatten(1).double().cpu().numpy())
    return torch.from_numpy(labels).long(), torch.from_numpy(model.cluster_centers_).to(features.dtype)


def average_linkage(features: Float[Tensor, "n features"], k: int) -> Int[Tensor, " n"]:
    """Cluster of every vector: at first each is one, then always the two with the smallest mean distance are joined
    until `k` are left (scikit-learn). Memory grows with n squared. Raises DataError for fewer vectors than clusters."""
    from sklearn.cluster import AgglomerativeClustering

    require(1 <= k <= len(features), f"{len(features)} samples cannot make {k} clusters", DataError)
    if len(features) == 1:
        return torch.zeros(1, dtype=torch.long)
    model = AgglomerativeClustering(n_clusters=k, linkage="average")
    return torch.from_numpy(model.fit_predict(features.detach().flatten(1).double().cpu().numpy())).long()


def nearest_centre(features: Float[Tensor, "n features"], centres: Float[Tensor, "k features"]) -> Int[Tensor, " n"]:
    """The centre closest to each vector (Euclidean)."""
    return torch.cdist(features.flatten(1).double(), centres.double()).argmin(1)


def principal_components(
    features: Float[Tensor, "n features"], k: int
) -> tuple[Float[Tensor, " features"], Float[Tensor, "features k"]]:
    """Mean and the k directions of largest variance: (x - mean) @ directions are the coordinates of PCA."""
    require(1 <= k <= min(features.shape), f"k must lie between 1 and {min(features.shape)}, not {k}")
    x = features.flatten(1).double()
    mean = x.mean(0)
    _, _, directions = torch.linalg.svd(x - mean, full_matrices=False)
    return mean.to(features.dtype), directions[:k].T.to(features.dtype)
