"""What a model takes to store, in bits: the formulas, and the accounts of a quantised model."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from stillhouse.errors import DataError, require
from stillhouse.parts.packed import QuantizedModel
from stillhouse.parts.quantizers import Code

FULL = 32


def tensor_bits(n: int, bits: float, bucket: int | None = 256, full: int = FULL) -> float:
    """b N + 2 f ceil(N / k): N indices of b bits, two numbers of f bits for each bucket of k (Polino et al. 2018,
    section 3). `bits` may be a mean length."""
    require(n >= 1 and bits >= 0, f"a tensor of {n} values with {bits} bits each has no size")
    return bits * n + 2 * full * (1 if bucket is None else -(-n // bucket))


def compression(bits: float, bucket: int, full: int = FULL) -> float:
    """k f / (k b + 2 f): how many times smaller a long tensor becomes."""
    return bucket * full / (bucket * bits + 2 * full)


def huffman_lengths(counts: Sequence[int]) -> list[int]:
    """Bits of each symbol in a Huffman code for these counts; 0 for a symbol that does not occur, or is alone."""
    require(all(c >= 0 for c in counts) and sum(counts) > 0, "counts must be 0 or more, and some above 0", DataError)
    lengths = [0] * len(counts)
    heap = [(count, symbol, [symbol]) for symbol, count in enumerate(counts) if count > 0]
    heapq.heapify(heap)
    while len(heap) > 1:
        few, _, left = heapq.heappop(heap)
        more, first, right = heapq.heappop(heap)
        for symbol in left + right:
            lengths[symbol] += 1
        heapq.heappush(heap, (few + more, first, left + right))
    return lengths


def huffman_mean(index: Tensor) -> float:
    """Mean bits of an index, Huffman coded by how often each occurs: within 1 of the entropy, and never below it."""
    counts = torch.bincount(index.flatten().long().cpu()).tolist()
    total = sum(c * length for c, length in zip(counts, huffman_lengths(counts), strict=True))
    return total / sum(counts)


def code_bits(code: Code, huffman: bool = False) -> float:
    """Bits of one quantised tensor: indices (with `huffman`: so coded, without the code's own table), the ends of its
    buckets, and its points where they are learned."""
    n = code.index.numel()
    points = 0 if code.points is None else FULL * len(code.points)
    return tensor_bits(n, huffman_mean(code.index) if huffman else code.bits, code.bucket) + points


@dataclass(frozen=True)
class Size:
    """Bits of a quantised model: of what is quantised, of the same Huffman coded, of the same in full precision, and of
    what is stored as it is."""

    quantized: float
    huffman: float
    full: float
    rest: float

    @property
    def ratio(self) -> float:
        """How many times smaller the quantised tensors became; NaN where nothing is quantised."""
        return self.full / self.quantized if self.quantized else float("nan")

    @property
    def megabytes(self) -> float:
        """Of the whole model, in 10^6 bytes."""
        return (self.quantized + self.rest) / 8e6

    @property
    def huffman_megabytes(self) -> float:
        """The same with Huffman coded indices."""
        return (self.huffman + self.rest) / 8e6


def model_size(target: QuantizedModel) -> Size:
    """The accounts of a quantised model."""
    codes = target.codes.values()
    return Size(sum(code_bits(c) for c in codes), sum(code_bits(c, huffman=True) for c in codes),
                sum(FULL * c.index.numel() for c in codes),
                sum(8 * v.numel() * v.element_size() for v in target.rest().values()))


def full_bits(model: nn.Module) -> int:
    """Bits of all parameters and buffers of a model as they are, tied ones once."""
    tensors = {id(v): v for v in model.state_dict(keep_vars=True).values()}
    return sum(8 * v.numel() * v.element_size() for v in tensors.values())
