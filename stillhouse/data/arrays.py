"""Arrays from disk: .npz, and .safetensors, which stay on disk where they are large."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stillhouse.data.broken import Summary
from stillhouse.data.distilled import FILE as DISTILLED
from stillhouse.data.distilled import DistilledSet
from stillhouse.data.pictures import coloured, resized
from stillhouse.data.sets import TensorSet
from stillhouse.errors import DataError, require

FIELDS = ("image", "audio", "x", "label", "condition", "domain", "other", "input_ids", "attention_mask", "target_mask",
          "target_ids")
MAIN = ("image", "audio", "x", "condition", "input_ids")
IN_MEMORY = 1 << 28
"""Arrays, sounds and texts of more bytes than this stay on disk; what is read from there is the same."""
BLOCK = 1 << 20


class MappedSet:
    """Fields that stay in memory-mapped files; what is asked for is read and converted, batch by batch.

    `fields` are parallel tensors (mapped or not), `convert` says for some of them what becomes of a batch's rows.
    """

    def __init__(self, fields: Mapping[str, Tensor], convert: Mapping[str, Callable[[Tensor], Tensor]] | None = None,
                 found: Summary | None = None):
        self.columns, self.convert = dict(fields), dict(convert or {})
        self.found = found or Summary(len(next(iter(self.columns.values()))))
        self.classes: tuple[str, ...] = ()

    @property
    def fields(self) -> tuple[str, ...]:
        return tuple(self.columns)

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def batch(self, indices: Sequence[int] | Tensor) -> dict[str, Any]:
        """The rows at `indices`, in that order."""
        where = torch.as_tensor(indices, dtype=torch.long)
        return {"index": where, **{name: self._converted(name, value[where]) for name, value in self.columns.items()}}

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        index %= len(self)
        return {"index": index, **{name: self._converted(name, value[index : index + 1].clone())[0]
                                   for name, value in self.columns.items()}}

    def column(self, name: str) -> Tensor:
        """One field whole. Raises DataError for one that is not there."""
        require(name in self.columns, f"the data has no field '{name}' (it has {', '.join(self.fields)})", DataError)
        return self._converted(name, self.columns[name])

    def renamed(self, names: Mapping[str, str]) -> MappedSet:
        """The same set, its fields called otherwise."""
        return MappedSet({names.get(n, n): v for n, v in self.columns.items()},
                         {names.get(n, n): f for n, f in self.convert.items()}, self.found)

    def without(self, *names: str) -> MappedSet:
        """The same set without some fields."""
        return MappedSet({n: v for n, v in self.columns.items() if n not in names}, self.convert, self.found)

    def summary(self) -> Summary:
        return self.found

    def _converted(self, name: str, rows: Tensor) -> Tensor:
        return self.convert[name](rows) if name in self.convert else rows


GRAPHS = "graphs.safetensors"


def saved_set(path: Path) -> TensorSet:
    """What a distilled set or a set of graphs was saved as, from its file."""
    if path.name == DISTILLED:
        return DistilledSet.load(path.parent).as_data_set()
    from stillhouse.data.graphs import GraphSet

    return GraphSet.load(path.parent)


def read_arrays(path: Path | str, *, size: int | None = None, channels: int | None = None,
                columns: Mapping[str, str] | None = None) -> TensorSet | MappedSet:
    """`image` (and `label`), `x` (and `condition`), `audio` or `input_ids` from a .npz or .safetensors file.

    `columns` says under which name a field is in the file. A .safetensors file of more than `IN_MEMORY` bytes stays on
    disk, memory-mapped. Raises DataError for pickled arrays, damaged files, wrong names or shapes, and values that are
    not finite.
    """
    path = Path(path).expanduser()
    arrays = _npz(path) if path.suffix.lower() == ".npz" else _safetensors(path)
    for field, column in (columns or {}).items():
        require(column in arrays, f"{path} has no array '{column}'; it has {', '.join(arrays)}", DataError)
        arrays[field] = arrays[column]
    main = next((name for name in MAIN if name in arrays), "")
    require(bool(main), f"{path} has no array named {', '.join(repr(name) for name in MAIN)} but "
            f"{', '.join(arrays) or 'nothing'}; name them, e.g. numpy.savez(path, image=images, label=labels), or say "
            "which it is: --columns image=…", DataError)
    known = {name: value for name, value in arrays.items() if name in FIELDS}
    lengths = {name: len(value) if value.dim() else 0 for name, value in known.items()}
    require(len(set(lengths.values())) == 1, f"the arrays of {path} differ in length: {lengths}", DataError)
    require(lengths[main] > 0, f"'{main}' of {path} is empty", DataError)
    large = path.suffix.lower() == ".safetensors" and path.stat().st_size > IN_MEMORY
    fields: dict[str, Tensor] = {}
    convert: dict[str, Callable[[Tensor], Tensor]] = {}
    for name, value in known.items():
        if name in ("label", "domain"):
            fields[name] = _labels(value, name, path)
        elif name.endswith(("_ids", "_mask")):
            require(value.dim() == 2 and not value.is_floating_point(), f"'{name}' of {path} must be whole numbers "
                    f"[n, length], got {value.dtype} {tuple(value.shape)}", DataError)
            fields[name], convert[name] = value, Tensor.long
        else:
            _check_finite(value, name, path)
            field_values(value[:1], name, path)
            fields[name] = value
            convert[name] = partial(_converted, name=name, path=path, size=size, channels=channels)
    if large:
        return MappedSet(fields, convert)
    return TensorSet(**{name: convert[name](value) if name in convert else value for name, value in fields.items()})


def _converted(rows: Tensor, name: str, path: Path, size: int | None, channels: int | None) -> Tensor:
    values = field_values(rows, name, path)
    return coloured(resized(values, size), channels, str(path)) if name == "image" else values


def _npz(path: Path) -> dict[str, Tensor]:
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: torch.from_numpy(np.ascontiguousarray(_native(file[name]))) for name in file.files}
    except ValueError as error:
        if "pickle" not in str(error).lower():
            raise DataError(f"{path} is damaged: {error}") from error
        raise DataError(f"{path} holds pickled objects (arrays of dtype object): reading them could run any program "
                        "hidden in them, so they are refused. Save plain numeric arrays of one shape") from error
    except (TypeError, AttributeError) as error:
        raise DataError(f"{path} holds an array that is not numeric: {error}") from error
    except Exception as error:
        raise DataError(f"{path} is damaged or no .npz file: {type(error).__name__}: {error}") from error


def _native(array: np.ndarray) -> np.ndarray:
    """The array in this machine's byte order, unsigned integers in a type that torch has."""
    array = array.astype(array.dtype.newbyteorder("="))
    return array.astype(np.int64) if array.dtype.kind == "u" and array.dtype.itemsize > 1 else array


