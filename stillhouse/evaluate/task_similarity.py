"""How well a model made for one task suits another, from its outputs on a few labelled samples of the other, without
training: scores by which source models are ranked."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from stillhouse.data.sets import fetch
from stillhouse.data.variants import balanced_indices
from stillhouse.errors import DataError, RoleError, require
from stillhouse.measures.relations import cka, distances
from stillhouse.parts.feature_taps import feature_tap
from stillhouse.run import frozen

Similarity = Literal["parc", "rsa", "cka", "logme", "leep", "nce"]
LOG_LIKELIHOODS = ("logme", "leep", "nce")
"""Scores that are mean log-likelihoods per sample: mostly negative, and only their differences mean something."""


def task_similarity(
    features: Float[Tensor, "n width"],
    logits: Float[Tensor, "n source_classes"],
    label: Int[Tensor, " n"],
    kind: Similarity = "parc",
    components: int | None = 32,
    subsets: int = 1,
    per_class: int | None = None,
    seed: int = 0,
) -> float:
    """The score of a source model with these outputs on samples with the target's labels: higher is better.

    "parc", "rsa", "cka" and "logme" compare its features with the labels, "leep" and "nce" its predictions in its own
    classes. Features of more than `components` dimensions are reduced by PCA before (None: never). The mean over
    `subsets` random class-balanced samples of `per_class` of each class, or once over all samples where `per_class` is
    None; `seed` draws the subsets.

    Raises DataError for values that are not finite, fewer than two classes, or a class with too few samples.
    """
    require(kind in get_args(Similarity), f"similarity is one of {', '.join(get_args(Similarity))}, not {kind!r}")
    require(len(features) == len(logits) == len(label), f"{len(features)} features and {len(logits)} logits for "
            f"{len(label)} labels", DataError)
    require(bool(torch.isfinite(features).all() and torch.isfinite(logits).all()), "the model's outputs are not finite",
            DataError)
    features, logits, label = features.detach().cpu().double(), logits.detach().cpu().double(), label.cpu()
    require(len(label.unique()) >= 2, "a task needs labels of two classes or more", DataError)
    chosen = [torch.arange(len(label))]
    if per_class is not None:
        chosen = [balanced_indices(label, per_class, seed + i) for i in range(subsets)]
    scores = []
    for where in chosen:
        y = label[where].unique(return_inverse=True)[1]
        if kind in ("leep", "nce"):
            scores.append(BY_PREDICTIONS[kind](logits[where], y))
        else:
            scores.append(BY_FEATURES[kind](reduced(features[where], components), y))
    return math.fsum(scores) / len(scores)


@torch.no_grad()
def source_outputs(source: nn.Module, data: Any, where: str = "penultimate", batch: int = 256,
                   device: torch.device | str = "cpu") -> tuple[Float[Tensor, "n width"], Float[Tensor, "n classes"]]:
    """Features (what `stillhouse.parts.feature_taps` reads at `where`) and logits of a whole set, on the CPU; the model
    in eval mode and left as it was. Raises RoleError where it has no such feature."""
    features, logits = [], []
    with frozen(source), feature_tap(source, where) as tap:
        for start in range(0, len(data), batch):
            image = fetch(data, range(start, min(start + batch, len(data))))["image"].to(device)
            logits.append(source(image).float().cpu())
            features.append(tap().float().cpu())
    require(logits[0].dim() == 2, f"a source gives class logits, not {tuple(logits[0].shape)}", RoleError)
    return torch.cat(features), torch.cat(logits)


def reduced(features: Float[Tensor, "n width"], components: int | None) -> Float[Tensor, "n kept"]:
    """Principal components, where there are more dimensions than that; with fewer samples as many as they allow."""
    if components is None or features.shape[1] <= components:
        return features
    centred = features - features.mean(0)
    u, s, _ = torch.linalg.svd(centred, full_matrices=False)
    return u[:, :components] * s[:components]


# -------------------------------------------------------------------- from features


def parc(features: Float[Tensor, "n width"], label: Int[Tensor, " n"]) -> float:
    """Pairwise annotation representation comparison (Bolya et al. 2021, section 3.3), without its factor of 100: the
    Spearman correlation of 1 - Pearson between the samples' features and of 1 - Pearson between their one-hot labels,
    over the pairs. 1 where the features are the labels; in [-1, 1]."""
    return _rank_correlation(1 - _pearson(features), 1 - _pearson(one_hot(label).to(features)))


def rsa(features: Float[Tensor, "n width"], label: Int[Tensor, " n"]) -> float:
    """Representational similarity analysis (Kriegeskorte et al. 2008) against the labels: as `parc`, with Euclidean
    distances between features."""
    return _rank_correlation(distances(features), 1 - _pearson(one_hot(label).to(features)))


def label_cka(features: Float[Tensor, "n width"], label: Int[Tensor, " n"]) -> float:
    """Linear centred kernel alignment between features and one-hot labels, in [0, 1]; never 0 by chance at small n."""
    return cka(features, one_hot(label).to(features)).item()


def logme(features: Float[Tensor, "n width"], label: Int[Tensor, " n"], iterations: int = 50) -> float:
    """Log of maximum evidence (You et al. 2021, section 4): per class, the evidence of a Bayesian linear model of its
    0/1 label, p(y | F) with prior precision alpha and noise precision beta at their best; per sample, the mean over
    the classes. In nats."""
    n, width = features.shape
    u, s, _ = torch.linalg.svd(features, full_matrices=False)
    sigma = s.square()
    total = 0.0
    targets = one_hot(label).to(features).T
    for y in targets:
        z = (u.T @ y).square()
        outside = (y.square().sum() - z.sum()).clamp_min(0)
        alpha, beta = torch.ones((), dtype=features.dtype), torch.ones((), dtype=features.dtype)
        for step in range(iterations):
            shrink = alpha / (alpha + beta * sigma)
            gamma = (1 - shrink).sum()
            m = (beta**2 * sigma * z / (alpha + beta * sigma).square()).sum()
            error = (shrink.square() * z).sum() + outside
            if step == iterations - 1:
                break
            alpha, beta = gamma / m.clamp_min(1e-12), (n - gamma) / error.clamp_min(1e-12)
            alpha, beta = alpha.clamp(1e-9, 1e9), beta.clamp(1e-9, 1e9)
        evidence = (width * alpha.log() + n * beta.log() - (alpha + beta * sigma).log().sum()
                    - (width - len(sigma)) * alpha.log() - beta * error - alpha * m - n * math.log(2 * math.pi)) / 2
        total += evidence.item() / n
    return total / len(targets)


# -------------------------------------------------------------------- from predictions


def leep(logits: Float[Tensor, "n source_classes"], label: Int[Tensor, " n"]) -> float:
    """Log expected empirical prediction (Nguyen et al. 2020, equation 2): mean log sum_z P(y | z) theta(x)_z, theta the
    source's probabilities and P(y | z) their empirical joint with the labels. At most 0, in nats."""
    theta = logits.softmax(1)
    joint = one_hot(label).to(theta).T @ theta / len(theta)
    given = joint / joint.sum(0).clamp_min(torch.finfo(theta.dtype).tiny)
    return (given[label] * theta).sum(1).log().mean().item()


