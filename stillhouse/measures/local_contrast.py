"""Contrast between the local features of two maps: windows of several sizes, matched by their place.

A local feature is the mean of a map over a window. Rows of the matrices compared are local features, their columns
channels; `info_nce` on rows asks which window a feature comes from, on columns which channel.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from stillhouse.errors import ConfigError, DataError, require
from stillhouse.measures.divergences import Reduction, reduce_samples


def window_sizes(grid: Sequence[int], parts: Sequence[float]) -> list[tuple[int, int]]:
    """Window height and width for each of the `parts` of the grid's sides, rounded, at least 1; equal ones once.

    Raises ConfigError for a part outside of (0, 1].
    """
    require(len(parts) >= 1 and all(0 < part <= 1 for part in parts), f"window sizes are parts of a map's side in "
            f"(0, 1], one or more; got {tuple(parts)}", ConfigError)
    return list(dict.fromkeys((max(1, round(part * grid[0])), max(1, round(part * grid[1]))) for part in parts))


def window_means(x: Float[Tensor, "n channels height width"], size: tuple[int, int], stride: tuple[int, int] = (1, 1)
                 ) -> Float[Tensor, "n windows channels"]:
    """Means over sliding windows, row by row: (H - k + 1)(W - k + 1) of them at stride 1. The window of the map's size
    gives global average pooling. Raises DataError for a window larger than the map."""
    require(size[0] <= x.shape[2] and size[1] <= x.shape[3], f"a window of {size} does not fit into a map of "
            f"{tuple(x.shape[2:])}", DataError)
    if size == tuple(x.shape[2:]):
        return x.mean((2, 3))[:, None]
    return F.avg_pool2d(x, size, stride).flatten(2).transpose(1, 2)


def window_contrast(
    student: Float[Tensor, "n windows features"],
    teacher: Float[Tensor, "n windows features"],
    temperature: float = 0.1,
    same_place: bool = False,
    group: Int[Tensor, "n windows"] | None = None,
    label: Int[Tensor, " n"] | None = None,
    weight: Float[Tensor, "n windows"] | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """Sample-wise loss, -log of the share of the teacher's window at the same place of the same picture.

    Negatives are all other windows of the batch, those of the same picture included; with `same_place` only the same
    window of the other pictures. `group` keeps windows of different groups from being each other's negatives, `label`
    those of two pictures of one class. `weight` multiplies each window's loss. Raises DataError for unequal shapes,
    ConfigError for a temperature of 0 or less.
    """
    _check(student, teacher, temperature)
    n, windows = student.shape[:2]
    s, t = F.normalize(student, dim=-1) / temperature, F.normalize(teacher, dim=-1)
    nearness = (s * t).sum(-1)
    if same_place:
        logits = torch.einsum("ipd,jpd->pij", s, t)
        if group is not None:
            logits = logits.masked_fill(group.T[:, :, None] != group.T[:, None, :], -torch.inf)
        if label is not None:
            logits = logits.masked_fill(_alike(label, torch.arange(n, device=s.device)), -torch.inf)
        total = logits.logsumexp(2).T
    else:
        s, t = s.flatten(0, 1), t.flatten(0, 1)
        picture = torch.arange(n, device=s.device).repeat_interleave(windows)
        whole = torch.zeros(n * windows, dtype=torch.long, device=s.device) if group is None else group.flatten()
        members = [(whole == value).nonzero().flatten() for value in whole.unique().tolist()]
        parts = []
        for mine in members:
            logits = s[mine] @ t[mine].T
            if label is not None:
                logits = logits.masked_fill(_alike(label[picture[mine]], picture[mine]), -torch.inf)
            parts.append(logits.logsumexp(1))
        total = torch.cat(parts)[torch.cat(members).argsort()].view(n, windows)
    return reduce_samples(total - nearness, weight, reduction=reduction)


def channel_contrast(
    student: Float[Tensor, "samples channels"],
    teacher: Float[Tensor, "samples channels"],
    temperature: float = 0.1,
    mask: Bool[Tensor, " samples"] | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """Feature-wise loss: each channel over the samples is one vector; -log of the share of the teacher's same channel
    among all channels. Samples outside of `mask` count as 0. Raises as `window_contrast` does."""
    _check(student[None], teacher[None], temperature)
    if mask is not None:
        student, teacher = (x * mask[:, None] for x in (student, teacher))
    logits = F.normalize(student, dim=0).T @ F.normalize(teacher, dim=0) / temperature
    return reduce_samples(logits.logsumexp(1) - logits.diagonal(), reduction=reduction)


def _alike(label: Tensor, picture: Tensor) -> Tensor:
    """Which pairs are of one class and of two pictures."""
    return (label[:, None] == label) & (picture[:, None] != picture)


def _check(student: Tensor, teacher: Tensor, temperature: float) -> None:
    require(student.dim() == 3 and student.shape == teacher.shape, "local features of two models are compared in one "
            f"shape; got {tuple(student.shape)} and {tuple(teacher.shape)}", DataError)
    require(temperature > 0, f"temperature must be above 0, not {temperature}", ConfigError)
