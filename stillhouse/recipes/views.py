"""Random views whose draws belong to the samples: the same on one process as on several."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from stillhouse.data.augment import RAND_AUGMENT, affine, cutout, rand_augment, rotation
from stillhouse.errors import DataError, require
from stillhouse.run import Run, processes


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


def strong_view(
    images: Float[Tensor, "n channels height width"],
    run: Run,
    strength: float = 1.0,
    operations: Sequence[str] = RAND_AUGMENT,
    count: int = 4,
    erase: float = 0.5,
    noise: float = 0.0,
    flip: bool = False,
    alike: bool = False,
) -> Float[Tensor, "n channels height width"]:
    """RandAugment with `count` random `operations` on every picture (see `rand_augment`), then mirrored, a square
    erased and noise added as in `random_view`; strength 0, erase 0 and noise 0 change nothing.

    `alike` draws the same on all processes, for work that every process does as a whole (`run.once`).
    """
    require(min(strength, erase, noise) >= 0 and erase <= 1 and count >= 0, "strength, erase, noise and count must be "
            f"0 or more, erase at most 1; got {strength}, {erase}, {noise} and {count}")
    n, height, width = len(images), *images.shape[-2:]
    if alike:
        u = torch.rand(n, 2 * count + 3, generator=run.shared).to(images.device)
    else:
        u = run.rand(n, 2 * count + 3)
    x = images
    if strength and count:
        x = rand_augment(x, (u[:, :count] * len(operations)).long(), u[:, count : 2 * count], operations, strength)
    if flip:
        x = torch.where(_each(u[:, -3], x) < 0.5, x.flip(-1), x)
    low = images.amin((1, 2, 3), keepdim=True)
    if erase:
        side = max(1, round(erase * height)), max(1, round(erase * width))
        corner = (u[:, -2:] * torch.tensor([height - side[0] + 1, width - side[1] + 1]).to(u)).long()
        x = cutout(x - low, corner, side) + low
    if noise:
        more = torch.randn(x.shape, generator=run.shared) if alike else run.randn(*x.shape)
        x = x + noise * (images.amax((1, 2, 3), keepdim=True) - low) * more.to(x)
    return x


def crop_view(
    images: Float[Tensor, "n channels height width"],
    run: Run,
    area: tuple[float, float] = (0.08, 1.0),
    ratio: float = 4 / 3,
    flip: bool = True,
) -> Float[Tensor, "n channels height width"]:
    """A random part of every picture at the picture's size (Szegedy et al. 2015), mirrored half of the time if `flip`.

    The part's area is uniform in `area` (as a part of the whole), its width to height log-uniform in [1 / ratio,
    ratio], its place uniform; a side longer than the picture's is cut to it. (1, 1) with a ratio of 1 is the whole.
    """
    require(0 < area[0] <= area[1] <= 1 and ratio >= 1, f"area is a range within (0, 1] and ratio at least 1; got "
            f"{area} and {ratio}")
    u = run.rand(len(images), 5)
    side = (area[0] + (area[1] - area[0]) * u[:, 0]).sqrt()
    stretch = ((u[:, 1] - 0.5) * math.log(ratio)).exp()
    width, height = (side * stretch).clamp_max(1), (side / stretch).clamp_max(1)
    x, y = ((2 * u[:, i] - 1) * (1 - part) for i, part in ((2, width), (3, height)))
    mirror = torch.where(u[:, 4] < 0.5, -1.0, 1.0) if flip else torch.ones_like(x)
    zero = torch.zeros_like(x)
    return affine(images, torch.stack([width * mirror, zero, x, zero, height, y], -1).view(-1, 2, 3))


def colour_view(
    images: Float[Tensor, "n channels height width"],
    run: Run,
    strength: float = 1.0,
    jitter: float = 0.8,
    grey: float = 0.2,
    blur: float = 0.5,
) -> Float[Tensor, "n channels height width"]:
    """Colours distorted and blurred (SimCLR, Chen et al. 2020, appendix A), for pictures in [-1, 1].

    With probability `jitter` brightness, contrast and saturation change by factors U(1 - 0.8 s, 1 + 0.8 s) (none
    below 0) and the hue by U(-0.2 s, 0.2 s) of the circle, s = `strength`; with probability `grey` the colour is taken
    out; with probability `blur` a Gaussian of a tenth of the height, sigma U(0.1, 2), is laid over. Pictures of one
    channel have no saturation, hue or grey. The changes come in this order, hue as a turn about the grey axis (the
    paper: in a random order, in HSV), so that all of them are one matrix and one shift a picture.
    """
    channels = images.shape[1]
    require(channels in (1, 3), f"colours are of pictures with 1 or 3 channels, not {channels}", DataError)
    require(strength >= 0 and min(jitter, grey, blur) >= 0 and max(jitter, grey, blur) <= 1, "strength must be 0 or "
            f"more, jitter, grey and blur probabilities; got {strength}, {jitter}, {grey}, {blur}")
    u = run.rand(len(images), 8).to(images)
    light, contrast, saturation = ((1 + (2 * u[:, i] - 1) * 0.8 * strength).clamp_min(0) for i in range(3))
    apply = u[:, 4] < jitter
    light, contrast = torch.where(apply, light, 1.0), torch.where(apply, contrast, 1.0)
    x = (images + 1) / 2 * _each(light, images)
    mean = x.mean((1, 2, 3), keepdim=True)
    x = ((x - mean) * _each(contrast, x) + mean).clamp(0, 1)
    if channels == 3:
        saturation = torch.where(u[:, 5] < grey, 0.0, torch.where(apply, saturation, 1.0))
        angle = torch.where(apply, (2 * u[:, 3] - 1) * 0.2 * strength * 2 * math.pi, 0.0)
        x = torch.einsum("ndc,nchw->ndhw", _colours(saturation, angle), x).clamp(0, 1)
    if blur:
        sigma = torch.where(u[:, 6] < blur, 0.1 + 1.9 * u[:, 7], 1e-3)
        x = _blurred(x, sigma, max(1, images.shape[-2] // 20))
    return 2 * x - 1


def _colours(saturation: Tensor, angle: Tensor) -> Float[Tensor, "n 3 3"]:
    """A turn of the colours about the grey axis, then the distance to their luminance times `saturation`."""
    axis = torch.full((3, 3), 1 / 3).to(angle)
    cross = torch.tensor([[0.0, -1.0, 1.0], [1.0, 0.0, -1.0], [-1.0, 1.0, 0.0]]).to(angle) / math.sqrt(3)
    eye = torch.eye(3).to(angle)
    cos, sin, s = (v[:, None, None] for v in (angle.cos(), angle.sin(), saturation))
    turn = cos * eye + sin * cross + (1 - cos) * axis
    luminance = torch.tensor([0.299, 0.587, 0.114]).to(angle).expand(3, 3)
    return (s * eye + (1 - s) * luminance) @ turn


def _blurred(x: Tensor, sigma: Tensor, reach: int) -> Tensor:
    """Each picture under its own separable Gaussian of 2 reach + 1 pixels; edges are reflected."""
    at = torch.arange(-reach, reach + 1).to(sigma)
    weights = torch.softmax(-(at**2) / (2 * sigma[:, None] ** 2), 1)
    for side in (-1, -2):
        padded = F.pad(x, [reach, reach, 0, 0] if side == -1 else [0, 0, reach, reach], mode="reflect")
        shifted = [padded.narrow(side, i, x.shape[side]) for i in range(2 * reach + 1)]
        x = (torch.stack(shifted, 1) * weights.to(x)[:, :, None, None, None]).sum(1)
    return x


def _each(values: Tensor, like: Tensor) -> Tensor:
    return values.to(like).view(-1, 1, 1, 1)


def resized_crop(
    images: Float[Tensor, "n channels height width"],
    run: Run,
    smallest: float = 0.08,
    flip: bool = True,
) -> Float[Tensor, "n channels height width"]:
    """A random part of every picture, brought back to its size, and mirrored in half of the cases.

    The part has an area of `smallest` to 1 of the picture's, its sides a ratio of 3/4 to 4/3 (Szegedy et al. 2015).
    """
    require(0 < smallest <= 1, f"smallest is a part of the area in (0, 1], not {smallest}")
    u = run.rand(len(images), 5)
    area = smallest + (1 - smallest) * u[:, 0]
    ratio = ((2 * u[:, 1] - 1) * math.log(4 / 3)).exp()
    sides = torch.stack([(area * ratio).sqrt(), (area / ratio).sqrt()], 1).clamp(max=1)
    centre = (2 * u[:, 2:4] - 1) * (1 - sides)
    mirrored = torch.where(u[:, 4] < 0.5, -1.0, 1.0) if flip else torch.ones_like(u[:, 4])
    zero = torch.zeros_like(area)
    rows = torch.stack([sides[:, 0] * mirrored, zero, centre[:, 0], zero, sides[:, 1], centre[:, 1]], 1)
    return affine(images, rows.view(-1, 2, 3).to(images))


def neighbours(x: Float[Tensor, "n ..."], run: Run) -> Float[Tensor, "n ..."]:
    """Each sample's next one in the whole batch, which a random order makes a random partner."""
    whole = run.gather(x)
    if len(whole) == len(x):
        return x.roll(-1, 0)
    low, high = processes.bounds(len(whole))
    return whole.roll(-1, 0)[low:high]


