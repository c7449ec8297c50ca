"""What is not loaded from other people's files, and how to bring it in safely."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from stillhouse.errors import DamagedFileError, RoleError, require

PICKLE = ("a pickle (or a format that may hold one) can run any program while it is read, so it is refused. Load it "
          "once where you trust it and write the weights as safetensors: model.save_pretrained(folder), or "
          "safetensors.torch.save_file(model.state_dict(), 'model.safetensors')")
CODE = ("its repository asks to run code of its own (trust_remote_code), which is refused. If you have read and trust "
        "it, build the model in a Python file of yours and give module:callable")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises DamagedFileError."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DamagedFileError(f"cannot read {path}: {error}") from error
    require(isinstance(found, dict), f"{path} is no JSON object", DamagedFileError)
    return found


def looks_foreign(folder: Path) -> None:
    """Raise RoleError with the right scheme for a folder of `transformers` or `diffusers`."""
    if (folder / "model_index.json").is_file() or any((folder / p / "config.json").is_file() for p in (
            "unet", "transformer", "network")):
        raise RoleError(f"{folder} was saved by diffusers; write diffusers:{folder}")
    config = folder / "config.json"
    if config.is_file() and "model_type" in read_json(config):
        raise RoleError(f"{folder} was saved by transformers; write hf:{folder}")


def only_pickles(folder: Path) -> list[Path]:
    """The pickled checkpoints of a folder without any safetensors."""
    if any(folder.glob("*.safetensors")):
        return []
    return sorted(p for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for p in folder.glob(pattern))
