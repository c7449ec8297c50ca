"""Speech encoders of `transformers`, whole or pruned: HubertModel, Wav2Vec2Model and WavLMModel."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from stillhouse.errors import DamagedFileError, MissingExtraError, RoleError, require
from stillhouse.hub.refusals import PICKLE, only_pickles, read_json
from stillhouse.parts.surgeon import FILE, cut, layout
from stillhouse.store import load_tree

CLASSES = ("HubertModel", "Wav2Vec2Model", "WavLMModel")


def load(name: str) -> nn.Module:
    """The speech encoder `name` of the hub, or in a folder that `save_pretrained` wrote, in eval mode.

    Raises RoleError for another kind of model, pickled weights, or weights that lack tensors.
    """
    hf = _library()
    folder = Path(name).expanduser()
    found = only_pickles(folder) if folder.is_dir() else []
    require(not found, f"{(found or [folder])[0]}: {PICKLE}", RoleError)
    from stillhouse.hub.transformers import _safely

    def read() -> tuple[Any, Any]:
        return hf.AutoModel.from_pretrained(name, use_safetensors=True, trust_remote_code=False, dtype=torch.float32,
                                            output_loading_info=True)

    model, info = _safely(name, read)
    require(type(model).__name__ in CLASSES, f"'{name}' is a {type(model).__name__}; this role needs one of "
            f"{', '.join(CLASSES)}", RoleError)
    missing = [key for key in info["missing_keys"] if "masked_spec_embed" not in key]
    require(not missing, f"the weights of '{name}' lack {len(missing)} tensors ({', '.join(missing[:3])}, …), which "
            "would be random numbers", RoleError)
    return model.eval()


def load_pruned(folder: Path | str) -> nn.Module:
    """The pruned model that was saved in `folder`, in eval mode: built from its configuration, brought to its widths,
    and filled with its weights.

    Raises DamagedFileError where the files do not fit each other, MissingExtraError without `transformers`.
    """
    folder = Path(folder).expanduser()
    described = read_json(folder / FILE)
    name: Any = described.get("model")
    kept: Any = described.get("kept")
    require(name in CLASSES and isinstance(kept, dict), f"{folder / FILE} does not describe a pruned model of "
            f"{', '.join(CLASSES)}", DamagedFileError)
    hf = _library()
    kind: Any = getattr(hf, str(name))
    weights = load_tree(folder / "model.safetensors")
    try:
        model = kind(kind.config_class.from_dict(described["config"]))
        if "masked_spec_embed" not in weights and hasattr(model, "masked_spec_embed"):
            del model.masked_spec_embed
        elif "masked_spec_embed" in weights and not hasattr(model, "masked_spec_embed"):
            model.masked_spec_embed = nn.Parameter(torch.zeros_like(weights["masked_spec_embed"]))
        masks = {group: torch.zeros(n) for group, n in layout(model).sizes().items() if group in kept}
        for group, mask in masks.items():
            mask[kept[group]] = 1.0
        cut(model, masks).load_state_dict(weights)
    except (RuntimeError, KeyError, IndexError, TypeError, ValueError) as error:
        raise DamagedFileError(f"the weights in {folder} do not fit what {FILE} says: {error}") from error
    return model.eval()


def _library() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise MissingExtraError("speech encoders need transformers; install it with: pip install 'stillhouse[hf]'"
                                ) from error
    return transformers
