"""Rows of tensors kept on disk in blocks, found again by the content of what they belong to.

A folder holds `kept.json` and blocks `rows-NUMBER-DIGEST.safetensors`. A block is written aside, synced and renamed,
and only then named in kept.json, which is itself replaced as a whole: whatever happens, kept.json names whole blocks.
Blocks are mapped into memory, so a folder may be far larger than it; each is checked by its digest when first read.

Fields of a block are [rows, …], or [positions, …] where rows are of different lengths: `length` [rows] then says how
many positions each row has. `key` [rows, 2] are two 64-bit hashes of the inputs.
"""

from __future__ import annotations

import functools
import hashlib
import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from stillhouse.errors import DamagedFileError, DataError, StoreError, require
from stillhouse.store import DIGEST_LENGTH, inside, save_checked, write_text

MANIFEST = "kept.json"
FORMAT = "stillhouse kept rows 1"
DTYPES = {"F32": np.float32, "F16": np.float16, "I64": np.int64, "I32": np.int32, "U8": np.uint8, "F64": np.float64}
MIX = -7046029254386353131
CHUNK = 1 << 22


# ---------------------------------------------------------------------------------- keys


@functools.lru_cache(16)
def _weights(n: int, device: str) -> tuple[Tensor, Tensor]:
    """Two rows of n odd 64-bit numbers, by splitmix64 of their places: the same everywhere and always."""
    found = []
    for stream in (1, 2):
        with np.errstate(over="ignore"):
            z = (np.arange(n, dtype=np.uint64) + np.uint64(1) + (np.uint64(stream) << np.uint64(40))) * np.uint64(
                0x9E3779B97F4A7C15)
            z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            z = (z ^ (z >> np.uint64(31))) | np.uint64(1)
        found.append(torch.from_numpy(z.view(np.int64)).to(device))
    return found[0], found[1]


def keys_of(value: Tensor) -> Int[Tensor, "rows 2"]:
    """Two 64-bit hashes of each row of a float or integer tensor, in integers on its own device: equal rows have equal
    keys on every device and in every batch. Floats count as float32, and -0 as 0. Rows of different shapes differ."""
    flat = value.flatten(1)
    if value.is_floating_point():
        flat = (flat.float() + 0.0).view(torch.int32)
    shape = hash_of_shape(value.shape[1:])
    step = max(1, CHUNK // max(flat.shape[1], 1))
    first, second = _weights(flat.shape[1], str(value.device))
    parts = []
    for part in flat.split(step):
        words = part.long() * MIX
        words = words ^ (words >> 29)
        parts.append(torch.stack([(words * first).sum(1), (words * second).sum(1)], 1))
    return torch.cat(parts) + shape


def hash_of_shape(shape: Any) -> int:
    """A number below 2^31 for a shape."""
    text = ",".join(str(int(n)) for n in shape)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest(), "big") >> 1


def token_keys(input_ids: Int[Tensor, "rows length"], attention_mask: Tensor | None = None) -> Int[Tensor, "rows 2"]:
    """As `keys_of`, for token ids: of the real tokens alone, so padding on either side changes nothing."""
    real = torch.ones_like(input_ids) if attention_mask is None else (attention_mask != 0).long()
    place = (real.cumsum(1) - 1).clamp_min(0)
    words = (input_ids.long() + 1) * MIX
    words = (words ^ (words >> 29)) * real
    first, second = (w[place] for w in _weights(input_ids.shape[1], str(input_ids.device)))
    return torch.stack([(words * first).sum(1), (words * second).sum(1)], 1) + real.sum(1, keepdim=True)


# ---------------------------------------------------------------------------------- writing


class Writer:
    """Appends blocks of rows to a folder. `about` is kept with them and never changes; its values are JSON.

    A folder that holds rows already is gone on with: `done` says how many there are. Raises StoreError naming the
    first difference where the folder was made with another `about`.
    """

    def __init__(self, folder: Path | str, about: Mapping[str, Any], rows: int):
        self.folder = Path(folder).expanduser()
        require(not self.folder.exists() or self.folder.is_dir(), f"{self.folder} is a file; give a folder", StoreError)
        started = (self.folder / MANIFEST).is_file()
        strangers = not started and self.folder.is_dir() and any(
            not p.name.startswith((".", "rows-")) for p in self.folder.iterdir())
        require(not strangers, f"{self.folder} holds other files; give a folder of its own", StoreError)
        self.about = json.loads(json.dumps(dict(about)))
        self.manifest = {"format": FORMAT, "about": self.about, "rows": rows, "done": 0, "error": 0.0, "blocks": []}
        if started:
            found = read_manifest(self.folder)
            for name, value in {**self.about, "rows": rows}.items():
                was = found["rows"] if name == "rows" else found["about"].get(name)
                require(was == value, f"the cache in {self.folder} was made with another {name}: {was!r} there, "
                        f"{value!r} here. Give the same {name} to go on with it, or another folder to begin anew",
                        StoreError)
            self.manifest = found

    @property
    def done(self) -> int:
        return int(self.manifest["done"])

    def append(self, fields: Mapping[str, Tensor], error: float = 0.0) -> None:
        """Write one block durably; `key` is among its fields. `error` is the largest that rounding made in it."""
        rows = len(fields["key"])
        path = save_checked(self.folder, f"rows-{len(self.manifest['blocks']):06d}", dict(fields))
        self.manifest = {**self.manifest, "done": self.done + rows, "error": max(self.manifest["error"], error),
                         "blocks": [*self.manifest["blocks"], {"file": path.name, "rows": rows,
                                                               "bytes": path.stat().st_size}]}
        write_text(self.folder / MANIFEST, json.dumps(self.manifest, indent=1))


