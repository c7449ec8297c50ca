"""The embedded speech teacher: a tiny HuBERT that has heard the words of `data.tones` without any label."""

from __future__ import annotations

import inspect
import math
from typing import Any

from torch import nn

from stillhouse.data.tones import tones
from stillhouse.errors import MissingExtraError
from stillhouse.recipes import masked_units
from stillhouse.run import Run
from stillhouse.run.seeds import preserved
from stillhouse.zoo.cache import cached

RECIPE = {"version": 1, "clips": 3000, "seed": 7, "steps": 1200, "batch": 16, "units": 48, "lr": 2e-3, "window": 160,
          "mask": 0.1, "span": 5, "width": 64, "layers": 4, "heads": 4, "inner": 256}


def hubert(width: int = 64, layers: int = 4, heads: int = 4, units: int = 256,
           channels: tuple[int, ...] = (32, 64, 64)) -> nn.Module:
    """A fresh HubertModel for clips at 4 kHz: three convolutions with a frame every 80 samples (20 ms), no dropout."""
    try:
        from transformers import HubertConfig, HubertModel
    except ImportError as error:
        raise MissingExtraError("the speech models need transformers; install it with: pip install 'stillhouse[hf]'"
                                ) from error
    config = HubertConfig(
        hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads, intermediate_size=units,
        conv_dim=list(channels), conv_kernel=[10, 8, 4], conv_stride=[8, 5, 2],
        num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=math.gcd(16, width), hidden_dropout=0.0,
        attention_dropout=0.0, activation_dropout=0.0, feat_proj_dropout=0.0, layerdrop=0.0, mask_time_prob=0.1,
        mask_time_length=5)
    model = HubertModel(config)
    config.mask_time_prob = 0.0
    return model


def tones_teacher(recipe: dict[str, Any] = RECIPE) -> nn.Module:
    """4 layers of width 64, pre-trained by masked prediction of 48 spectral units on 3,000 clips; built on first use
    (about 80 s)."""
    def fresh() -> nn.Module:
        return hubert(recipe["width"], recipe["layers"], recipe["heads"], recipe["inner"])

    def build() -> dict[str, Any]:
        run = Run(seed=recipe["seed"]).begin()
        run.say(f"training the speech teacher ({recipe['steps']} steps, kept for later runs) …")
        names = inspect.signature(masked_units.Config).parameters
        config = masked_units.Config(**{n: v for n, v in recipe.items() if n in names})
        student: Any = fresh()
        data: Any = tones(recipe["clips"], seed=1000 + recipe["seed"]).without("word", "speaker")
        return dict(masked_units.train(student, data, config, run).state_dict())

    with preserved():
        model = fresh()
    model.load_state_dict(cached("tones-teacher", recipe, build))
    return model.eval()
