"""Token losses of causal language models, as (sum, count) over the target tokens.

The logits at position t are compared at the token t + 1, where `target_mask` says so. Returning the sum and the count
lets `run.mean(sum, count)` average over the tokens of all processes; `sum / count` is the mean on one. Only the target
positions are turned into probabilities, so padding and prompts cost no memory.

Where a model's last hidden states and its output projection are known (`Hidden`, from `models.language.next_tokens`),
`language_divergence` and `language_cross_entropy` never form the logits of all positions either.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from stillhouse.errors import DataError, RoleError, require
from stillhouse.measures.projected import (
    Kind,
    plain_divergence,
    projected_cross_entropy,
    projected_divergence,
    projected_topk_divergence,
    same_vocabulary,
    topk_divergence,
)

Ids = Int[Tensor, "batch length"]


class Hidden(NamedTuple):
    """What a model says of the token after each position: softmax(weight @ hidden)."""

    hidden: Float[Tensor, "batch length d"]
    weight: Float[Tensor, "vocabulary d"]

    @property
    def vocabulary(self) -> int:
        return len(self.weight)


class Logits(NamedTuple):
    """The same where only the logits are known."""

    logits: Float[Tensor, "batch length vocabulary"]

    @property
    def vocabulary(self) -> int:
        return self.logits.shape[-1]


class TopK(NamedTuple):
    """The same where the log-probabilities of the k likeliest tokens are known (`protocols.TopKTeacher`)."""

    log_p: Float[Tensor, "batch length k"]
    tokens: Int[Tensor, "batch length k"]
    vocabulary: int


NextTokens = Hidden | Logits | TopK


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


def language_divergence(teacher: NextTokens, student: Hidden | Logits, target_mask: Tensor, kind: Kind = "kl",
                        alpha: float = 0.5) -> tuple[Tensor, Tensor]:
    """A divergence (`measures.projected.Kind`) between two models at the target tokens: (sum, count).

    Without logits of all positions where both are `Hidden`. Of a `TopK` teacher the known tokens and one outcome for
    all others are compared, at most the whole divergence; positions of which it knows nothing are left out and not
    counted. Raises RoleError, naming both sizes, if the vocabularies differ.
    """
    same_vocabulary(teacher.vocabulary, student.vocabulary, RoleError)
    where = _positions(student[0].shape[1], target_mask)
    _positions(teacher[0].shape[1], target_mask)
    if isinstance(teacher, TopK):
        where = where & (teacher.log_p[:, :-1] > -torch.inf).any(-1)
    chosen = student[0][:, :-1][where]
    if isinstance(teacher, Hidden) and isinstance(student, Hidden):
        loss = projected_divergence(teacher.hidden[:, :-1][where], teacher.weight, chosen, student.weight, kind, alpha,
                                    reduction="sum")
        return loss, where.sum()
    if isinstance(teacher, TopK):
        log_p, tokens = (side[:, :-1][where].to(chosen.device) for side in (teacher.log_p, teacher.tokens))
        loss = (projected_topk_divergence(log_p, tokens, chosen, student.weight, kind, alpha, reduction="sum")
                if isinstance(student, Hidden) else
                topk_divergence(log_p, tokens, chosen, kind, alpha, reduction="sum"))
        return loss, where.sum()
    known, ours = (side[0][:, :-1][where] @ side.weight.T if isinstance(side, Hidden) else side[0][:, :-1][where]
                   for side in (teacher, student))
    return plain_divergence(kind, alpha)(known, ours, reduction="sum"), where.sum()


def language_cross_entropy(
    student: Hidden | Logits, input_ids: Ids, target_mask: Tensor
) -> tuple[Tensor, Tensor]:
    """`next_token_loss` without logits of all positions where the model is `Hidden`: (sum in nats, count)."""
    if isinstance(student, Logits):
        return next_token_loss(student.logits, input_ids, target_mask)
    where = _positions(student.hidden.shape[1], target_mask)
    loss = projected_cross_entropy(input_ids[:, 1:][where], student.hidden[:, :-1][where], student.weight,
                                   reduction="sum")
    return loss, where.sum()


def sequence_nll(
    logits: Float[Tensor, "batch length vocabulary"], input_ids: Ids, target_mask: Tensor
) -> Float[Tensor, " batch"]:
    """-log p(targets | what precedes them) of each sequence, in nats."""
    where = _positions(logits.shape[1], target_mask)
    each = F.cross_entropy(logits[:, :-1].transpose(1, 2), input_ids[:, 1:], reduction="none")
    return torch.where(where, each, torch.zeros_like(each)).sum(1)
