"""Speech encoders of `transformers`, whole or pruned: HubertModel, Wav2Vec2Model and WavLMModel."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from stillhouse.errors import DamagedFileError, MissingExtraError, RoleError, require
from stillhouse.hub.refusals import read_json
from stillhouse.parts.surgeon import FILE, cut, layout
from stillhouse.store import load_tree

CLASSES = ("HubertModel", "Wav2Vec2Model", "WavLMModel")


def load(name: str, **options: Any) -> nn.Module:
    """The speech encoder `name` of the hub, or in a folder that `save_pretrained` wrote, in eval mode.

    `fresh=True` draws new weights for its configuration. A model whose feature extractor has do_normalize wants sound
    of mean 0 and variance 1. Raises RoleError for another kind of model, pickled weights, or weights that lack tensors;
    DamagedFileError for a download that was cut off.
    """
    from stillhouse.hub.transformers import _check_options, _config, _flag, _made

    hf = _library()
    fresh = _flag(options, "fresh")
    _check_options(options, "speech encoder", name)
    folder, config = _config(hf, name, {}, fresh)
    known = [kind for kind in CLASSES if isinstance(config, getattr(hf, kind).config_class)]
    require(bool(known), f"'{name}' is a {(config.architectures or [config.model_type])[0]}; this role needs one of "
            f"{', '.join(CLASSES)}", RoleError)
    model, info = _made(hf, hf.AutoModel, folder, config, name, fresh)
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
