"""Contrastive losses. All normalise their inputs; `temperature` divides the cosine similarity.

Over several processes, gather both sides first (`run.gather`): then every process computes the loss of the whole batch.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from stillhouse.errors import ConfigError, DataError, require
from stillhouse.measures.divergences import Reduction, reduce_samples


def info_nce(
    query: Float[Tensor, "n features"],
    positive: Float[Tensor, "n features"],
    negatives: Float[Tensor, "m features"] | Float[Tensor, "n m features"] | None = None,
    queue: Float[Tensor, "q features"] | None = None,
    temperature: float = 0.1,
    weight: Float[Tensor, " n"] | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """InfoNCE: -log of the positive's share among positive and negatives (van den Oord et al. 2018, equation 4).

    Without `negatives` and `queue` the other queries' positives are the negatives. `negatives` [m, d] are shared by all
    queries, [n, m, d] are each query's own; `queue` [q, d] (MoCo, He et al. 2020, equation 1) adds shared ones.
    Raises DataError if query and positive differ in shape, ConfigError for a temperature of 0 or less.
    """
    _check(query, positive, temperature)
    q, k = F.normalize(query, dim=-1), F.normalize(positive, dim=-1)
    if negatives is None and queue is None:
        logits, target = q @ k.T, torch.arange(len(q), device=q.device)
    else:
        columns = [(q * k).sum(-1, keepdim=True)]
        if negatives is not None:
            n = F.normalize(negatives, dim=-1)
            columns.append(torch.einsum("nd,nmd->nm", q, n) if n.dim() == 3 else q @ n.T)
        if queue is not None:
            columns.append(q @ F.normalize(queue.to(q), dim=-1).T)
        logits, target = torch.cat(columns, 1), torch.zeros(len(q), dtype=torch.long, device=q.device)
    return reduce_samples(F.cross_entropy(logits / temperature, target, reduction="none"), weight, reduction=reduction)


def nt_xent(
    a: Float[Tensor, "n features"],
    b: Float[Tensor, "n features"],
    temperature: float = 0.1,
    weight: Float[Tensor, " n"] | None = None,
    reduction: Reduction = "mean",
    queue: Float[Tensor, "q features"] | None = None,
) -> Tensor:
    """NT-Xent (Chen et al. 2020, equation 1): 2n x 2n similarities without the diagonal, both directions.

    "none" returns one loss per pair: the mean of its two directions. One pair alone gives 0. `queue` adds negatives
    to all (the memory of SimCLR v2).
    """
    _check(a, b, temperature)
    n = len(a)
    z = F.normalize(torch.cat([a, b]), dim=-1)
    logits = (z @ z.T / temperature).masked_fill(torch.eye(2 * n, dtype=torch.bool, device=z.device), -torch.inf)
    if queue is not None:
        logits = torch.cat([logits, z @ F.normalize(queue.to(z), dim=-1).T / temperature], 1)
    target = torch.arange(2 * n, device=z.device).roll(n)
    losses = F.cross_entropy(logits, target, reduction="none")
    return reduce_samples((losses[:n] + losses[n:]) / 2, weight, reduction=reduction)


def clip_loss(
    a: Float[Tensor, "n features"],
    b: Float[Tensor, "n features"],
    scale: float | Float[Tensor, ""] = 1 / 0.07,
    weight: Float[Tensor, " n"] | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """Symmetric InfoNCE between two modalities (Radford et al. 2021, figure 3); `scale` is 1/temperature."""
    _check(a, b, 1.0)
    logits = F.normalize(a, dim=-1) @ F.normalize(b, dim=-1).T * scale
    target = torch.arange(len(a), device=a.device)
    both = F.cross_entropy(logits, target, reduction="none") + F.cross_entropy(logits.T, target, reduction="none")
    return reduce_samples(both / 2, weight, reduction=reduction)


def supervised_contrastive(
    features: Float[Tensor, "n features"],
    labels: Int[Tensor, " n"] | None = None,
    positives: Bool[Tensor, "n n"] | None = None,
    temperature: float = 0.1,
    weight: Float[Tensor, " n"] | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """Supervised contrastive loss, mean outside the logarithm (Khosla et al. 2020, equation 2).

    Positives are the samples of the same label, or those marked in `positives`; the sample itself never counts. A
    sample without a positive contributes 0 and is left out of the mean. No hidden factor tau / 0.07.
    """
    require((labels is None) != (positives is None), "give either labels or positives")
    _check(features, features, temperature)
    itself = torch.eye(len(features), dtype=torch.bool, device=features.device)
    if labels is not None:
        positives = labels[:, None] == labels[None, :]
    assert positives is not None
    positives = positives & ~itself
    z = F.normalize(features, dim=-1)
    logits = (z @ z.T / temperature).masked_fill(itself, -torch.inf)
    log_share = (logits - logits.logsumexp(1, keepdim=True)).masked_fill(~positives, 0.0)
    count = positives.sum(1)
    losses = -log_share.sum(1) / count.clamp_min(1)
    return reduce_samples(losses, weight, count > 0, reduction)


def _check(a: Tensor, b: Tensor, temperature: float) -> None:
    require(a.dim() == 2 and a.shape == b.shape, "a contrastive loss takes two feature matrices [n, features] of equal "
            f"shape; got {tuple(a.shape)} and {tuple(b.shape)}", DataError)
    require(temperature > 0, f"temperature must be above 0, not {temperature}", ConfigError)