def _safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise DataError(f"{path} is damaged or no .safetensors file: {error}") from error


def _labels(value: Tensor, name: str, path: Path) -> Tensor:
    if value.is_floating_point() and value.dim() == 1 and bool((value == value.round()).all()):
        value = value.long()
    require(value.dim() == 1 and not value.is_floating_point(), f"'{name}' of {path} must be whole numbers [n], got "
            f"{value.dtype} {tuple(value.shape)}", DataError)
    require(int(value.min()) >= 0, f"'{name}' of {path} has negative labels; number the classes from 0, and leave "
            "unlabelled samples to a file of their own", DataError)
    return value.long()


def _check_finite(value: Tensor, name: str, path: Path) -> None:
    """Raise DataError where a number is not finite; read in blocks, so that a mapped array is never whole in memory."""
    if not value.is_floating_point():
        return
    step = max(1, BLOCK // max(1, value[0].numel()))
    bad: list[int] = []
    for start in range(0, len(value), step):
        part = value[start : start + step].float()
        finite = torch.isfinite(part.flatten(1) if part.dim() > 1 else part[:, None]).all(1)
        bad += [start + i for i in (~finite).nonzero().flatten().tolist()]
    require(not bad, f"'{name}' of {path} has NaN or infinite values in {len(bad)} of {len(value)} samples, the first "
            f"at index {(bad or [0])[0]}", DataError)


def field_values(value: Tensor, name: str, path: Path) -> Tensor:
    """Rows of a field as batches have them: pictures [n, channels, height, width], uint8 scaled to [-1, 1]."""
    if name == "condition" and value.dim() == 1 and not value.is_floating_point():
        return value.long()
    scaled = name in ("image", "other") and value.dtype == torch.uint8
    value = value.float()
    if name != "image" and not scaled:
        return value
    if value.dim() == 3:
        value = value[:, None]
    elif value.dim() == 4 and value.shape[1] not in (1, 3) and value.shape[-1] in (1, 3):
        value = value.permute(0, 3, 1, 2).contiguous()
    require(value.dim() == 4, f"'{name}' of {path} must be [n, channels, height, width], got {tuple(value.shape)}; "
            "samples of another shape are named 'x'", DataError)
    return value / 127.5 - 1 if scaled else value
