"""`still taps`: what is inside a model."""

from __future__ import annotations

from typing import Literal

from tyro.conf import Positional

from stillhouse.cli import tables
from stillhouse.errors import ConfigError, RoleError, StillError

EXAMPLES = ("classifier", "encoder", "causal-lm", "denoiser")


def taps(model: Positional[str], role: Literal["classifier", "encoder", "causal-lm", "denoiser"] = "encoder",
         shape: tuple[int, ...] = (3, 32, 32), arch: str | None = None) -> None:
    """List what can be read inside a model: the path and output shape of every module, in the order of their calls.

    Args:
        model: module:callable, hf:FOLDER, diffusers:FOLDER, file.safetensors, zoo:NAME or an embedded network
        role: what the model is, which says what one example looks like
        shape: of one picture or sample, e.g. 3 224 224; of token ids, the length: 16
        arch: module:callable that builds the network, for weights in a file
    """
    if not shape or min(shape) < 1:
        raise ConfigError(f"--shape takes positive sizes of one example, not {' '.join(map(str, shape))}")
    import torch

    from stillhouse import protocols
    from stillhouse.hub.models import resolve_model
    from stillhouse.parts.taps import list_taps
    from stillhouse.zoo import MODELS

    kind = {"classifier": protocols.Classifier, "encoder": protocols.Encoder, "causal-lm": protocols.CausalLM,
            "denoiser": protocols.Denoiser}[role]
    network = resolve_model(model, kind, arch=arch, zoo=MODELS)
    example: Any = torch.zeros(1, *shape)
    if role == "causal-lm":
        example = {"input_ids": torch.zeros(1, shape[-1], dtype=torch.long)}
    elif role == "denoiser":
        example = {"x_t": example, "t": torch.full((1,), 0.5)}
    try:
        found = list_taps(network, example)
    except StillError:
        raise
    except Exception as error:
        raise RoleError(f"{model} could not process one example of shape {shape} as {role}: {type(error).__name__}: "
                        f"{error}. Give --shape, and --role one of {', '.join(EXAMPLES)}") from error
    from rich.table import Table

    kinds = {path: type(module).__name__ for path, module in network.named_modules()}
    table = Table("path", "output (first is the batch)", "module", box=None, pad_edge=False)
    for path, size in found.items():
        table.add_row(path or "(the model)", " x ".join(map(str, size)), kinds[path])
    tables.console().print(table)
