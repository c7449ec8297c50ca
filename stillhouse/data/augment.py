"""Augmentations of a batch of pictures, as tensor code: differentiable, and on the device of the pictures.

Random numbers come from the given generator, or from torch's global one. They are drawn on the CPU, so a seed gives
the same augmentation on every device. Pixels that come from outside of a picture take the value `fill`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from stillhouse.errors import DataError, require

Pictures = Float[Tensor, "batch channels height width"]
Augment = Callable[[Tensor], Tensor]

DSA_GROUPS = ("color", "crop", "cutout", "flip", "scale", "rotate")
DSA_PAPER = "color_crop_cutout_flip_scale_rotate"
DSA_DIGITS = "color_crop_cutout_scale_rotate"


# -------------------------------------------------------------------- single operations, one parameter per picture


def affine(images: Pictures, matrix: Float[Tensor, "n 2 3"], fill: float = 0.0) -> Pictures:
    """Resample bilinearly under `matrix` (output to input coordinates in [-1, 1]; n = batch or 1)."""
    grid = F.affine_grid(matrix.expand(len(images), 2, 3).to(images.dtype), list(images.shape), align_corners=True)
    return F.grid_sample(images - fill, grid, align_corners=True) + fill


def rotation(degrees: Float[Tensor, " n"]) -> Float[Tensor, "n 2 3"]:
    angle = degrees * (math.pi / 180)
    zero = torch.zeros_like(angle)
    return torch.stack([angle.cos(), -angle.sin(), zero, angle.sin(), angle.cos(), zero], -1).view(-1, 2, 3)


def scaling(x: Float[Tensor, " n"], y: Float[Tensor, " n"]) -> Float[Tensor, "n 2 3"]:
    """Factors on input coordinates: below 1 the picture grows."""
    zero = torch.zeros_like(x)
    return torch.stack([x, zero, zero, zero, y, zero], -1).view(-1, 2, 3)


def shift(images: Pictures, offset: Tensor, fill: float = 0.0) -> Pictures:
    """Move by whole pixels: output [y, x] is input [y + dy, x + dx] (offset [n, 2], n = batch or 1)."""
    b, _, h, w = images.shape
    reach = int(offset.abs().max())
    padded = F.pad(images, [reach] * 4, value=fill)
    where = (offset + reach).to(images.device).expand(b, 2)
    rows = where[:, 0, None] + torch.arange(h, device=images.device)
    columns = where[:, 1, None] + torch.arange(w, device=images.device)
    picture = torch.arange(b, device=images.device)[:, None, None]
    return padded.movedim(1, -1)[picture, rows[:, :, None], columns[:, None, :]].movedim(-1, 1)


def cutout(images: Pictures, top_left: Tensor, side: tuple[int, int], fill: float = 0.0) -> Pictures:
    """Erase a rectangle of `side` (height, width) whose corner is `top_left` [n, 2]; parts outside are cut off."""
    h, w = images.shape[-2:]
    top, left = top_left.to(images.device).unbind(-1)
    rows, columns = torch.arange(h, device=images.device), torch.arange(w, device=images.device)
    inside_rows = (rows >= top[:, None]) & (rows < top[:, None] + side[0])
    inside_columns = (columns >= left[:, None]) & (columns < left[:, None] + side[1])
    kept = ~(inside_rows[:, None, :, None] & inside_columns[:, None, None, :])
    return torch.where(kept, images, torch.full((), fill, dtype=images.dtype, device=images.device))


def _each(values: Tensor, images: Tensor) -> Tensor:
    return values.to(images).view(-1, 1, 1, 1)


# -------------------------------------------------------------------- DSA


def dsa_of(
    strategy: str,
    size: tuple[int, int],
    choice: float,
    uniform: Float[Tensor, "n 3"],
    fill: float = 0.0,
) -> Augment:
    """The augmentation that these random numbers stand for: a function of pictures of `size` (height, width).

    `choice` in [0, 1) picks one group of `strategy`; each row of `uniform`, in [0, 1), gives one picture's parameters
    (a single row: those of all pictures). For `draw_dsa`, which draws them, and for runs on several processes, which
    draw them for the whole batch: `dsa_of(…, run.shared_rand(), run.rand(n, 3))`.

    Groups, joined by "_": color (brightness + U(-0.5, 0.5), saturation about the channel mean x U(0, 2), contrast
    about the picture's mean x U(0.5, 1.5), in that order), crop (shift by up to 1/8 of the side), cutout (half the
    side), flip (p = 0.5; not for digits), scale (each axis by [1/1.2, 1.2]), rotate (15 degrees). An empty strategy is
    the identity. Raises DataError for an unknown group.
    """
    if not strategy:
        return lambda x: x
    groups = strategy.split("_")
    unknown = [g for g in groups if g not in DSA_GROUPS]
    require(not unknown, f"unknown augmentation group '{unknown[0] if unknown else ''}' in '{strategy}'; join some of "
            f"{', '.join(DSA_GROUPS)} by '_', or give '' for none", DataError)
    h, w = size
    u, v, z = uniform.unbind(-1)
    group = groups[int(choice * len(groups))]
    if group == "color":
        return lambda x: _color(x, u - 0.5, v * 2, z + 0.5)
    if group == "crop":
        reach = int(h * 0.125 + 0.5), int(w * 0.125 + 0.5)
        offset = torch.stack([_whole(u, -reach[0], reach[0]), _whole(v, -reach[1], reach[1])], -1)
        return lambda x: shift(x, offset, fill)
    if group == "cutout":
        side = int(h * 0.5 + 0.5), int(w * 0.5 + 0.5)
        centre = torch.stack([_whole(u, 0, h - side[0] % 2), _whole(v, 0, w - side[1] % 2)], -1)
        return lambda x: cutout(x, centre - torch.tensor(side, device=centre.device) // 2, side, fill)
    if group == "flip":
        return lambda x: torch.where((u < 0.5).to(x.device).view(-1, 1, 1, 1), x.flip(-1), x)
    if group == "scale":
        factors = uniform * (1.2 - 1 / 1.2) + 1 / 1.2
        return lambda x: affine(x, scaling(factors[:, 0], factors[:, 1]).to(x), fill)
    return lambda x: affine(x, rotation((u * 2 - 1) * 15).to(x), fill)


def draw_dsa(
    images: Pictures,
    strategy: str = DSA_PAPER,
    siamese: bool = False,
    fill: float = 0.0,
    generator: torch.Generator | None = None,
) -> Augment:
    """Draw one differentiable siamese augmentation (Zhao and Bilen 2021) for pictures like `images` and return it.

    ONE group of `strategy` is drawn for the batch and its parameters per picture, or, with `siamese`, once for all:
    then the returned function fits batches of any size, so that real and synthetic pictures see the same. See `dsa_of`
    for the groups.
    """
    choice = float(torch.rand((), generator=generator))
    uniform = torch.rand(1 if siamese else len(images), 3, generator=generator)
    return dsa_of(strategy, (images.shape[-2], images.shape[-1]), choice, uniform, fill)


def dsa(
    images: Pictures,
    strategy: str = DSA_PAPER,
    siamese: bool = False,
    fill: float = 0.0,
    generator: torch.Generator | None = None,
) -> Pictures:
    """`draw_dsa` applied to the pictures it was drawn for."""
    return draw_dsa(images, strategy, siamese, fill, generator)(images)


def _whole(uniform: Tensor, low: int, high: int) -> Tensor:
    """Whole numbers from low to high, both included, of numbers in [0, 1)."""
    return low + (uniform * (high - low + 1)).floor().long().clamp_max(high - low)


def _color(images: Tensor, brightness: Tensor, saturation: Tensor, contrast: Tensor) -> Tensor:
    images = images + _each(brightness, images)
    grey = images.mean(1, keepdim=True)
    images = (images - grey) * _each(saturation, images) + grey
    mean = images.mean((1, 2, 3), keepdim=True)
    return (images - mean) * _each(contrast, images) + mean


# -------------------------------------------------------------------- views for learning without labels


def random_view(
    images: Pictures,
    *,
    shift_by: float = 0.125,
    rotate: float = 15.0,
    scale: float = 1.2,
    brightness: float = 0.2,
    contrast: float = 0.2,
    noise: float = 0.1,
    erase: float = 0.25,
    flip: bool = False,
    fill: float = -1.0,
    generator: torch.Generator | None = None,
) -> Pictures:
    """An independent random view of every picture: moved, turned, resized, recoloured, noisy, with a square erased.

    shift_by: largest shift as a part of the side; rotate: degrees; scale: largest factor, both ways; brightness: added
    U(-b, b); contrast: factor U(1 - c, 1 + c) about the mean; noise: standard deviation; erase: side of the erased
    square as a part of the side. 0 (scale: 1) switches one off. Flip only where left and right do not matter.
    """
    require(scale >= 1.0, f"scale is the largest factor, at least 1, not {scale}", DataError)
    n, (h, w) = len(images), images.shape[-2:]

    def rand(low: float, high: float) -> Tensor:
        return torch.rand(n, generator=generator) * (high - low) + low

    turn = rotation(rand(-rotate, rotate))
    size = rand(-1, 1).mul(math.log(scale)).exp()
    matrix = torch.cat([turn[:, :, :2] * size[:, None, None],
                        torch.stack([rand(-shift_by, shift_by), rand(-shift_by, shift_by)], -1)[:, :, None] * 2], -1)
    if flip:
        matrix = torch.cat([matrix[:, :, :1] * torch.where(rand(0, 1) < 0.5, -1.0, 1.0)[:, None, None],
                            matrix[:, :, 1:]], -1)
    view = affine(images, matrix.to(images), fill)
    if contrast:
        mean = view.mean((1, 2, 3), keepdim=True)
        view = (view - mean) * _each(rand(1 - contrast, 1 + contrast), view) + mean
    if brightness:
        view = view + _each(rand(-brightness, brightness), view)
    if erase:
        side = max(1, round(erase * h)), max(1, round(erase * w))
        corner = torch.stack([(rand(0, 1) * (h - side[0] + 1)).long(), (rand(0, 1) * (w - side[1] + 1)).long()], -1)
        view = cutout(view, corner, side, fill)
    if noise:
        view = view + noise * torch.randn(view.shape, generator=generator).to(view)
    return view


def two_views(
    images: Pictures, *, generator: torch.Generator | None = None, **strength: Any
) -> tuple[Pictures, Pictures]:
    """Two independent views of every picture, as contrastive learning needs them; options as in `random_view`."""
    return random_view(images, generator=generator, **strength), random_view(images, generator=generator, **strength)


def random_tiles(
    canvas: Pictures, size: tuple[int, int], generator: torch.Generator | None = None
) -> Float[Tensor, "batch channels tile_height tile_width"]:
    """A window of `size` at a random place of every canvas, which wraps around (so that its border has no seam)."""
    n, _, h, w = canvas.shape
    require(size[0] <= h and size[1] <= w, f"windows of {size} do not fit on canvases of {(h, w)}", DataError)
    corner = torch.stack([torch.randint(h, (n,), generator=generator), torch.randint(w, (n,), generator=generator)], -1)
    corner = corner.to(canvas.device)
    rows = (corner[:, 0, None] + torch.arange(size[0], device=canvas.device)) % h
    columns = (corner[:, 1, None] + torch.arange(size[1], device=canvas.device)) % w
    picture = torch.arange(n, device=canvas.device)[:, None, None]
    return canvas.movedim(1, -1)[picture, rows[:, :, None], columns[:, None, :]].movedim(-1, 1)


# -------------------------------------------------------------------- RandAugment

RAND_AUGMENT = ("identity", "autocontrast", "rotate", "solarize", "color", "contrast", "brightness", "sharpness",
                "shear_x", "shear_y", "translate_x", "translate_y", "posterize")
RAND_AUGMENT_GREY = ("identity", "rotate", "scale", "shear_x", "shear_y", "translate_x", "translate_y", "contrast",
                     "brightness", "sharpness")
_MOVES = ("rotate", "scale", "shear_x", "shear_y", "translate_x", "translate_y")


def rand_augment(
    images: Pictures,
    choice: Int[Tensor, "batch ops"],
    uniform: Float[Tensor, "batch ops"],
    operations: Sequence[str] = RAND_AUGMENT,
    strength: float = 1.0,
) -> Pictures:
    """RandAugment (Cubuk et al. 2020): each picture goes through `ops` operations, by number in `operations`.

    `uniform`, in [0, 1), says how much of each. At strength 1: rotate up to 30 degrees, shear and translate up to 0.1,
    scale by factors up to 1.2, solarize and posterize (4 to 8 bits) at any threshold, colour, contrast, brightness and
    sharpness down to 0.05 of what they were; all in proportion to `strength`. Values are relative to the picture's own
    range; what comes from outside takes its lowest value. The moves are resampled once, before the other operations
    ("equalize" of the original is left out). Raises DataError for an unknown operation.
    """
    unknown = [o for o in operations if o not in (*RAND_AUGMENT, *_MOVES)]
    require(bool(operations) and not unknown, f"unknown operation: {', '.join(unknown) or 'none given'}; choose from "
            f"{', '.join(dict.fromkeys((*RAND_AUGMENT, *_MOVES)))}", DataError)
    choice, uniform = choice.to(images.device), uniform.to(images)
    low = images.amin((1, 2, 3), keepdim=True)
    span = (images.amax((1, 2, 3), keepdim=True) - low).clamp_min(1e-8)
    x = (images - low) / span
    if any(o in _MOVES for o in operations):
        x = affine(x, _moves(choice, uniform, operations, strength))
    for j in range(choice.shape[1]):
        for i, operation in enumerate(operations):
            where = (choice[:, j] == i).nonzero().flatten()
            if operation not in (*_MOVES, "identity") and len(where):
                x = x.index_copy(0, where, _touched(operation, x[where], uniform[where, j], strength))
    return x * span + low


def _moves(choice: Tensor, uniform: Tensor, operations: Sequence[str], strength: float) -> Tensor:
    """The product of the affine maps among each picture's operations."""
    total = torch.eye(3).to(uniform).expand(len(choice), 3, 3)
    for j in range(choice.shape[1]):
        v = (2 * uniform[:, j] - 1) * strength
        picked = {name: v * (choice[:, j] == operations.index(name)) if name in operations else torch.zeros_like(v)
                  for name in _MOVES}
        one, zero = torch.ones_like(v), torch.zeros_like(v)
        turn = picked["rotate"] * (30 * math.pi / 180)
        size = (picked["scale"] * math.log(1.2)).exp()
        cos, sin = turn.cos() * size, turn.sin() * size
        rows = [cos, 0.1 * picked["shear_x"] - sin, 0.2 * picked["translate_x"],
                0.1 * picked["shear_y"] + sin, cos, 0.2 * picked["translate_y"], zero, zero, one]
        total = total @ torch.stack(rows, -1).view(-1, 3, 3)
    return total[:, :2]


