"""Domains that differ in their class proportions alone, drawn from one labelled set; and styles that mean nothing."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from stillhouse.data.sets import TensorSet
from stillhouse.errors import DataError, require


def dirichlet_proportions(
    classes: int, domains: int, alpha: float = 0.5, condition: float = 8.0, seed: int = 0
) -> Float[Tensor, "classes domains"]:
    """p(y | d), a column a domain, each drawn from Dirichlet(alpha, …, alpha); float64, columns sum to 1.

    The matrix is drawn again until its condition number (largest over smallest singular value) is at most `condition`.
    The same arguments give the same matrix. Raises DataError after 10,000 draws, or for fewer domains than classes.
    """
    require(classes >= 2 and alpha > 0 and condition >= 1, "classes must be 2 or more, alpha above 0 and condition 1 "
            f"or more; got {classes}, {alpha} and {condition}")
    require(domains >= classes, f"{domains} domains cannot tell {classes} classes apart; give at least {classes}",
            DataError)
    random = np.random.default_rng(seed)
    for _ in range(10_000):
        W = random.dirichlet(np.full(classes, alpha), domains).T
        if np.linalg.cond(W) <= condition:
            return torch.from_numpy(W)
    raise DataError(f"no Dirichlet({alpha}) matrix of {classes} classes and {domains} domains had a condition number "
                    f"of {condition} or less in 10,000 draws; raise condition or the number of domains, or lower alpha")


def draw_domains(
    data: TensorSet, proportions: Float[Tensor, "classes domains"], n: int, seed: int = 0, noise: float = 0.0
) -> TensorSet:
    """`n` samples of `data`, equally many of every domain: domain d, then a class of p(y | d), then one of its samples.

    Fields of `data` (whose classes outside of `proportions` are not used), and `domain` int64 [n]. Samples are drawn
    with replacement; `noise` is the standard deviation of fresh noise added to `image`. Raises DataError for a class
    that has weight but no samples.
    """
    domains = proportions.shape[1]
    require(n >= domains, f"n must be at least one sample for each of {domains} domains, not {n}")
    generator = torch.Generator().manual_seed(seed)
    domain = torch.arange(n) % domains
    label = torch.multinomial(proportions.T[domain], 1, generator=generator)[:, 0]
    chosen = torch.empty(n, dtype=torch.long)
    for y in label.unique().tolist():
        members = (data.label == y).nonzero().flatten()
        require(len(members) > 0, f"class {y} has weight in some domain but no samples", DataError)
        where = (label == y).nonzero().flatten()
        chosen[where] = members[torch.randint(len(members), (len(where),), generator=generator)]
    drawn = data.select(chosen).with_fields(domain=domain)
    if noise:
        drawn = drawn.with_fields(image=drawn.image + noise * torch.randn(drawn.image.shape, generator=generator))
    return drawn


def with_styles(data: TensorSet, styles: int = 3, std: float = 2.0, pattern_seed: int = 0, seed: int = 0) -> TensorSet:
    """The same pictures, each with one of `styles` fixed patterns of normal noise (standard deviation `std`) added.

    Which one is independent of everything else and stands in the field `style`. The patterns follow from
    `pattern_seed` alone, so that a test set can have those of the training set.
    """
    require(styles >= 1 and std >= 0, f"styles must be 1 or more and std 0 or more; got {styles} and {std}")
    patterns = std * torch.randn(styles, *data.image.shape[1:], generator=torch.Generator().manual_seed(pattern_seed))
    style = torch.randint(styles, (len(data),), generator=torch.Generator().manual_seed(seed))
    return data.with_fields(image=data.image + patterns[style], style=style)
