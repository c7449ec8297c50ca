"""Prompt and response in one sequence: packing a user's text, cutting out prompts, attaching new responses.

A packed set has `input_ids`, `attention_mask` and `target_mask` [n, length], padded on the right. `target_mask` is 1 on
the tokens that a loss is taken on: the response and its end of sequence.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from stillhouse.data.sets import TensorSet, fetch
from stillhouse.errors import DataError, require


def pack_pairs(
    pairs: Sequence[tuple[str, str]], tokenizer: Any, length: int = 512, prompt_length: int = 256
) -> TensorSet:
    """(prompt, response) texts as a TokenPairs set, by a `transformers` tokenizer; apply your template beforehand.

    Prompts keep their last `prompt_length` tokens at most, responses end with the tokenizer's end of sequence unless
    they are cut off at `length`. Raises DataError for no pairs, an empty prompt or response, or a tokenizer without an
    end of sequence.
    """
    require(len(pairs) > 0, "no pairs were given", DataError)
    require(0 < prompt_length < length, f"prompt_length ({prompt_length}) must leave room for a response in {length}",
            DataError)
    eos = tokenizer.eos_token_id
    require(eos is not None, f"{type(tokenizer).__name__} has no eos_token, so responses could not end; set one",
            DataError)
    rows = []
    for i, (prompt, response) in enumerate(pairs):
        before = [int(t) for t in tokenizer(prompt)["input_ids"]]
        if before and before[-1] == eos:
            before.pop()
        after = [int(t) for t in tokenizer(response, add_special_tokens=False)["input_ids"]]
        require(bool(before), f"the prompt of pair {i} is empty", DataError)
        require(bool(after), f"the response of pair {i} is empty", DataError)
        before = before[-prompt_length:]
        rows.append((before, [*after, eos][: length - len(before)]))
    pad = tokenizer.pad_token_id
    return pack_ids(rows, eos if pad is None else pad)


def pack_ids(rows: Sequence[tuple[Sequence[int], Sequence[int]]], pad: int, length: int | None = None) -> TensorSet:
    """(prompt ids, response ids) as a TokenPairs set, padded on the right to `length` (or to the longest)."""
    require(len(rows) > 0, "no sequences were given", DataError)
    longest = max(len(a) + len(b) for a, b in rows)
    width = longest if length is None else length
    require(longest <= width, f"the longest sequence has {longest} tokens, more than length={width}", DataError)
    ids = torch.full((len(rows), width), pad)
    attention, target = torch.zeros_like(ids), torch.zeros_like(ids)
    for i, (before, after) in enumerate(rows):
        end = len(before) + len(after)
        ids[i, :end] = torch.tensor([*before, *after])
        attention[i, :end] = 1
        target[i, len(before) : end] = 1
    return TensorSet(input_ids=ids, attention_mask=attention, target_mask=target)


def pack_plain(texts: Iterable[str], tokenizer: Any, length: int = 512) -> TensorSet:
    """Plain texts, joined by ends of sequence and cut into full windows of `length` tokens, every one a target."""
    stream = [token for text in texts for token in plain_ids(text, tokenizer)]
    windows = len(stream) // length
    require(windows > 0, f"{len(stream)} tokens of plain text do not fill one window of {length}", DataError)
    ids = torch.tensor(stream[: windows * length]).view(windows, length)
    return TensorSet(input_ids=ids, attention_mask=torch.ones_like(ids), target_mask=torch.ones_like(ids))


def plain_ids(text: str, tokenizer: Any) -> list[int]:
    """The tokens of a text and the end of sequence after it."""
    return [*(int(t) for t in tokenizer(text, add_special_tokens=False)["input_ids"]), tokenizer.eos_token_id]


def tokenised_texts(
    texts: Sequence[str], tokenizer: Any, length: int = 512, labels: Tensor | None = None
) -> TensorSet:
    """One row of `input_ids` and `attention_mask` [n, longest] per text, by a `transformers` tokenizer with its special
    tokens; longer texts are cut to `length` tokens, shorter ones padded on the right. `labels` [n] become `label`.

    Raises DataError for no texts, or one without a token.
    """
    ids, mask = _padded(_encoded(texts, tokenizer, length), _padding(tokenizer))
    return TensorSet(input_ids=ids, attention_mask=mask, **({} if labels is None else {"label": labels}))


def tokenised_targets(pairs: Sequence[tuple[str, str]], tokenizer: Any, length: int = 512) -> TensorSet:
    """(source, target) texts as a SourceTargets set: `input_ids`, `attention_mask`, and `target_ids` with -100 after
    the target's end. Both are cut to `length` tokens. Raises DataError as `tokenised_texts`."""
    ids, mask = _padded(_encoded([source for source, _ in pairs], tokenizer, length), _padding(tokenizer))
    target, _ = _padded(_encoded([target for _, target in pairs], tokenizer, length, as_target=True), -100)
    return TensorSet(input_ids=ids, attention_mask=mask, target_ids=target)


