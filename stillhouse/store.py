"""Nested state in one safetensors file: written atomically, checked by digest, read without executing anything.

A *tree* is any nesting of dicts, lists and tuples whose leaves are tensors, numpy arrays, numbers, strings, None.
Its skeleton goes into the file's metadata as JSON; equal tensors that share memory (tied weights) are stored once.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from stillhouse.errors import DamagedFileError, StoreError

DIGEST_LENGTH = 16


def digest_of(*parts: Any, length: int = 32) -> str:
    """blake2b of the parts in order, as hexadecimal; trees are hashed by content, other parts by their text."""
    h = hashlib.blake2b(digest_size=length // 2)
    for part in parts:
        skeleton, tensors = pack(part)
        h.update(json.dumps(skeleton, sort_keys=True).encode())
        for name in sorted(tensors):
            value = tensors[name]
            h.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            h.update(value.contiguous().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return h.hexdigest()


def pack(tree: Any) -> tuple[Any, dict[str, Tensor]]:
    """Split a tree into a JSON-able skeleton and the tensors it refers to. Shared tensors appear once."""
    tensors: dict[str, Tensor] = {}
    seen: dict[tuple, str] = {}

    def visit(value: Any, path: str) -> Any:
        if isinstance(value, Tensor):
            plain = value.detach()
            layout = (plain.data_ptr(), plain.dtype, tuple(plain.shape), plain.stride(), str(plain.device))
            if plain.numel() == 0 or layout not in seen:
                tensors[path] = plain
                seen[layout] = path
                return {"tensor": path}
            return {"tensor": seen[layout]}
        if isinstance(value, np.ndarray):
            tensors[path] = torch.from_numpy(np.ascontiguousarray(value).copy())
            return {"array": path}
        if isinstance(value, np.generic):
            return visit(value.item(), path)
        if value is None or isinstance(value, bool | int | float | str):
            return value
        if isinstance(value, dict):
            return {"dict": [[visit(k, f"{path}.key"), visit(v, f"{path}.{k}")] for k, v in value.items()]}
        if isinstance(value, list | tuple):
            kind = "list" if isinstance(value, list) else "tuple"
            return {kind: [visit(v, f"{path}.{i}") for i, v in enumerate(value)]}
        raise TypeError(
            f"cannot store {type(value).__name__} at '{path or 'top'}': only tensors, numpy arrays, numbers, strings, "
            "None and dicts, lists or tuples of them can be saved"
        )

    return visit(tree, "t"), tensors


def unpack(skeleton: Any, tensors: dict[str, Tensor]) -> Any:
    """The inverse of `pack`."""
    if not isinstance(skeleton, dict):
        return skeleton
    ((kind, value),) = skeleton.items()
    if kind == "tensor":
        return tensors[value]
    if kind == "array":
        return tensors[value].numpy()
    if kind == "dict":
        return {unpack(k, tensors): unpack(v, tensors) for k, v in value}
    items = [unpack(v, tensors) for v in value]
    return items if kind == "list" else tuple(items)


def save_tree(path: Path | str, tree: Any) -> Path:
    """Write a tree to `path` (a .safetensors file): aside, fsynced, then renamed over the old one.

    Raises StoreError where the disk is full or the folder cannot be written; the old file is then untouched.
    """
    path = Path(path)
    with _writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            _write(aside, tree)
            aside.replace(path)
        finally:
            aside.unlink(missing_ok=True)
        _sync_folder(path.parent)
    return path


def load_tree(path: Path | str, device: torch.device | str = "cpu") -> Any:
    """Read a tree written by `save_tree`. Raises DamagedFileError when it is not one, StoreError when unreadable."""
    path = Path(path)
    if not path.is_file():
        raise StoreError(f"there is no file {path}")
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            skeleton = json.loads((file.metadata() or {})["tree"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        return unpack(skeleton, tensors)
    except (SafetensorError, KeyError, ValueError, TypeError, AttributeError) as error:
        raise DamagedFileError(f"{path} is damaged or was not written by Stillhouse ({error})") from error
    except OSError as error:
        raise StoreError(f"cannot read {path}: {error}") from error


def save_checked(folder: Path, stem: str, tree: Any) -> Path:
    """Write `<stem>-<digest>.safetensors` in `folder`, the digest being that of the file's own bytes."""
    with _writing(folder / stem):
        folder.mkdir(parents=True, exist_ok=True)
        aside = folder / f".{stem}.{os.getpid()}.tmp"
        try:
            _write(aside, tree)
            path = folder / f"{stem}-{_file_digest(aside)}.safetensors"
            aside.replace(path)
        finally:
            aside.unlink(missing_ok=True)
        _sync_folder(folder)
    return path


