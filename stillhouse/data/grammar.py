"""A toy language of instructions whose correct answers are many, with an exact judge.

A prompt is `<bos> TASK noun … <sep>` with one to four nouns of three genders. The task fixes the order in which the
answer names them: `list` as given, `reverse` backwards, `name` any. Beyond that an answer chooses freely

    a style:      "adjective noun adjective noun … verb" or "noun is adjective and noun is adjective … verb",
    an adjective: big, old or red, the same for every noun, its ending agreeing with the noun's gender,
    a verb:       sleep, run or sing, in the singular for one noun, in the plural for more,

and keeps to its choice to the end. Mixing two right answers therefore gives a wrong one.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from itertools import permutations
from typing import Literal

from stillhouse.data.sets import TensorSet
from stillhouse.data.text import pack_ids
from stillhouse.errors import DataError, require

Split = Literal["train", "validation", "test"]

TASKS = ("list", "reverse", "name")
NOUNS = ("cat", "dog", "fox", "hen", "oak", "elm", "ash", "fir", "sea", "bay", "ice", "fog")
STEMS = ("big", "old", "red")
ENDINGS = ("a", "o", "u")
VERBS = (("sleeps", "sleep"), ("runs", "run"), ("sings", "sing"))
ADJECTIVES = tuple(stem + ending for stem in STEMS for ending in ENDINGS)
VOCABULARY = ("<pad>", "<bos>", "<sep>", "<eos>", *TASKS, *NOUNS, *ADJECTIVES, *(v for pair in VERBS for v in pair),
              "is", "and")
PAD, BOS, SEP, EOS = range(4)
LENGTH = 24
LONGEST_ANSWER = 17
"""Tokens of the longest correct answer, its end of sequence included."""
MOST_NOUNS = 4

_ID = {word: i for i, word in enumerate(VOCABULARY)}
_STYLES = ("before", "after")


def encode(words: Sequence[str]) -> list[int]:
    return [_ID[word] for word in words]


def decode(ids: Sequence[int]) -> list[str]:
    """Words of the ids, without padding and the end of sequence."""
    return [VOCABULARY[i] for i in ids if i not in (PAD, EOS)]


def _adjective(stem: str, noun: str) -> str:
    return stem + ENDINGS[NOUNS.index(noun) // 4]


def _sentence(nouns: Sequence[str], style: str, stem: str, verb: tuple[str, str]) -> list[str]:
    words: list[str] = []
    for i, noun in enumerate(nouns):
        adjective = _adjective(stem, noun)
        words += [adjective, noun] if style == "before" else ["and"] * (i > 0) + [noun, "is", adjective]
    return [*words, verb[len(nouns) > 1]]


def answers(prompt: Sequence[str]) -> list[list[str]]:
    """All correct answers to a prompt (its words from the task to the last noun)."""
    task, nouns = prompt[0], tuple(prompt[1:])
    orders = {"list": [nouns], "reverse": [nouns[::-1]], "name": list(permutations(nouns))}[task]
    return [_sentence(order, style, stem, verb)
            for order in orders for style in _STYLES for stem in STEMS for verb in VERBS]


def named(answer: Sequence[str]) -> list[str] | None:
    """The nouns of a grammatical answer in their order, None if it is not grammatical."""
    nouns = [word for word in answer if word in NOUNS]
    if not 1 <= len(nouns) <= MOST_NOUNS:
        return None
    sentences = (_sentence(nouns, style, stem, verb) for style in _STYLES for stem in STEMS for verb in VERBS)
    return nouns if list(answer) in sentences else None


def is_grammatical(answer: Sequence[str]) -> bool:
    """Whether the words are a sentence of the language, whatever was asked."""
    return named(answer) is not None


def is_correct(prompt: Sequence[str], answer: Sequence[str]) -> bool:
    """Whether the words are a grammatical answer that names the prompt's nouns in an order its task allows."""
    nouns, asked = named(answer), list(prompt[1:])
    if nouns is None:
        return False
    return {"list": nouns == asked, "reverse": nouns == asked[::-1], "name": sorted(nouns) == sorted(asked)}[prompt[0]]


def split_of(prompt: Sequence[str]) -> Split:
    """The split a prompt belongs to, by a hash of its words: no prompt is in two."""
    digit = hashlib.blake2b(" ".join(prompt).encode(), digest_size=1).digest()[0] % 10
    return "validation" if digit == 0 else "test" if digit == 1 else "train"


def draw(chance: random.Random, split: Split) -> tuple[list[str], list[str]]:
    """A prompt of the split and one of its correct answers."""
    while True:
        nouns = chance.sample(NOUNS, chance.randint(1, MOST_NOUNS))
        prompt = [chance.choice(TASKS), *nouns]
        if split_of(prompt) == split:
            break
    order = {"list": nouns, "reverse": nouns[::-1], "name": chance.sample(nouns, len(nouns))}[prompt[0]]
    (stem,), (style,) = chance.choices(STEMS, (0.5, 0.3, 0.2)), chance.choices(_STYLES, (0.6, 0.4))
    return prompt, _sentence(order, style, stem, chance.choice(VERBS))


def grammar(split: Split = "train", size: int = 800, seed: int = 0) -> TensorSet:
    """`size` prompts of the split with one sampled answer each: input_ids, attention_mask, target_mask [size, 24].

    Raises DataError for an unknown split or a size below 1.
    """
    require(split in ("train", "validation", "test"), f"split is 'train', 'validation' or 'test', not {split!r}",
            DataError)
    require(size >= 1, f"size must be at least 1, not {size}", DataError)
    chance = random.Random(f"grammar {split} {seed}")
    pairs = [draw(chance, split) for _ in range(size)]
    return pack_ids([([BOS, *encode(prompt), SEP], [*encode(answer), EOS]) for prompt, answer in pairs], PAD, LENGTH)