def _touched(operation: str, x: Tensor, uniform: Tensor, strength: float) -> Tensor:
    """One operation on values in [0, 1]."""
    kept = _each((1 - 0.95 * strength * uniform).clamp_min(0.05), x)
    if operation == "autocontrast":
        low, high = x.amin((2, 3), keepdim=True), x.amax((2, 3), keepdim=True)
        return (x - low) / (high - low).clamp_min(1e-8)
    if operation == "solarize":
        return torch.where(x > _each(1 - strength * uniform, x), 1 - x, x)
    if operation == "posterize":
        levels = _each(2 ** (8 - (4 * strength * uniform).round().clamp(0, 7)), x)
        return (x * levels).floor().clamp_max(levels - 1) / (levels - 1)
    if operation == "color":
        return x * kept + x.mean(1, keepdim=True) * (1 - kept)
    if operation == "contrast":
        return x * kept + x.mean((1, 2, 3), keepdim=True) * (1 - kept)
    if operation == "brightness":
        return x * kept
    padded = F.pad(x, [1] * 4, mode="replicate")
    return x * kept + F.avg_pool2d(padded, 3, 1) * (1 - kept)


# -------------------------------------------------------------------- whitening


@dataclass(frozen=True)
class ZCA:
    """ZCA whitening x -> (x - mean) / scale V (S + eps)^(-1/2) V^T of flattened pictures.

    V S V^T is the covariance of the pictures after the division by `scale`.
    """

    mean: Float[Tensor, " pixels"]
    scale: Float[Tensor, " pixels"]
    vectors: Float[Tensor, "pixels pixels"]
    values: Float[Tensor, " pixels"]
    eps: float = 0.1

    def apply(self, images: Pictures) -> Pictures:
        return self._map(images, self.values.add(self.eps).rsqrt(), whiten=True)

    def invert(self, images: Pictures) -> Pictures:
        return self._map(images, self.values.add(self.eps).sqrt(), whiten=False)

    def _map(self, images: Tensor, scale: Tensor, whiten: bool) -> Tensor:
        require(images[0].numel() == len(self.mean), f"whitening was fitted on pictures of {len(self.mean)} numbers, "
                f"these have {images[0].numel()} {tuple(images.shape[1:])}", DataError)
        mean, unit, vectors = self.mean.to(images), self.scale.to(images), self.vectors.to(images)
        flat = images.flatten(1)
        flat = (flat - mean) / unit if whiten else flat
        flat = (flat @ vectors * scale.to(images)) @ vectors.T
        return (flat if whiten else flat * unit + mean).view_as(images)

    def state(self) -> dict[str, Tensor | float]:
        return {"mean": self.mean, "scale": self.scale, "vectors": self.vectors, "values": self.values, "eps": self.eps}


def fit_zca(images: Pictures, eps: float = 0.1) -> ZCA:
    """Whitening fitted to `images` (covariance with 1 / n), each channel divided by its standard deviation before.

    `eps` is added to the eigenvalues; dataset distillation uses 0.1. Raises DataError for fewer than two pictures.
    """
    require(len(images) >= 2, f"whitening needs at least two pictures, got {len(images)}", DataError)
    require(eps >= 0, f"eps must not be negative, got {eps}")
    flat = images.flatten(1).double()
    mean = flat.mean(0)
    deviation = images.double().std((0, 2, 3), correction=0).clamp_min(1e-8)
    scale = deviation[:, None, None].expand(images.shape[1:]).reshape(-1)
    centred = (flat - mean) / scale
    values, vectors = torch.linalg.eigh(centred.T @ centred / len(flat))
    return ZCA(mean.to(images), scale.to(images), vectors.to(images).contiguous(), values.clamp_min(0).to(images), eps)
