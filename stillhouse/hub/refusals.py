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

POINTER = b"version https://git-lfs"


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises DamagedFileError."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DamagedFileError(f"cannot read {path}: {error}") from error
    require(isinstance(found, dict), f"{path} is no JSON object", DamagedFileError)
    return found


def check_whole(folder: Path, name: str) -> None:
    """Raise DamagedFileError for a folder of `transformers` that was only partly downloaded: an empty file, a pointer
    of git-lfs in the place of one, or weights in shards some of which are missing; RoleError where there is no model.
    """
    require((folder / "config.json").is_file(), f"the folder {folder} has no config.json; it must be one that "
            "save_pretrained wrote", RoleError)
    require(not (folder / "adapter_config.json").is_file(), f"{folder} holds an adapter (LoRA) beside or without the "
            "model it belongs to; merge it once, model.merge_and_unload().save_pretrained(folder), and give that "
            "folder", RoleError)
    partly = f"the weights of '{name}' are damaged or only partly there"
    for path in sorted([*folder.glob("*.json"), *folder.glob("*.safetensors")]):
        with path.open("rb") as file:
            start = file.read(len(POINTER))
        require(bool(start), f"{partly}: {path.name} is empty. Download it again", DamagedFileError)
        require(start != POINTER, f"{partly}: {path.name} is a pointer of git-lfs, not the file. Run `git lfs pull` in "
                f"{folder}, or `hf download`", DamagedFileError)
    for index in sorted(folder.glob("*.safetensors.index.json")):
        shards = read_json(index).get("weight_map")
        require(isinstance(shards, dict) and all(isinstance(s, str) for s in shards.values()),
                f"{index} names no shards", DamagedFileError)
        named = sorted(set(shards.values())) if isinstance(shards, dict) else []
        outside = [shard for shard in named if Path(shard).name != shard]
        require(not outside, f"{index} names a file outside of its folder: {(outside or [''])[0]}", RoleError)
        missing = [shard for shard in named if not (folder / shard).is_file()]
        require(not missing, f"{partly}: {len(missing)} of {len(named)} shards are missing ({', '.join(missing[:3])}). "
                "Finish the download", DamagedFileError)


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
