"""A model whose weights are stored in few bits."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int, UInt8
from torch import Tensor, nn

from stillhouse import store
from stillhouse.errors import DamagedFileError, RoleError, StoreError, require
from stillhouse.parts.quantizers import Code

WEIGHTS, LAYOUT = "weights.safetensors", "quantized.json"


def pack_bits(index: Int[Tensor, " n"], bits: int) -> UInt8[Tensor, " bytes"]:
    """Numbers below 2^bits one after the other, the lowest bit first, in ceil(n bits / 8) bytes."""
    numbers = index.cpu().numpy().astype(np.uint32)
    planes = (numbers[:, None] >> np.arange(bits, dtype=np.uint32)) & 1
    return torch.from_numpy(np.packbits(planes.astype(np.uint8), bitorder="little"))


def unpack_bits(packed: UInt8[Tensor, " bytes"], n: int, bits: int) -> Int[Tensor, " n"]:
    """The inverse of `pack_bits`."""
    planes = np.unpackbits(packed.cpu().numpy(), count=n * bits, bitorder="little").reshape(n, bits)
    return torch.from_numpy(planes.astype(np.int32) @ (1 << np.arange(bits, dtype=np.int32)))


class QuantizedModel:
    """A model with quantised weights, and their code: what quantisation returns.

    `model` is the network with Q(w) for weights; it can be used, trained on or exported as any other. `codes` has the
    `Code` of each quantised parameter by name. Calling it calls the model.
    """

    def __init__(self, model: nn.Module, codes: Mapping[str, Code]):
        self.model, self.codes = model, dict(codes)
        named = dict(model.named_parameters())
        with torch.no_grad():
            for name, code in self.codes.items():
                require(name in named and tuple(named[name].shape) == tuple(code.shape), f"{type(model).__name__} has "
                        f"no parameter '{name}' of shape {tuple(code.shape)}", RoleError)
                named[name].copy_(code.decode())

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)

    def rest(self) -> dict[str, Tensor]:
        """What is stored as it is: other parameters, and buffers. Tied tensors once."""
        state = self.model.state_dict(keep_vars=True)
        coded = {id(p) for name, p in self.model.named_parameters() if name in self.codes}
        seen: set[int] = set()
        rest = {}
        for name, value in state.items():
            if id(value) not in coded and id(value) not in seen:
                rest[name] = value.detach()
            seen.add(id(value))
        return rest

    def save(self, folder: Path | str) -> Path:
        """Write the packed indices, the buckets' ends, the points and all else into `folder`.

        `QuantizedModel.load(folder, network)` reads them. Raises StoreError where that is not possible.
        """
        folder, rest = Path(folder), self.rest()
        codes = self.codes.values()
        loose: dict[str, list[Tensor]] = {}
        for value in rest.values():
            loose.setdefault(_kind(value), []).append(value.cpu().flatten())
        tree = {
            "index": _joined([pack_bits(c.index, c.bits) for c in codes], torch.uint8),
            "low": _joined([c.low.cpu() for c in codes]), "high": _joined([c.high.cpu() for c in codes]),
            "points": _joined([c.points.cpu() for c in codes if c.points is not None]),
            "rest": {kind: torch.cat(values) for kind, values in loose.items()},
        }
        layout = {
            "quantized": [[name, list(c.shape), c.levels, c.bucket, c.points is not None]
                          for name, c in self.codes.items()],
            "rest": [[name, list(value.shape), _kind(value)] for name, value in rest.items()],
        }
        store.save_tree(folder / WEIGHTS, tree)
        store.write_text(folder / LAYOUT, json.dumps(layout))
        return folder

    @classmethod
    def load(cls, folder: Path | str, network: nn.Module) -> QuantizedModel:
        """The model saved in `folder`, bit for bit, its weights put into `network`.

        Raises StoreError where there is none or the network has other weights, DamagedFileError for a broken file.
        """
        folder = Path(folder)
        if not (folder / LAYOUT).is_file():
            raise StoreError(f"{folder} holds no quantised model: {LAYOUT} is missing")
        tree = store.load_tree(folder / WEIGHTS)
        try:
            layout = json.loads((folder / LAYOUT).read_text(encoding="utf-8"))
            codes = _codes(tree, layout["quantized"])
            rest = _rest(tree["rest"], layout["rest"])
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise DamagedFileError(f"{folder} does not hold a quantised model ({error})") from error
        own = network.state_dict(keep_vars=True)
        stored = {**{name: code.shape for name, code in codes.items()},
                  **{name: tuple(value.shape) for name, value in rest.items()}}
        wrong = [name for name, shape in stored.items() if name not in own or tuple(own[name].shape) != tuple(shape)]
        filled = {id(own[name]) for name in stored if name in own}
        wrong += [name for name, value in own.items() if id(value) not in filled]
        if wrong:
            raise StoreError(f"the network given does not have the weights saved in {folder}: they differ in "
                             f"{', '.join(wrong[:3])}")
        with torch.no_grad():
            for name, value in rest.items():
                own[name].copy_(value)
        return cls(network, codes)


def _kind(value: Tensor) -> str:
    return str(value.dtype).removeprefix("torch.")


def _joined(parts: list[Tensor], kind: torch.dtype = torch.float32) -> Tensor:
    return torch.cat(parts) if parts else torch.zeros(0, dtype=kind)


def _codes(tree: dict[str, Tensor], layout: list[Any]) -> dict[str, Code]:
    codes: dict[str, Code] = {}
    at, bucket_at, point_at = 0, 0, 0
    for name, shape, levels, bucket, learned in layout:
        n = math.prod(shape)
        buckets = 1 if bucket is None or n <= bucket else -(-n // bucket)
        low, high = (tree[end][bucket_at : bucket_at + buckets] for end in ("low", "high"))
        points = tree["points"][point_at : point_at + levels] if learned else None
        code = Code(torch.zeros(0), low, high, points, levels, bucket, tuple(shape))
        size = -(-n * code.bits // 8)
        if len(low) < buckets or at + size > len(tree["index"]):
            raise ValueError(f"too short for '{name}'")
        code.index = unpack_bits(tree["index"][at : at + size], n, code.bits)
        codes[name] = code
        at, bucket_at, point_at = at + size, bucket_at + buckets, point_at + (levels if learned else 0)
    return codes


def _rest(flat: dict[str, Tensor], layout: list[Any]) -> dict[str, Tensor]:
    rest: dict[str, Tensor] = {}
    at = dict.fromkeys(flat, 0)
    for name, shape, kind in layout:
        n = math.prod(shape)
        rest[name] = flat[kind][at[kind] : at[kind] + n].view(tuple(shape))
        at[kind] += n
    return rest
