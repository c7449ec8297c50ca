"""Supervised fine-tuning of a language model, and a set of a model's own answers (for sequence-level distillation).

The other baselines of language distillation are settings of one loop, `systems.language.distillm`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from stillhouse.data.sets import TensorSet
from stillhouse.errors import DataError, require
from stillhouse.evaluate.text import answer_all, language_loss
from stillhouse.measures.language import next_token_loss
from stillhouse.parts.best import Best
from stillhouse.protocols import OFFERS, CausalLM, TokenPairs
from stillhouse.run import Run, begin, frozen, set_lr
from stillhouse.run.check import first_batch
from stillhouse.run.schedules import cosine


@dataclass(frozen=True)
class FineTune:
    """Settings of `fine_tune`."""

    steps: int = 500  # optimizer steps
    batch: int = 128  # sequences a step
    lr: float = 5e-4  # peak learning rate, cosine to 0
    weight_decay: float = 0.01  # of AdamW
    clip: float = 1.0  # global gradient norm
    validate_every: int = 0  # steps between validations, 0: once an epoch


def check_pairs(role: str, data: TokenPairs) -> None:
    """Raise DataError unless `data` has the fields of TokenPairs and every one of its first sequences a target."""
    batch = first_batch(data, OFFERS[TokenPairs])
    require(bool((batch["target_mask"][:, 1:].sum(1) > 0).all()),
            f"{role}: a sequence has no target token after its first position (target_mask is 0), so there is nothing "
            "to learn from it", DataError)


def fine_tune(
    student: CausalLM, data: TokenPairs, validation: TokenPairs | None = None, config: FineTune = FineTune(),
    run: Run | None = None,
) -> nn.Module:
    """Next-token cross-entropy on the responses, mean over tokens; with `validation`, the best checkpoint by its loss.

    Trained in place and returned. Raises DataError or RoleError before any step for data or a model that do not fit.
    """
    run = begin(run)
    check_pairs("data", data)
    run.check(CausalLM, data, student=student)
    if validation is not None:
        check_pairs("validation", validation)
        run.check(CausalLM, validation, student=student)
    assert isinstance(student, nn.Module)
    student.train()
    optimizer = adamw(student, config.lr, config.weight_decay)
    best = Best()
    for batch in run.loop("fine-tune", data, batch=config.batch, steps=config.steps, student=student,
                          optimizer=optimizer, best=best):
        set_lr(optimizer, config.lr * cosine(run.progress))
        logits = student(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        run.update(optimizer, clip=config.clip,
                   ce=run.mean(*next_token_loss(logits, batch["input_ids"], batch["target_mask"])))
        if validation is not None and due(run, config.validate_every):
            with run.aside("validate", student):
                loss = language_loss(student, validation)
            run.log(validation=loss)
            best.offer(-loss, student)
    best.restore(student)
    return student


def adamw(model: nn.Module, lr: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW over what is trained (with LoRA, the adapters)."""
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr, weight_decay=weight_decay)


def due(run: Run, every: int) -> bool:
    """Whether this step ends a period of `every` steps (0: an epoch) or the stage."""
    return run.k + 1 == run.steps or (run.last_of_epoch if every == 0 else (run.k + 1) % every == 0)


def answered_by(teacher: Any, data: TokenPairs, max_new_tokens: int, run: Run | None = None) -> TensorSet:
    """The prompts of `data` with the teacher's own sampled responses: the training set of SeqKD (Kim and Rush 2016)."""
    run = begin(run)
    with frozen(teacher):
        return TensorSet(**run.once("answers", lambda: answer_all(teacher, data, max_new_tokens)))