def find_checked(folder: Path, stem: str = "") -> list[Path]:
    """Files of `save_checked` in `folder` whose stem starts with `stem`, in the order of their stems."""
    pattern = re.compile(rf"{re.escape(stem)}.*-[0-9a-f]{{{DIGEST_LENGTH}}}\.safetensors")
    if not folder.is_dir():
        return []
    return sorted(p for p in folder.iterdir() if pattern.fullmatch(p.name))


def load_checked(path: Path, device: torch.device | str = "cpu") -> Any:
    """Read a file of `save_checked`. Raises DamagedFileError when its bytes are not those that were written."""
    expected = path.stem.rsplit("-", 1)[-1]
    try:
        actual = _file_digest(path)
    except OSError as error:
        raise StoreError(f"cannot read {path}: {error}") from error
    if actual != expected:
        raise DamagedFileError(f"{path.name} is cut off or altered (digest {actual}, expected {expected})")
    return load_tree(path, device)


def write_text(path: Path | str, text: str) -> Path:
    """Write a text file atomically."""
    path = Path(path)
    with _writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            with aside.open("w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            aside.replace(path)
        finally:
            aside.unlink(missing_ok=True)
    return path


def inside(folder: Path | str, name: str) -> Path:
    """`folder/name`, refused if it would lie outside `folder` (names read from files are not trusted)."""
    root = Path(folder).resolve()
    path = (root / name).resolve()
    if not path.is_relative_to(root):
        raise StoreError(f"the name {name!r} points outside its folder {root}")
    return path


def cache_folder() -> Path:
    """Where trained teachers and verification runs are kept: $STILLHOUSE_CACHE, or the user's cache folder."""
    if chosen := os.environ.get("STILLHOUSE_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "stillhouse"


def _write(path: Path, tree: Any) -> None:
    skeleton, tensors = pack(tree)
    save_file({n: v.contiguous().cpu() if v.is_contiguous() else v.cpu().clone(memory_format=torch.contiguous_format)
               for n, v in _separate(tensors).items()}, path, {"tree": json.dumps(skeleton)})
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def _separate(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies of those tensors that overlap another in memory without being equal to it (views of one buffer)."""
    owners: dict[int, int] = {}
    for value in tensors.values():
        pointer = value.untyped_storage().data_ptr()
        owners[pointer] = owners.get(pointer, 0) + 1
    return {n: v.clone() if owners[v.untyped_storage().data_ptr()] > 1 else v for n, v in tensors.items()}


def _file_digest(path: Path) -> str:
    h = hashlib.blake2b(digest_size=DIGEST_LENGTH // 2)
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            h.update(chunk)
    return h.hexdigest()


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        if isinstance(error, StoreError):
            raise
        code = getattr(error, "errno", None)
        text = str(error)
        if code == errno.ENOSPC or "No space left" in text:
            raise StoreError(f"no space left to write {path}; free some space and resume: what was saved before is "
                             "intact") from error
        if code in (errno.EACCES, errno.EPERM, errno.EROFS) or "Permission denied" in text or "Read-only" in text:
            raise StoreError(f"no permission to write {path}; choose another folder with --out, or change its "
                             "permissions") from error
        raise StoreError(f"cannot write {path}: {error}") from error