def _encoded(texts: Sequence[str], tokenizer: Any, length: int, as_target: bool = False) -> list[list[int]]:
    require(len(texts) > 0, "no texts were given", DataError)
    require(length >= 1, f"length must be at least 1, not {length}", DataError)
    given: dict[str, Any] = {"text_target" if as_target else "text": list(texts)}
    rows = tokenizer(**given, truncation=True, max_length=length)["input_ids"]
    empty = next((i for i, row in enumerate(rows) if not len(row)), None)
    require(empty is None, f"text {empty} has no tokens", DataError)
    return [[int(t) for t in row] for row in rows]


def _padding(tokenizer: Any) -> int:
    pad = tokenizer.pad_token_id
    pad = tokenizer.eos_token_id if pad is None else pad
    return 0 if pad is None else int(pad)


def _padded(rows: Sequence[Sequence[int]], pad: int) -> tuple[Tensor, Tensor]:
    ids = torch.full((len(rows), max(map(len, rows))), pad)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
        mask[i, : len(row)] = 1
    return ids, mask


def left_padded_prompts(batch: Mapping[str, Tensor], pad: int) -> tuple[Tensor, Tensor]:
    """Ids and attention mask [batch, longest prompt] of what comes before the first target, padded on the left.

    Raises DataError if a sequence has no prompt.
    """
    ids, real = batch["input_ids"], batch["attention_mask"].bool()
    before = real & (batch["target_mask"].cumsum(1) == 0)
    lengths = before.sum(1)
    require(bool((lengths > 0).all()), "a sequence begins with a target: there is no prompt to answer", DataError)
    width = int(lengths.max())
    order = torch.argsort(before.long(), dim=1, stable=True)[:, ids.shape[1] - width :]
    mask = before.gather(1, order)
    return ids.gather(1, order).masked_fill(~mask, pad), mask.long()


def attach_responses(
    prompts: Tensor, prompt_mask: Tensor, responses: Tensor, eos: Sequence[int], pad: int
) -> dict[str, Tensor]:
    """Left-padded prompts and what was generated after them, as one right-padded batch with masks.

    A response ends with its first id among `eos`, inclusive; the padding id may be one of them.
    """
    ends = torch.isin(responses, torch.tensor(list(eos), device=responses.device))
    within = ends.cumsum(1) - ends.long() == 0
    real = torch.cat([prompt_mask.bool(), within], 1)
    target = torch.cat([torch.zeros_like(prompt_mask, dtype=torch.bool), within], 1)
    order = torch.argsort((~real).long(), dim=1, stable=True)
    real, target = real.gather(1, order), target.gather(1, order)
    ids = torch.cat([prompts, responses], 1).gather(1, order).masked_fill(~real, pad)
    return {"input_ids": ids, "attention_mask": real.long(), "target_mask": target.long()}


def widened(batch: Mapping[str, Tensor], width: int, pad: int) -> dict[str, Tensor]:
    """The three fields of a batch, padded on the right to `width`."""
    return {name: functional.pad(batch[name], (0, width - batch[name].shape[1]), value=value)
            for name, value in {"input_ids": pad, "attention_mask": 0, "target_mask": 0}.items()}


def trimmed(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A right-padded batch without the columns that are padding everywhere."""
    width = max(int(batch["attention_mask"].sum(1).max()), 1)
    return {name: batch[name][:, :width] for name in ("input_ids", "attention_mask", "target_mask")}


def longest_prompt(data: Any) -> int:
    """Tokens before the first target, at most: over a set in memory, or over its first items."""
    batch = data.data if isinstance(data, TensorSet) else fetch(data, range(min(len(data), 64)))
    before = batch["attention_mask"].bool() & (batch["target_mask"].cumsum(1) == 0)
    return int(before.sum(1).max())


def response_ids(batch: Mapping[str, Tensor], eos: Sequence[int] = ()) -> list[list[int]]:
    """The target tokens of each sequence, without the ids in `eos`."""
    return [[t for t in row[keep.bool()].tolist() if t not in eos]
            for row, keep in zip(batch["input_ids"], batch["target_mask"], strict=True)]
