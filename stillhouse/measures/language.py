"""Token losses of causal language models, as (sum, count) over the target tokens.

The logits at position t are compared at the token t + 1, where `target_mask` says so. Returning the sum and the count
lets `run.mean(sum, count)` average over the tokens of all processes; `sum / count` is the mean on one. Only the target
positions are turned into probabilities, so padding and prompts cost no memory.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from stillhouse.errors import DataError, RoleError, require

Ids = Int[Tensor, "batch length"]


def _positions(length: int, target_mask: Tensor) -> Tensor:
    require(target_mask.shape[1] == length, f"target_mask covers {target_mask.shape[1]} positions and the logits "
            f"{length}", DataError)
    return target_mask[:, 1:].bool()


def next_token_loss(
    logits: Float[Tensor, "batch length vocabulary"], input_ids: Ids, target_mask: Tensor
) -> tuple[Tensor, Tensor]:
    """Cross-entropy of the target tokens given all before them: (sum in nats, number of target tokens)."""
    where = _positions(logits.shape[1], target_mask)
    chosen = logits[:, :-1][where]
    loss = F.cross_entropy(chosen.float() if chosen.dtype != torch.float64 else chosen, input_ids[:, 1:][where],
                           reduction="sum")
    return loss, where.sum()


def token_divergence(
    measure: Callable[..., Tensor], teacher: Float[Tensor, "batch length vocabulary"],
    student: Float[Tensor, "batch length vocabulary"], target_mask: Tensor,
) -> tuple[Tensor, Tensor]:
    """A divergence between the two models' next-token distributions at the target tokens: (sum, count).

    `measure(p, q, reduction="sum")` is one of `measures.divergences`, teacher first. Raises RoleError, naming both
    sizes, if the vocabularies differ.
    """
    require(teacher.shape[-1] == student.shape[-1], f"the teacher's vocabulary has {teacher.shape[-1]} entries and the "
            f"student's {student.shape[-1]}: token distributions can only be compared over one vocabulary", RoleError)
    where = _positions(student.shape[1], target_mask)
    return measure(teacher[:, :-1][where], student[:, :-1][where], reduction="sum"), where.sum()


def sequence_nll(
    logits: Float[Tensor, "batch length vocabulary"], input_ids: Ids, target_mask: Tensor
) -> Float[Tensor, " batch"]:
    """-log p(targets | what precedes them) of each sequence, in nats."""
    where = _positions(logits.shape[1], target_mask)
    each = F.cross_entropy(logits[:, :-1].transpose(1, 2), input_ids[:, 1:], reduction="none")
    return torch.where(where, each, torch.zeros_like(each)).sum(1)
