"""Latent label shift: domains in which p(y | d) differs and p(x | y) does not. W [k, r] is p(y | d), a column a domain.

Domains are weighted alike, p(d) = 1 / r. From p(d | x) = sum_y p(d | y) p(y | x) follows the posterior of the classes.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from stillhouse.errors import DataError, require


def domain_given_class(W: Float[Tensor, "k r"]) -> Float[Tensor, "r k"]:
    """p(d | y), the columns summing to 1: Bayes' rule under uniform p(d)."""
    return W.T / W.sum(1).clamp_min(torch.finfo(W.dtype).tiny)


def identified(W: Float[Tensor, "k r"], tolerance: float = 1e-6) -> bool:
    """Whether p(y | x) follows from p(d | x): W has rank k, its smallest singular value above `tolerance` times the
    largest. Otherwise (r < k, or equal classes) the pseudo-inverse gives only one solution among many."""
    if W.shape[0] > W.shape[1]:
        return False
    values = torch.linalg.svdvals(W.double())
    return bool(values[-1] > tolerance * values[0])


def class_posterior(domain: Float[Tensor, "n r"], W: Float[Tensor, "k r"]) -> Float[Tensor, "n k"]:
    """p(y | x) from p(d | x) [n, r]: the pseudo-inverse of p(d | y) applied to it (Roberts et al. 2022, section 5).

    Exact where p(d | x) is and W has rank k; entries may be negative elsewhere (nothing is clipped).
    Raises DataError if the numbers of domains differ.
    """
    require(domain.shape[1] == W.shape[1], f"p(d | x) has {domain.shape[1]} domains, W has {W.shape[1]}", DataError)
    return domain @ torch.linalg.pinv(domain_given_class(W)).T.to(domain)


def adjusted(
    posterior: Float[Tensor, "n k"], W: Float[Tensor, "k r"], domain: Int[Tensor, " n"]
) -> Float[Tensor, "n k"]:
    """p_d(y | x), proportional to p(y | x) p(d | y), for samples whose domain is known.

    Negative entries count as 0; where nothing is left, p_d(y | x) is p(y | d).
    """
    joint = posterior.clamp_min(0) * domain_given_class(W)[domain].to(posterior)
    total = joint.sum(1, keepdim=True)
    return torch.where(total > 0, joint / total.clamp_min(torch.finfo(joint.dtype).tiny), W.T[domain].to(posterior))


def proportion_error(W: Float[Tensor, "k r"], truth: Float[Tensor, "k r"]) -> Tensor:
    """||W - W*||_1 per domain: the sum over classes, the mean over domains; in [0, 2]. Classes must be aligned."""
    return (W - truth).abs().sum(0).mean()
