"""How good generated text is: ROUGE-L, a teacher's likelihood of it, and the exact judge of the toy grammar."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from stillhouse.data import grammar as toy
from stillhouse.data.sets import fetch
from stillhouse.data.text import response_ids, widened
from stillhouse.errors import DataError, MissingExtraError, require
from stillhouse.measures.language import language_cross_entropy, next_token_loss
from stillhouse.models.language import next_tokens, respond, special_tokens
from stillhouse.run.reading import to_device


class _Words:
    def tokenize(self, text: str) -> list[str]:
        return text.split()


def rouge_l(predictions: Sequence[str], references: Sequence[str | Sequence[str]], by_words: bool = False) -> float:
    """Mean ROUGE-L F-measure (Lin 2004; the package `rouge-score`), over several references the best one's.

    `by_words` splits at spaces only, for texts that are not English. Raises DataError for unequal lengths or nothing
    to score, MissingExtraError without `rouge-score`.
    """
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise MissingExtraError("ROUGE-L needs rouge-score: pip install 'stillhouse[hf]'") from error
    require(len(predictions) == len(references) > 0, f"{len(predictions)} predictions and {len(references)} references:"
            " give as many of both, at least one", DataError)
    scorer = RougeScorer(["rougeL"], tokenizer=_Words() if by_words else None)
    targets = [[r] if isinstance(r, str) else list(r) for r in references]
    scores = [scorer.score_multi(t, p)["rougeL"].fmeasure for t, p in zip(targets, predictions, strict=True)]
    return sum(scores) / len(scores)


def rouge_l_ids(predictions: Sequence[Sequence[int]], references: Sequence[Sequence[int]]) -> float:
    """ROUGE-L over token ids, for when there is no tokenizer at hand."""
    texts = [[" ".join(map(str, row)) for row in rows] for rows in (predictions, references)]
    return rouge_l(texts[0], texts[1], by_words=True)


def _batches(data: Any, batch: int, device: torch.device) -> Any:
    for start in range(0, len(data), batch):
        yield to_device(fetch(data, range(start, min(start + batch, len(data)))), device)


def _device(model: Any) -> torch.device:
    return next(model.parameters()).device


@torch.no_grad()
def language_loss(model: Any, data: Any, batch: int = 64, whole_logits: bool = True) -> float:
    """Mean next-token cross-entropy (nats a token) of the targets of a TokenPairs set.

    Without `whole_logits` those of all positions are never held where the model allows it (`next_tokens`).
    """
    total = count = 0.0
    for part in _batches(data, batch, _device(model)):
        if not whole_logits:
            loss, tokens = language_cross_entropy(next_tokens(model, part), part["input_ids"], part["target_mask"])
            total, count = total + loss.item(), count + tokens.item()
            continue
        logits = model(input_ids=part["input_ids"], attention_mask=part["attention_mask"]).logits
        loss, tokens = next_token_loss(logits, part["input_ids"], part["target_mask"])
        total, count = total + loss.item(), count + tokens.item()
    require(count > 0, "no token of the data is a target (target_mask is 0 everywhere)", DataError)
    return total / count


def answer_all(model: Any, data: Any, max_new_tokens: int, batch: int = 64, sample: bool = True
               ) -> dict[str, Tensor]:
    """The model's responses to every prompt of a TokenPairs set, as one batch padded on the right."""
    eos, pad = special_tokens(model)
    parts = [respond(model, part, max_new_tokens, eos=eos, pad=pad, sample=sample)
             for part in _batches(data, batch, _device(model))]
    width = max(part["input_ids"].shape[1] for part in parts)
    wide = [widened(part, width, pad) for part in parts]
    return {name: torch.cat([part[name] for part in wide]) for name in wide[0]}


def response_rouge(model: Any, data: Any, max_new_tokens: int, batch: int = 64, sample: bool = True) -> float:
    """ROUGE-L (over token ids) of the model's responses against those of a TokenPairs set."""
    eos, _ = special_tokens(model)
    given = answer_all(model, data, max_new_tokens, batch, sample)
    references = [row for part in _batches(data, batch, torch.device("cpu")) for row in response_ids(part, eos)]
    return rouge_l_ids(response_ids(given, eos), references)


@torch.no_grad()
def teacher_nll(teacher: Any, batch: Mapping[str, Tensor]) -> float:
    """Mean negative log-likelihood (nats a token) that the teacher gives to the responses of a batch."""
    logits = teacher(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    loss, count = next_token_loss(logits, batch["input_ids"], batch["target_mask"])
    return (loss / count).item()


def judge_grammar(model: Any, teacher: Any, data: Any) -> dict[str, float]:
    """Sampled answers to the prompts of a `grammar` set, judged.

    `rouge_l` is against the nearest of all correct answers, `rouge_l_one` against the single one that the set holds;
    further the shares of grammatical and of correct answers, the teacher's NLL (nats a token) and tokens per answer.
    """
    given = answer_all(model, data, toy.LONGEST_ANSWER, batch=256)
    whole = fetch(data, range(len(data)))
    before = whole["attention_mask"] - whole["target_mask"]
    answers, references = ([toy.decode(ids) for ids in response_ids(batch)] for batch in (given, whole))
    prompts = [toy.decode(ids)[1:-1] for ids in response_ids({**whole, "target_mask": before})]
    correct = [toy.is_correct(*pair) for pair in zip(prompts, answers, strict=True)]
    nearest = [[" ".join(a) for a in ([answer] if right else toy.answers(prompt))]
               for prompt, answer, right in zip(prompts, answers, correct, strict=True)]
    texts = [" ".join(answer) for answer in answers]
    return {
        "rouge_l": rouge_l(texts, nearest, by_words=True),
        "rouge_l_one": rouge_l(texts, [" ".join(r) for r in references], by_words=True),
        "grammatical": sum(map(toy.is_grammatical, answers)) / len(answers),
        "correct": sum(correct) / len(answers),
        "teacher_nll": teacher_nll(teacher, given),
        "answer_tokens": given["target_mask"].sum().item() / len(answers),
    }