def read_manifest(folder: Path | str) -> dict[str, Any]:
    """kept.json of a folder, checked. Raises DataError where there is none, DamagedFileError where it is none."""
    path = Path(folder).expanduser() / MANIFEST
    require(path.is_file(), f"there is no cache in {path.parent} (no {MANIFEST}; seen from {Path.cwd()}); make one "
            "with: still cache TEACHER --data DATA --out FOLDER", DataError)
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        whole = (found["format"] == FORMAT and isinstance(found["about"], dict)
                 and found["done"] == sum(int(b["rows"]) for b in found["blocks"]) <= found["rows"]
                 and all(isinstance(b["file"], str) and int(b["bytes"]) > 0 for b in found["blocks"]))
    except (ValueError, KeyError, TypeError) as error:
        raise DamagedFileError(f"{path} is damaged, or was not written by Stillhouse ({error})") from error
    require(whole, f"{path} is damaged, or of another version", DamagedFileError)
    return found


# ---------------------------------------------------------------------------------- reading


class Kept:
    """The rows of a folder, mapped into memory.

    Raises DataError where there is no cache or it is not finished (unless `partial`), DamagedFileError for blocks that
    are missing, cut off or altered.
    """

    def __init__(self, folder: Path | str, partial: bool = False):
        self.folder = Path(folder).expanduser()
        self.manifest = read_manifest(self.folder)
        self.about: dict[str, Any] = self.manifest["about"]
        done, rows = int(self.manifest["done"]), int(self.manifest["rows"])
        require(done > 0 and (partial or done == rows), f"the cache in {self.folder} is not finished: {done} of {rows} "
                "rows. Give the command that began it once more, and it goes on where it was", DataError)
        self.rows = done
        self.starts = np.cumsum([0, *(int(b["rows"]) for b in self.manifest["blocks"])])
        for block in self.manifest["blocks"]:
            path = inside(self.folder, block["file"])
            there = path.stat().st_size if path.is_file() else 0
            require(there == block["bytes"], f"{path} {'is missing' if not there else 'is cut off or altered'}; delete "
                    f"{self.folder} and make the cache again", DamagedFileError)
        self._sound: set[int] = set()
        self._open = functools.lru_cache(256)(self._map)

    def keys(self) -> Int[Tensor, "rows 2"]:
        """The keys of all rows."""
        return torch.from_numpy(np.concatenate([self._open(i)["key"] for i in range(len(self.starts) - 1)]))

    def take(self, rows: Tensor) -> list[dict[str, np.ndarray]]:
        """The fields of the rows at these places, one dict each; of rows with a length, [length, …]."""
        found = []
        for row in rows.tolist():
            block = int(np.searchsorted(self.starts, row, side="right")) - 1
            fields, at = self._open(block), row - int(self.starts[block])
            if "length" not in fields:
                found.append({n: v[at] for n, v in fields.items() if n != "key"})
                continue
            ends = fields["end"]
            low, high = int(ends[at] - fields["length"][at]), int(ends[at])
            found.append({n: v[low:high] for n, v in fields.items() if n not in ("key", "length", "end")})
        return found

    def _map(self, number: int) -> dict[str, np.ndarray]:
        path = inside(self.folder, self.manifest["blocks"][number]["file"])
        whole = np.memmap(path, np.uint8, mode="r")
        if number not in self._sound:
            digest = hashlib.blake2b(whole.data, digest_size=DIGEST_LENGTH // 2).hexdigest()
            require(digest == path.stem.rsplit("-", 1)[-1], f"{path} is altered (digest {digest}); delete "
                    f"{self.folder} and make the cache again", DamagedFileError)
            self._sound.add(number)
        try:
            (length,) = struct.unpack("<Q", whole[:8].tobytes())
            header = json.loads(whole[8 : 8 + length].tobytes())
            fields = {}
            for name, info in header.items():
                if name != "__metadata__":
                    low, high = (8 + length + int(n) for n in info["data_offsets"])
                    fields[name.removeprefix("t.")] = whole[low:high].view(DTYPES[info["dtype"]]).reshape(info["shape"])
        except (KeyError, ValueError, struct.error) as error:
            raise DamagedFileError(f"{path} is damaged, or was not written by Stillhouse ({error})") from error
        if "length" in fields:
            fields["end"] = fields["length"].cumsum()
        return fields


class Table:
    """Rows by key: sorted first keys and their places, on the device of the tensors that it is given."""

    def __init__(self, keys: Int[Tensor, "rows 2"]):
        order = torch.argsort(keys[:, 0], stable=True)
        self.first, self.second, self.place = keys[order, 0].contiguous(), keys[order, 1].contiguous(), order

    def to(self, device: torch.device) -> Table:
        if self.first.device != device:
            self.first, self.second, self.place = (t.to(device) for t in (self.first, self.second, self.place))
        return self

    def find(self, keys: Int[Tensor, "n 2"]) -> tuple[Tensor, Tensor]:
        """Of each key the place of its row, and whether there is one."""
        at = torch.searchsorted(self.first, keys[:, 0].contiguous()).clamp_max(len(self.first) - 1)
        return self.place[at], (self.first[at] == keys[:, 0]) & (self.second[at] == keys[:, 1])
