"""Harder forms of a labelled set: wrong labels, few of each class, a long tail. Clean labels are kept for scores."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Int
from torch import Tensor

from stillhouse.data.sets import TensorSet, column
from stillhouse.errors import DataError, require


def noisy_labels(data: TensorSet, share: float, seed: int = 0, classes: int | None = None,
                 into: Sequence[int] | None = None) -> TensorSet:
    """The same set with a `share` of wrong labels, exactly round(share n) of them; the true ones stand in `clean`.

    A wrong label is another class, each equally likely; or, with `into`, class y becomes into[y] (structured noise:
    confusion with one similar class, where into[y] = y leaves it right). The same arguments give the same labels.
    """
    require(0 <= share <= 1, f"share is a part of the labels in [0, 1], not {share}", DataError)
    label = data.label
    classes = classes or int(label.max()) + 1
    require(classes >= 2, "a wrong label needs a second class", DataError)
    generator = torch.Generator().manual_seed(seed)
    wrong = torch.randperm(len(label), generator=generator)[: round(share * len(label))]
    if into is None:
        other = (label[wrong] + torch.randint(1, classes, (len(wrong),), generator=generator)) % classes
    else:
        require(len(into) == classes, f"`into` needs a class for each of {classes}, got {len(into)}", DataError)
        other = torch.as_tensor(into)[label[wrong]]
    return data.with_fields(label=label.index_copy(0, wrong, other), clean=label.clone())


def noisy_split(data: TensorSet, train: int, held_out: int, share: float, seed: int = 0,
                into: Sequence[int] | None = None) -> tuple[TensorSet, TensorSet]:
    """Two random parts of a set, of `train` samples with a `share` of wrong labels (see `noisy_labels`) and of
    `held_out` clean ones. Raises DataError where there are too few."""
    require(train + held_out <= len(data), f"{train} and {held_out} samples of {len(data)}", DataError)
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))
    return (noisy_labels(data.select(order[:train]), share, seed, into=into),
            data.select(order[train : train + held_out]))


def balanced_indices(label: Int[Tensor, " n"], per_class: int | Sequence[int] | float, seed: int = 0
                     ) -> Int[Tensor, " m"]:
    """Positions of a random subset in ascending order: `per_class` of each class, a number for each class, or, given a
    fraction, round(fraction n_c) of each. Raises DataError where a class has too few."""
    generator = torch.Generator().manual_seed(seed)
    chosen = []
    for position, y in enumerate(label.unique().tolist()):
        members = (label == y).nonzero().flatten()
        if isinstance(per_class, float):
            count = round(per_class * len(members))
        else:
            count = per_class if isinstance(per_class, int) else per_class[position]
        require(0 <= count <= len(members), f"class {y} has {len(members)} samples, not {count}", DataError)
        chosen.append(members[torch.randperm(len(members), generator=generator)[:count]])
    return torch.cat(chosen).sort().values


def balanced(data: TensorSet, per_class: int | Sequence[int] | float, seed: int = 0) -> TensorSet:
    """A random subset with the same number, or the same share, of every class; see `balanced_indices`."""
    return data.select(balanced_indices(data.label, per_class, seed))


def long_tail_counts(classes: int, largest: int, imbalance: float) -> list[int]:
    """n_c = largest imbalance^(-c / (classes - 1)), rounded, at least 1: an exponential profile (Cui et al. 2019)."""
    require(classes >= 2 and imbalance >= 1, f"a long tail needs two classes and an imbalance of 1 or more; got "
            f"{classes} and {imbalance}", DataError)
    return [max(1, round(largest * imbalance ** (-c / (classes - 1)))) for c in range(classes)]


def long_tailed(data: TensorSet, largest: int, imbalance: float, seed: int = 0) -> TensorSet:
    """A random subset whose classes, in the order of their labels, have the counts of `long_tail_counts`."""
    return balanced(data, long_tail_counts(len(data.label.unique()), largest, imbalance), seed)


def class_counts(data: object, classes: int | None = None) -> Int[Tensor, " classes"]:
    """How many samples each class has."""
    return torch.bincount(column(data, "label"), minlength=classes or 0)


def degraded(data: TensorSet, share: float, noise: float = 0.5, erased: float = 0.5, seed: int = 0) -> TensorSet:
    """The same set with a `share` of its pictures made hard to read, exactly round(share n), told by the field
    `degraded`: a box of `erased` times each side set to the picture's lowest value, at a random place, and Gaussian
    noise of standard deviation `noise` on all pixels. The same arguments give the same pictures."""
    require(0 <= share <= 1 and noise >= 0 and 0 <= erased <= 1, "share and erased must lie in [0, 1] and noise must "
            f"not be negative; got {share}, {erased} and {noise}", DataError)
    generator = torch.Generator().manual_seed(seed)
    n, _, height, width = data.image.shape
    hard = torch.zeros(n, dtype=torch.bool)
    hard[torch.randperm(n, generator=generator)[: round(share * n)]] = True
    box = [round(erased * side) for side in (height, width)]
    corner = [torch.randint(side - part + 1, (n, 1), generator=generator)
              for side, part in zip((height, width), box, strict=True)]
    rows, columns = ((torch.arange(side) >= at) & (torch.arange(side) < at + part)
                     for side, at, part in zip((height, width), corner, box, strict=True))
    hidden = (rows[:, :, None] & columns[:, None, :])[:, None]
    image = torch.where(hidden, data.image.amin((1, 2, 3), keepdim=True), data.image)
    image = image + noise * torch.randn(image.shape, generator=generator)
    return data.with_fields(image=torch.where(hard[:, None, None, None], image, data.image), degraded=hard)