def cutmix(
    images: Float[Tensor, "n channels height width"],
    run: Run,
    alpha: float = 1.0,
    probability: float = 1.0,
) -> tuple[Float[Tensor, "n channels height width"], Float[Tensor, " n"]]:
    """A box of each picture is taken from its neighbour in the batch (CutMix, Yun et al. 2019, equations 1 and 2).

    Returned are the pictures and the share of each that is its own; targets are mixed alike, with their `neighbours`:
    share y + (1 - share) y'. The box has the picture's form, its area is 1 - lambda with lambda ~ Beta(alpha, alpha)
    before it is cut at the border, its centre is uniform; with 1 - `probability` a picture stays as it is.
    """
    require(alpha > 0 and 0 <= probability <= 1, f"alpha must be above 0 and probability in [0, 1]; got {alpha} and "
            f"{probability}")
    n, _, height, width = images.shape
    u = run.rand(n, 4)
    cut = torch.where(u[:, 3] < probability, (1 - _beta(u[:, 0], alpha)).clamp_min(0).sqrt(), 0.0)
    inside = torch.ones(n, height, width, dtype=torch.bool, device=u.device)
    for axis, side, centre in ((1, height, u[:, 1]), (2, width, u[:, 2])):
        half = (cut * side / 2)[:, None]
        at = torch.arange(side, device=u.device)
        middle = (centre * side).floor()[:, None]
        inside &= ((at >= (middle - half).round()) & (at < (middle + half).round())).unsqueeze(3 - axis)
    mixed = torch.where(inside[:, None].to(images.device), neighbours(images, run), images)
    return mixed, 1 - inside.float().mean((1, 2)).to(images)


