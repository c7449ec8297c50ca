"""A fixed number of views of every picture: the same ones always, so that what a teacher says of them can be kept."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from stillhouse.data.augment import shift
from stillhouse.data.sets import fetch
from stillhouse.errors import DataError, require


class FixedViews:
    """`views` views of every picture of a set; item i * views + v is view v of picture i, other fields are its own.

    View 0 is the picture as it is. The others are moved by whole pixels, at most `reach` of the side, and mirrored half
    of the time where `flip`; a view is a function of (seed, i, v) and exact to the bit on every machine. Pixels that
    come from outside are `fill`.
    """

    def __init__(self, data: Any, views: int, flip: bool = False, reach: float = 0.125, seed: int = 0,
                 fill: float = -1.0):
        require(views >= 1 and 0 <= reach < 1, f"views is at least 1 and reach in [0, 1), not {views} and {reach}")
        require(len(data) > 0, "the data set is empty; give at least one sample", DataError)
        require("image" in fetch(data, [0]), "views are made of pictures, and the data has no field 'image'", DataError)
        self.data, self.views, self.flip, self.reach, self.seed, self.fill = data, views, flip, reach, seed, fill

    @property
    def fields(self) -> tuple[str, ...]:
        return self.data.fields

    def __len__(self) -> int:
        return len(self.data) * self.views

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        return {name: value[0] for name, value in self.batch([index % len(self)]).items()}

    def batch(self, indices: Sequence[int] | Tensor) -> dict[str, Any]:
        where = torch.as_tensor(indices, dtype=torch.long)
        fields = fetch(self.data, (where // self.views).tolist())
        pictures = zip(fields["image"].split(1), where.tolist(), strict=True)
        image = torch.cat([self._view(picture, i) for picture, i in pictures])
        return {**fields, "index": where, "image": image}

    def _view(self, picture: Tensor, index: int) -> Tensor:
        if index % self.views == 0:
            return picture
        words = f"{self.seed} {index // self.views} {index % self.views}".encode()
        generator = torch.Generator().manual_seed(int.from_bytes(hashlib.blake2b(words, digest_size=4).digest(), "big"))
        draw = torch.rand(3, generator=generator)
        far = round(self.reach * min(picture.shape[-2:]))
        offset = ((draw[:2] * (2 * far + 1)).long() - far)[None]
        moved = shift(picture, offset, self.fill) if far else picture
        return moved.flip(-1) if self.flip and float(draw[2]) < 0.5 else moved


def with_views(data: Any, views: int, **options: Any) -> FixedViews:
    """`data` with a fixed number of views of every picture; options as in `FixedViews`. Give the same ones where a
    teacher's outputs are kept and where they are used."""
    return FixedViews(data, views, **options)
