"""The embedded language teacher: a small Llama that has learned the toy grammar from plenty of it."""

from __future__ import annotations

from typing import Any

from torch import nn

from stillhouse.data import grammar as toy
from stillhouse.models import language
from stillhouse.recipes.language import FineTune, fine_tune
from stillhouse.run import Run
from stillhouse.run.seeds import preserved
from stillhouse.zoo.cache import cached

RECIPE = {"version": 1, "pairs": 20_000, "steps": 1500, "batch": 32, "lr": 2e-3, "width": 96, "layers": 4, "heads": 4,
          "seed": 0}


def grammar_model(width: int, layers: int, heads: int) -> nn.Module:
    """A fresh Llama over the vocabulary of `data.grammar`."""
    return language.llama(len(toy.VOCABULARY), width, layers, heads, toy.LENGTH, bos=toy.BOS, eos=toy.EOS, pad=toy.PAD)


def grammar_teacher(recipe: dict[str, Any] = RECIPE) -> nn.Module:
    """4 layers of width 96, trained on 20,000 pairs of the training split; built on first use (about 70 s)."""
    def fresh() -> nn.Module:
        return grammar_model(recipe["width"], recipe["layers"], recipe["heads"])

    def build() -> dict[str, Any]:
        run = Run(seed=recipe["seed"], quiet=True)
        config = FineTune(recipe["steps"], recipe["batch"], recipe["lr"], validate_every=recipe["steps"])
        student: Any = fresh()
        pairs: Any = toy.grammar("train", recipe["pairs"], seed=1)
        return dict(fine_tune(student, pairs, config=config, run=run).state_dict())

    with preserved():
        model = fresh()
    model.load_state_dict(cached("grammar-teacher", recipe, build))
    return model.eval()
