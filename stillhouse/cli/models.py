"""`still taps`: what is inside a model."""

from __future__ import annotations

from typing import Any, Literal, get_args

from tyro.conf import Positional

from stillhouse.cli import tables
from stillhouse.errors import ConfigError, RoleError, StillError

Role = Literal["classifier", "encoder", "causal-lm", "denoiser", "text-classifier", "text-encoder", "seq2seq",
               "speech-encoder", "dual-encoder"]
PROTOCOLS = {"classifier": "Classifier", "encoder": "Encoder", "causal-lm": "CausalLM", "denoiser": "Denoiser",
             "text-classifier": "TextClassifier", "text-encoder": "TextEncoder", "seq2seq": "Seq2Seq",
             "speech-encoder": "SpeechEncoder", "dual-encoder": "DualEncoder"}
IDS = ("causal-lm", "text-classifier", "text-encoder", "seq2seq")
"""Roles whose models read token ids."""


def taps(model: Positional[str], role: Role = "encoder",
         shape: tuple[int, ...] = (3, 32, 32), arch: str | None = None) -> None:
    """List what can be read inside a model: the path and output shape of every module, in the order of their calls.

    Args:
        model: module:callable, hf:FOLDER, diffusers:FOLDER, file.safetensors, zoo:NAME or an embedded network
        role: what the model is, which says what one example looks like
        shape: of one picture or sample, e.g. 3 224 224; of token ids or sound, the length: 16, 16000
        arch: module:callable that builds the network, for weights in a file
    """
    if not shape or min(shape) < 1:
        raise ConfigError(f"--shape takes positive sizes of one example, not {' '.join(map(str, shape))}")
    import torch

    from stillhouse import protocols
    from stillhouse.hub.models import resolve_model
    from stillhouse.parts.taps import list_taps
    from stillhouse.zoo import MODELS

    network = resolve_model(model, getattr(protocols, PROTOCOLS[role]), arch=arch, zoo=MODELS)
    example: Any = torch.zeros(1, *shape)
    if role in IDS:
        example = {"input_ids": torch.zeros(1, shape[-1], dtype=torch.long)}
    elif role == "denoiser":
        example = {"x_t": example, "t": torch.full((1,), 0.5)}
    elif role == "speech-encoder":
        example = torch.zeros(1, shape[-1])
    if role == "seq2seq":
        reads_sound = hasattr(network, "features")
        example = {"audio": torch.zeros(1, shape[-1])} if reads_sound else example
        example["labels"] = torch.zeros(1, 4, dtype=torch.long)
    try:
        found = list_taps(network, example)
    except StillError:
        raise
    except Exception as error:
        raise RoleError(f"{model} could not process one example of shape {shape} as {role}: {type(error).__name__}: "
                        f"{error}. Give --shape, and --role one of {', '.join(get_args(Role))}") from error
    from rich.table import Table

    kinds = {path: type(module).__name__ for path, module in network.named_modules()}
    table = Table("path", "output (first is the batch)", "module", box=None, pad_edge=False)
    for path, size in found.items():
        table.add_row(path or "(the model)", " x ".join(map(str, size)), kinds[path])
    tables.console().print(table)
