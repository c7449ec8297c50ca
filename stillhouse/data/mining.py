"""Mining an unlabelled pool: a teacher's scores, the best k per class, and no near-duplicate of the evaluation set."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from stillhouse.data.sets import TensorSet, fetch
from stillhouse.errors import DataError, require

Descriptor = Callable[[Float[Tensor, "n channels height width"]], Float[Tensor, "n views features"]]
"""Pictures to unit vectors, several per picture: the first describes the picture itself, the others small shifts."""


@torch.no_grad()
def score_pool(
    teacher: Callable[[Tensor], Tensor],
    pool: Any,
    batch: int = 256,
    device: torch.device | str = "cpu",
) -> tuple[Int[Tensor, " n"], Float[Tensor, " n"]]:
    """The teacher's most probable class of every picture of the pool and its probability (SSLD, section 3.2).

    The teacher is used in the mode it is in: freeze it first.
    """
    require(len(pool) > 0, "the pool is empty; give at least one picture", DataError)
    labels, scores = [], []
    for start in range(0, len(pool), batch):
        images = fetch(pool, range(start, min(start + batch, len(pool))))["image"].to(device)
        score, label = teacher(images).float().softmax(-1).max(-1)
        labels.append(label.cpu())
        scores.append(score.cpu())
    return torch.cat(labels), torch.cat(scores)


def top_k_per_class(
    labels: Int[Tensor, " n"], scores: Float[Tensor, " n"], k: int, allowed: Bool[Tensor, " n"] | None = None
) -> Int[Tensor, " chosen"]:
    """Positions of the k best scored samples of each class among the `allowed`, in ascending order.

    A class with fewer gives all it has. Among equal scores the earlier sample wins.
    """
    require(k >= 1, f"k must be at least 1, not {k}")
    chosen = []
    for label in labels.unique().tolist():
        member = labels == label
        where = (member if allowed is None else member & allowed).nonzero().flatten()
        chosen.append(where[scores[where].argsort(descending=True, stable=True)[:k]])
    return torch.cat(chosen).sort().values if chosen else torch.empty(0, dtype=torch.long)


def shifted_pictures(
    images: Float[Tensor, "n channels height width"], shift: int = 1, size: int = 32
) -> Float[Tensor, "n views features"]:
    """A `Descriptor`: pixels of the grey picture and its shifts by up to `shift` pixels, centred and of unit length.

    The inner product of two of them is the normalised correlation: 1 for a copy, also after a change of brightness or
    contrast. Pictures larger than `size` are scaled down to it first. A picture of one colour gives zeros.
    """
    grey = images.float().mean(1, keepdim=True)
    if max(grey.shape[-2:]) > size:
        grey = F.interpolate(grey, (size, size), mode="bilinear", antialias=True, align_corners=False)
    h, w = (side - 2 * shift for side in grey.shape[-2:])
    require(min(h, w) >= 2, f"pictures of {tuple(grey.shape[-2:])} pixels are too small for shifts of {shift}",
            DataError)
    corners = sorted(((y, x) for y in range(2 * shift + 1) for x in range(2 * shift + 1)),
                     key=lambda at: abs(at[0] - shift) + abs(at[1] - shift))
    views = torch.stack([grey[:, 0, y : y + h, x : x + w].flatten(1) for y, x in corners], 1)
    centred = views - views.mean(-1, keepdim=True)
    norm = centred.norm(dim=-1, keepdim=True)
    return torch.where(norm > 1e-6, centred / norm.clamp_min(1e-6), torch.zeros_like(centred))


@torch.no_grad()
def near_duplicates(
    pool: Any,
    reference: Any,
    threshold: float = 0.98,
    describe: Descriptor = shifted_pictures,
    batch: int = 256,
) -> Bool[Tensor, " n"]:
    """Which pictures of the pool repeat one of `reference`: best inner product of their descriptors >= threshold.

    The views of the pool's picture are compared with the first view of the reference's. `describe` may be any function
    of that form (SIFT or a copy-detection network on large pictures). Pictures of one colour never match.
    """
    references = torch.cat([describe(_images(reference, start, batch))[:, 0] for start in _starts(reference, batch)])
    found = []
    for start in _starts(pool, batch):
        views = describe(_images(pool, start, batch))
        require(views.shape[-1] == references.shape[-1], "pool and reference pictures give descriptors of different "
                f"length ({views.shape[-1]} and {references.shape[-1]}); bring them to one size", DataError)
        best = views.new_full((len(views),), -torch.inf)
        for part in references.split(2048):
            best = torch.maximum(best, (views @ part.T).flatten(1).amax(1))
        found.append(best >= threshold)
    return torch.cat(found)


def _starts(data: Any, batch: int) -> range:
    require(len(data) > 0, "cannot look for duplicates in an empty set", DataError)
    return range(0, len(data), batch)


def _images(data: Any, start: int, batch: int) -> Tensor:
    return fetch(data, range(start, min(start + batch, len(data))))["image"]


class Pictures:
    """The pictures, and nothing else, of several sets one after another, read when asked for.

    `parts` are pairs of a set and the positions to take from it (None: all).
    """

    fields = ("image",)

    def __init__(self, *parts: tuple[Any, Int[Tensor, " n"] | None]):
        self.parts = [(data, None if chosen is None else chosen.tolist()) for data, chosen in parts]
        self.lengths = [len(data) if chosen is None else len(chosen) for data, chosen in self.parts]

    def __len__(self) -> int:
        return sum(self.lengths)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        place = index
        for (data, chosen), length in zip(self.parts, self.lengths, strict=True):
            if place < length:
                return {"index": index, "image": data[place if chosen is None else chosen[place]]["image"]}
            place -= length
        raise AssertionError


def pictures(*parts: tuple[Any, Int[Tensor, " n"] | None]) -> Any:
    """`Pictures` of these parts, as one TensorSet if all of them are in memory. Labels are left behind."""
    if all(isinstance(data, TensorSet) for data, _ in parts):
        chosen = [data.image if where is None else data.image[where] for data, where in parts]
        return TensorSet(image=torch.cat(chosen))
    return Pictures(*parts)
