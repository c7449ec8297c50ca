"""What a frozen encoder's features are worth: linear and nearest-neighbour probes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from stillhouse.data.sets import fetch
from stillhouse.errors import DataError, require
from stillhouse.run import frozen


def extract(
    encoder: nn.Module, data: Any, batch: int = 512, device: torch.device | str = "cpu", field: str = "image"
) -> Float[Tensor, "n features"]:
    """Features of the whole set, on the CPU; the encoder in eval mode, without gradient, left as it was. `field` is the
    batch field that it is given."""
    require(len(data) > 0, "there is nothing to encode: the set is empty", DataError)
    rows = []
    with frozen(encoder), torch.no_grad():
        for start in range(0, len(data), batch):
            images = fetch(data, range(start, min(start + batch, len(data))))[field].to(device)
            rows.append(encoder(images).flatten(1).float().cpu())
    return torch.cat(rows)


def linear_probe(
    features: Float[Tensor, "n features"],
    labels: Int[Tensor, " n"],
    test_features: Float[Tensor, "m features"],
    test_labels: Int[Tensor, " m"],
    strength: float = 1.0,
    iterations: int = 1000,
) -> float:
    """Test accuracy of a logistic regression (scikit-learn, converged) on standardised features.

    `strength` is C, the inverse of the L2 penalty. Raises DataError if the features are not finite.
    """
    from sklearn.linear_model import LogisticRegression

    model = LogisticRegression(C=strength, max_iter=iterations)
    return _probe(model, features, labels, test_features, test_labels)


def probe_tasks(
    features: Float[Tensor, "n features"],
    test_features: Float[Tensor, "m features"],
    labels: Mapping[str, Int[Tensor, " n"]],
    test_labels: Mapping[str, Int[Tensor, " m"]],
    strength: float = 1.0,
) -> dict[str, float]:
    """The `linear_probe` of the same features on several tasks, by the tasks' names."""
    return {task: linear_probe(features, labels[task], test_features, test_labels[task], strength) for task in labels}


def knn_probe(
    features: Float[Tensor, "n features"],
    labels: Int[Tensor, " n"],
    test_features: Float[Tensor, "m features"],
    test_labels: Int[Tensor, " m"],
    k: int = 20,
) -> float:
    """Test accuracy of the k nearest neighbours in cosine distance, on standardised features."""
    from sklearn.neighbors import KNeighborsClassifier

    model = KNeighborsClassifier(min(k, len(features)), metric="cosine")
    return _probe(model, features, labels, test_features, test_labels)


def few_per_class(labels: Int[Tensor, " n"], k: int, seed: int = 0) -> Int[Tensor, " chosen"]:
    """Positions of k samples of each class, drawn with `seed`; raises DataError if a class has fewer."""
    generator = torch.Generator().manual_seed(seed)
    chosen = []
    for label in labels.unique().tolist():
        where = (labels == label).nonzero().flatten()
        require(len(where) >= k, f"class {label} has {len(where)} samples, fewer than {k}", DataError)
        chosen.append(where[torch.randperm(len(where), generator=generator)[:k]])
    return torch.cat(chosen)


def _probe(model: Any, features: Tensor, labels: Tensor, test_features: Tensor, test_labels: Tensor) -> float:
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    require(bool(torch.isfinite(features).all() and torch.isfinite(test_features).all()),
            "the features are not finite: the encoder has diverged", DataError)
    require(len(features) == len(labels) and len(test_features) == len(test_labels),
            f"{len(features)} and {len(test_features)} features for {len(labels)} and {len(test_labels)} labels",
            DataError)
    pipeline = make_pipeline(StandardScaler(), model).fit(features.double().numpy(), labels.numpy())
    return float(pipeline.score(test_features.double().numpy(), test_labels.numpy()))
