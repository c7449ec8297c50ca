"""Random views whose draws belong to the samples: the same on one process as on several."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from stillhouse.data.augment import affine, cutout, rotation
from stillhouse.errors import require
from stillhouse.run import Run


def random_view(
    images: Float[Tensor, "n channels height width"],
    run: Run,
    strength: float = 1.0,
    erase: float = 0.0,
    noise: float = 0.0,
    flip: bool = False,
) -> Float[Tensor, "n channels height width"]:
    """One view of every picture: moved, turned, scaled, its light and contrast changed, mirrored and partly erased.

    At strength 1: shifts up to a tenth of the side, 15 degrees, factors up to 1.15, contrast 1 -+ 0.2, light -+ 0.1 of
    the picture's range; all in proportion to `strength`, and 0 changes nothing. `erase` is the side of the erased
    square as a part of the picture's, `noise` a standard deviation as a part of its range. What comes from outside
    takes the picture's lowest value.
    """
    require(min(strength, erase, noise) >= 0 and erase <= 1, "strength, erase and noise must be 0 or more, erase at "
            f"most 1; got {strength}, {erase} and {noise}")
    n, height, width = len(images), *images.shape[-2:]
    low = images.amin((1, 2, 3), keepdim=True)
    span = images.amax((1, 2, 3), keepdim=True) - low
    x = images - low
    u = run.rand(n, 9)
    if strength or flip:
        turned = rotation((2 * u[:, 0] - 1) * 15 * strength)[:, :, :2]
        turned = turned * ((2 * u[:, 1] - 1) * strength * math.log(1.15)).exp()[:, None, None]
        if flip:
            turned = turned * torch.where(u[:, 8] < 0.5, -1.0, 1.0)[:, None, None] ** torch.tensor([1.0, 0.0]).to(u)
        x = affine(x, torch.cat([turned, (2 * u[:, 2:4] - 1)[:, :, None] * 0.2 * strength], -1).to(x))
        contrast, light = (1 + (2 * u[:, i] - 1) * s * strength for i, s in ((4, 0.2), (5, 0.1)))
        mean = x.mean((1, 2, 3), keepdim=True)
        x = (x - mean) * _each(contrast, x) + mean + _each(light - 1, x) * span
    if erase:
        side = max(1, round(erase * height)), max(1, round(erase * width))
        corner = (u[:, 6:8] * torch.tensor([height - side[0] + 1, width - side[1] + 1]).to(u)).long()
        x = cutout(x, corner, side)
    if noise:
        x = x + noise * span * run.randn(*x.shape).to(x)
    return x + low


def _each(values: Tensor, like: Tensor) -> Tensor:
    return values.to(like).view(-1, 1, 1, 1)
