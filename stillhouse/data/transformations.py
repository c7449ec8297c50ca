"""Invertible transformations of pictures that a model can tell apart: quarter turns, permutations of the channels, and
both. All only move numbers, so that their inverses are exact."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from stillhouse.errors import DataError, UnknownNameError, require

Channels = tuple[int, ...]
CYCLES: tuple[Channels, ...] = ((0, 1, 2), (1, 2, 0), (2, 0, 1))
PERMUTATIONS: tuple[Channels, ...] = tuple(itertools.permutations(range(3)))


@dataclass(frozen=True)
class Transformation:
    """`turns` quarter turns against the clock, then channel c is taken from channel `channels[c]` (empty: as it is)."""

    turns: int = 0
    channels: Channels = ()

    def __call__(self, image: Float[Tensor, "n channels height width"]) -> Float[Tensor, "n channels h w"]:
        """Raises DataError for a permutation of other channels than the pictures have."""
        x = torch.rot90(image, self.turns, (2, 3)) if self.turns % 4 else image
        if not self.channels or self.channels == tuple(range(len(self.channels))):
            return x
        require(x.shape[1] == len(self.channels), f"{len(self.channels)} channels are permuted; the pictures have "
                f"{x.shape[1]}. Choose the rotations", DataError)
        return x[:, list(self.channels)]

    def inverse(self) -> Transformation:
        """What undoes it."""
        back = tuple(self.channels.index(c) for c in range(len(self.channels)))
        return Transformation(-self.turns % 4, back)


def _products(turns: Sequence[int], channels: Sequence[Channels]) -> tuple[Transformation, ...]:
    return tuple(Transformation(turn, order) for turn in turns for order in channels)


TRANSFORMATIONS: dict[str, tuple[Transformation, ...]] = {
    "none": _products((0,), ((),)),
    "rotations": _products(range(4), ((),)),
    "half turns": _products((0, 2), ((),)),
    "colour cycles": _products((0,), CYCLES),
    "colour permutations": _products((0,), PERMUTATIONS),
    "rotations and colour cycles": _products(range(4), CYCLES),
    "rotations and colour permutations": _products(range(4), PERMUTATIONS),
}
"""Sets of M = 1, 4, 2, 3, 6, 12 and 24 transformations by name; the first of each is the identity."""


def transformations(name: str) -> tuple[Transformation, ...]:
    """The set of that name. Raises UnknownNameError."""
    require(name in TRANSFORMATIONS, f"transformations are one of {', '.join(TRANSFORMATIONS)}, not {name!r}",
            UnknownNameError)
    return TRANSFORMATIONS[name]


def copies(image: Float[Tensor, "n channels height width"], chosen: Sequence[Transformation]
           ) -> Float[Tensor, "copies channels height width"]:
    """Every picture under every transformation, [n M, c, h, w], the transformation fastest: row i M + j is picture i
    under j. Raises DataError for pictures that a quarter turn or a permutation does not fit."""
    odd = any(t.turns % 2 for t in chosen)
    require(not odd or image.shape[2] == image.shape[3], f"quarter turns need square pictures, not "
            f"{tuple(image.shape[2:])}", DataError)
    return torch.stack([t(image) for t in chosen], 1).flatten(0, 1)