def nce(logits: Float[Tensor, "n source_classes"], label: Int[Tensor, " n"]) -> float:
    """Negative conditional entropy -H(Y | Z) (Tran et al. 2019), Z the source's most probable class. At most 0."""
    joint = one_hot(label).to(logits).T @ F.one_hot(logits.argmax(1), logits.shape[1]).to(logits) / len(logits)
    return (torch.special.xlogy(joint, joint).sum() - torch.special.xlogy(joint.sum(0), joint.sum(0)).sum()).item()


BY_FEATURES: dict[str, Callable[[Tensor, Tensor], float]] = {"parc": parc, "rsa": rsa, "cka": label_cka, "logme": logme}
BY_PREDICTIONS: dict[str, Callable[[Tensor, Tensor], float]] = {"leep": leep, "nce": nce}


def one_hot(label: Int[Tensor, " n"]) -> Float[Tensor, "n classes"]:
    return F.one_hot(label).double()


def _pearson(rows: Tensor) -> Tensor:
    """Pearson correlation of every row with every row; 0 with a row that is constant."""
    centred = rows - rows.mean(1, keepdim=True)
    norm = centred.norm(dim=1, keepdim=True)
    unit = torch.where(norm > 1e-12 * rows.norm(dim=1, keepdim=True), centred / norm, torch.zeros_like(centred))
    return unit @ unit.T


def _rank_correlation(a: Tensor, b: Tensor) -> float:
    """Spearman's, over the pairs below the diagonal, equal values with their mean rank; 0 where one side is constant.
    Values are rounded to ten digits of the largest, so that equal ones rank as equal."""
    from scipy.stats import rankdata

    row, column = torch.tril_indices(len(a), len(a), -1)
    sides = []
    for matrix in (a, b):
        values = matrix[row, column]
        values = (values / values.abs().amax().clamp_min(1e-300)).round(decimals=10)
        rank = torch.from_numpy(rankdata(values.numpy()))
        sides.append(rank - rank.mean())
    norm = sides[0].norm() * sides[1].norm()
    return (sides[0] @ sides[1] / norm).item() if norm > 0 else 0.0


def power_weights(scores: Float[Tensor, " sources"], power: float) -> Float[Tensor, " sources"]:
    """max(e_s, 0)^p over their sum (Borup et al. 2023): 0 for a score that is not positive, p = 0 the same for all
    others, p = inf all for the highest. Where no score is positive all sources weigh the same, with a warning."""
    require(power >= 0, f"power must be 0 or more, not {power}")
    require(scores.dim() == 1 and len(scores) >= 1 and bool(torch.isfinite(scores).all()),
            f"scores must be finite, one for each source, got {scores.tolist()}", DataError)
    positive = scores > 0
    if not positive.any():
        warnings.warn("no source has a positive similarity to the task, so all weigh the same", stacklevel=2)
        return torch.full_like(scores, 1 / len(scores))
    weights = torch.where(positive, (scores / scores.max()).clamp_min(0) ** power, 0.0)
    return weights / weights.sum()
