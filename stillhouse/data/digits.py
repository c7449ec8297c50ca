"""Handwritten digits, bundled with scikit-learn: 1,797 grey pictures of 8 x 8 pixels in 10 classes."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from stillhouse.data.sets import TensorSet
from stillhouse.errors import DataError, UnknownNameError, require

SPLITS = {
    "all": (0, 1797),
    "train": (0, 1200),
    "test": (1200, 1797),
    "labelled": (0, 200),
    "unlabelled": (200, 1200),
}
"""Ranges of one fixed stratified order: `labelled` (200) and `unlabelled` (1,000) make up `train`; `test` has 597."""

CORRUPTIONS = ("noise", "shuffled", "chimera", "occluded", "inverted")
"""Ways in which a picture of `corrupted_digits` is no digit; its field `kind` is the position in this list."""


def digits(size: int = 8, split: str = "train") -> TensorSet:
    """A split of the digits: `image` float32 [n, 1, size, size] in [-1, 1] (background -1, ink 1), `label` int64 [n].

    Sizes other than 8 are bilinear enlargements. The split is fixed and stratified: every range of it holds the
    classes in the proportions of the whole.

    Raises UnknownNameError for a split that is not in `SPLITS`, DataError for a size under 8.
    """
    require(split in SPLITS, f"there is no split '{split}' of the digits; choose one of {', '.join(SPLITS)}",
            UnknownNameError)
    require(size >= 8, f"digits are 8 pixels wide and can only be enlarged; got size {size}", DataError)
    images, labels = _ordered()
    low, high = SPLITS[split]
    return TensorSet(image=_resize(images[low:high], size), label=labels[low:high].clone())


def corrupted_digits(n: int, size: int = 8, split: str = "unlabelled", seed: int = 0) -> TensorSet:
    """`n` pictures that belong to no class, made of the pictures of `split`, for pools that need mining.

    In turn: pixels of noise; the four quarters in another order; the upper half of one digit on the lower half of a
    digit of another class; all but a quarter of the picture erased; ink and background exchanged. Fields: `image` as
    in `digits`, `kind` int64 [n] (see `CORRUPTIONS`). The same arguments give the same pictures.
    """
    require(n >= 1, f"n must be at least 1, not {n}", DataError)
    source = digits(8, split)
    generator = torch.Generator().manual_seed(seed)
    kinds = torch.arange(n) % len(CORRUPTIONS)
    first = torch.randint(len(source), (n,), generator=generator)
    pictures = [_corrupt(CORRUPTIONS[kind], source, int(i), generator)
                for kind, i in zip(kinds.tolist(), first.tolist(), strict=True)]
    return TensorSet(image=_resize(torch.stack(pictures), size), kind=kinds)


def _corrupt(kind: str, source: TensorSet, i: int, generator: torch.Generator) -> Tensor:
    picture = source.image[i].clone()
    if kind == "noise":
        return torch.rand(picture.shape, generator=generator) * 2 - 1
    if kind == "shuffled":
        turn = int(torch.randint(1, 4, (1,), generator=generator))
        quarters = [picture[:, y : y + 4, x : x + 4] for y, x in ((0, 0), (0, 4), (4, 4), (4, 0))]
        a, b, c, d = quarters[turn:] + quarters[:turn]
        return torch.cat([torch.cat([a, b], 2), torch.cat([d, c], 2)], 1)
    if kind == "chimera":
        others = (source.label != source.label[i]).nonzero().flatten()
        other = others[torch.randint(len(others), (1,), generator=generator)].item()
        return torch.cat([picture[:, :4], source.image[other][:, 4:]], 1)
    if kind == "occluded":
        y, x = (4 * torch.randint(2, (2,), generator=generator)).tolist()
        erased = torch.full_like(picture, -1.0)
        erased[:, y : y + 4, x : x + 4] = picture[:, y : y + 4, x : x + 4]
        return erased
    return -picture


@functools.cache
def _ordered() -> tuple[Tensor, Tensor]:
    """All pictures and labels, each class shuffled and then dealt out evenly."""
    from sklearn.datasets import load_digits

    raw = load_digits()
    images = torch.from_numpy(raw.images).float().div(8).sub(1)[:, None]
    labels = torch.from_numpy(raw.target).long()
    generator = torch.Generator().manual_seed(0)
    place = torch.empty(len(labels), dtype=torch.double)
    for label in range(10):
        where = (labels == label).nonzero().flatten()
        where = where[torch.randperm(len(where), generator=generator)]
        place[where] = (torch.arange(len(where), dtype=torch.double) + 0.5) / len(where)
    order = place.argsort(stable=True)
    return images[order], labels[order]


def _resize(images: Tensor, size: int) -> Tensor:
    if size == images.shape[-1]:
        return images.clone()
    return F.interpolate(images, (size, size), mode="bilinear", align_corners=False)