def _beta(u: Tensor, alpha: float) -> Tensor:
    """Uniform numbers turned into ones that follow Beta(alpha, alpha)."""
    if alpha == 1:
        return u
    from scipy.special import betaincinv

    return torch.from_numpy(betaincinv(alpha, alpha, u.double().cpu().numpy())).to(u)


def mixup(
    images: Float[Tensor, "n channels height width"],
    run: Run,
    alpha: float = 0.8,
) -> tuple[Float[Tensor, "n channels height width"], Float[Tensor, " n"]]:
    """lambda x + (1 - lambda) x' of each picture and its neighbour in the batch, with one lambda ~ Beta(alpha, alpha) a
    picture (mixup, Zhang et al. 2018, section 2). Returned are the pictures and lambda, as in `cutmix`."""
    require(alpha > 0, f"alpha must be above 0, not {alpha}")
    share = _beta(run.rand(len(images)), alpha).to(images)
    return _each(share, images) * images + _each(1 - share, images) * neighbours(images, run), share


def mixed(
    images: Float[Tensor, "n channels height width"],
    label: Int[Tensor, " n"],
    classes: int,
    run: Run,
    mixup_alpha: float = 0.0,
    cutmix_alpha: float = 0.0,
    smoothing: float = 0.0,
) -> tuple[Float[Tensor, "n channels height width"], Float[Tensor, "n classes"]]:
    """Pictures under `mixup` or `cutmix` (half of the steps each, if both are above 0; as they are, if none is) and
    their soft labels share y + (1 - share) y', of which `smoothing` is spread evenly over the classes."""
    require(min(mixup_alpha, cutmix_alpha) >= 0 and 0 <= smoothing < 1, "mixup and cutmix must be 0 or more and "
            f"smoothing in [0, 1); got {mixup_alpha}, {cutmix_alpha} and {smoothing}")
    soft = F.one_hot(label, classes).to(images.dtype)
    if mixup_alpha or cutmix_alpha:
        other = neighbours(soft, run)
        cut = bool(cutmix_alpha) and (not mixup_alpha or run.shared_rand() < 0.5)
        images, share = cutmix(images, run, cutmix_alpha) if cut else mixup(images, run, mixup_alpha)
        soft = share[:, None] * soft + (1 - share[:, None]) * other
    return images, (1 - smoothing) * soft + smoothing / classes


def both_views(batch: dict[str, Any], config: Any, view: Callable[[Tensor], Tensor] | None) -> tuple[Tensor, Tensor]:
    """What the student and what the teacher is given: one view of both, also where they see two modalities.

    Raises DataError where a view is asked for and the two have different sizes.
    """
    x, y = batch["image"], batch[config.teacher_sees]
    if view is None:
        return x, y
    if y is x:
        x = view(x)
        return x, x
    require(x.shape[2:] == y.shape[2:], "one view of two fields needs pictures of one size; got "
            f"{tuple(x.shape)} and {tuple(y.shape)}; leave the view out", DataError)
    both = view(torch.cat([x, y], 1))
    return both[:, : x.shape[1]], both[:, x.shape[1] :]
