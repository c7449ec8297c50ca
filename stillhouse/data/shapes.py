"""Drawn shapes: colour pictures whose factors (shape, colour, size, place, turn, ground) are known, made offline."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from stillhouse.data.sets import TensorSet
from stillhouse.errors import DataError, UnknownNameError, require

SHAPES = ("circle", "square", "triangle", "cross", "ring", "star")
"""Names of the shapes; the field `shape` is the position in the list that `shapes` is given."""

COLOURS = {"red": (0.85, 0.15, 0.15), "green": (0.15, 0.7, 0.2), "blue": (0.15, 0.3, 0.9), "yellow": (0.9, 0.8, 0.1),
           "violet": (0.6, 0.2, 0.8), "white": (0.95, 0.95, 0.95)}
"""Names and RGB values of the colours; the field `colour` is the position in the list that `shapes` is given."""

COLOURED = SHAPES[1:5]
"""Shapes of `coloured_shapes`."""

Background = Literal["plain", "gradient", "texture"]
BACKGROUNDS = ("plain", "gradient", "texture")


def shapes(
    n: int,
    seed: int = 0,
    size: int = 32,
    shapes: Sequence[str] = SHAPES[:4],
    colours: Sequence[str] = tuple(COLOURS)[:4],
    background: Background = "plain",
    hue: float = 0.0,
    noise: float = 0.02,
    turn: float = 20.0,
    grounds: Float[Tensor, "n 3 size size"] | None = None,
) -> TensorSet:
    """`n` pictures of one shape each.

    Fields: `image` float32 [n, 3, size, size] in [-1, 1]; `label` and `shape` int64 [n] (the same), `colour` int64 [n],
    `scale` (radius as a part of the side), `x`, `y` (centre, in parts of the side) float32 [n]. Factors are drawn
    independently; every shape and colour equally often within one picture. `background` is a dark plain ground, a
    gradient of two colours, or a grating of two colours; `hue` turns all colours about the grey axis (degrees); `turn`
    is the largest turn of the shape in degrees; `noise` a standard deviation of the pixels in [-1, 1]; `grounds`, with
    values in [0, 1], stand in place of the background.
    The same arguments give the same pictures. Raises UnknownNameError for an unknown shape, colour or background.
    """
    require(n >= 1 and size >= 8, f"shapes needs n >= 1 and size >= 8, got {n} and {size}", DataError)
    for given, known, what in ((shapes, SHAPES, "shape"), (colours, COLOURS, "colour"),
                               ([background], BACKGROUNDS, "background")):
        unknown = [name for name in given if name not in known]
        require(bool(given) and not unknown, f"unknown {what}: {', '.join(unknown) or 'none given'}; choose from "
                f"{', '.join(known)}", UnknownNameError)
    draw = torch.Generator().manual_seed(seed)
    pair = torch.arange(n) % (len(shapes) * len(colours))
    pair = pair[torch.randperm(n, generator=draw)]
    shape, colour = pair // len(colours), pair % len(colours)
    u = torch.rand(n, 6, generator=draw)
    radius = 0.2 + 0.14 * u[:, 0]
    centre = 0.5 + (u[:, 1:3] - 0.5) * (0.9 - 2 * radius)[:, None]
    angle = (2 * u[:, 3] - 1) * turn * (math.pi / 180)
    light = 0.85 + 0.3 * u[:, 4, None]

    ink = torch.tensor([COLOURS[name] for name in colours])[colour] * light
    inside = _coverage([SHAPES.index(name) for name in shapes], shape, radius, centre, angle, size)
    image = _ground(n, size, background, draw) if grounds is None else grounds
    image = image + inside[:, None] * (ink[:, :, None, None] - image)
    if hue:
        image = torch.einsum("dc,nchw->ndhw", _hue_rotation(hue), image)
    image = (image * 2 - 1 + noise * torch.randn(image.shape, generator=draw)).clamp(-1, 1)
    return TensorSet(image=image, label=shape, shape=shape.clone(), colour=colour, scale=radius,
                     x=centre[:, 0].clone(), y=centre[:, 1].clone())


FACTORS = ("shape", "colour", "texture", "position")
"""Fields of `shape_factors`, each with four values."""


def shape_factors(n: int, seed: int = 0, size: int = 16, noise: float = 0.1, turn: float = 10.0) -> TensorSet:
    """Pictures with four independent labels of four values each (`FACTORS`) and no `label`: one of four shapes in one
    of four colours, on a grating of two dark greys that runs in one of four directions, in one of four quarters of the
    picture."""
    draw = torch.Generator().manual_seed(seed + 1)
    texture = torch.randint(4, (n,), generator=draw)
    u = torch.rand(n, 4, generator=draw)
    angle, cycles, phase = texture * math.pi / 4, 2.5 + 1.5 * u[:, 0], 2 * math.pi * u[:, 1]
    at = (torch.arange(size) + 0.5) / size - 0.5
    along = angle.cos()[:, None, None] * at[None, None, :] + angle.sin()[:, None, None] * at[None, :, None]
    wave = 0.5 + 0.5 * (2 * math.pi * cycles[:, None, None] * along + phase[:, None, None]).sin()
    dark, light = 0.1 * u[:, 2, None, None], 0.3 + 0.2 * u[:, 3, None, None]
    grounds = (dark + wave * (light - dark))[:, None].expand(n, 3, size, size)
    drawn = shapes(n, seed, size, COLOURED, noise=noise, turn=turn, grounds=grounds)
    position = 2 * (drawn.y > 0.5).long() + (drawn.x > 0.5).long()
    return drawn.without("label").with_fields(texture=texture, position=position)


def captions(data: Any, shapes: Sequence[str] = SHAPES[:4], colours: Sequence[str] = tuple(COLOURS)[:4]) -> list[str]:
    """What each picture shows, e.g. "red circle"."""
    pairs = zip(data.colour.tolist(), data.shape.tolist(), strict=True)
    return [f"{colours[c]} {shapes[s]}" for c, s in pairs]


def coloured_names() -> list[str]:
    """Sixteen classes, four shapes in four colours; either half of the list has every shape and every colour twice."""
    pairs = [(c, s) for odd in (0, 1) for c in range(4) for s in range(4) if (c + s) % 2 == odd]
    return [f"{list(COLOURS)[c]} {COLOURED[s]}" for c, s in pairs]


def coloured_shapes(n: int, seed: int = 0, size: int = 32, background: Background = "texture",
                    hue: float = 30.0) -> TensorSet:
    """Pictures of `shapes` whose `label` is the colour and shape together, as a position in `coloured_names`."""
    drawn = shapes(n, seed, size, COLOURED, background=background, hue=hue)
    names = coloured_names()
    return TensorSet(image=drawn.image, label=torch.tensor([names.index(name) for name in captions(drawn, COLOURED)]))


def shape_pairs(n: int, seed: int = 0, size: int = 16, shapes_of: Sequence[str] = SHAPES[:4],
                colours: Sequence[str] = tuple(COLOURS)[:3], background: Background = "gradient", noise: float = 0.1,
                turn: float = 10.0) -> TensorSet:
    """Pictures of `shapes` whose `label` is shape and colour together, shape * len(colours) + colour: 12 classes as it
    stands."""
    drawn = shapes(n, seed, size, shapes_of, colours, background=background, noise=noise,
                   turn=turn)
    return drawn.with_fields(label=drawn.shape * len(colours) + drawn.colour)


def grey(images: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n 1 h w"]:
    """The mean over the channels."""
    return images.mean(1, keepdim=True)


def edges(images: Float[Tensor, "n c h w"]) -> Float[Tensor, "n 1 h w"]:
    """The largest gradient magnitude over the channels (Sobel filters), each picture scaled to [-1, 1]."""
    n, c, h, w = images.shape
    sobel = torch.tensor([[1.0, 0.0, -1.0], [2.0, 0.0, -2.0], [1.0, 0.0, -1.0]]).to(images)
    filters = torch.stack([sobel, sobel.T])[:, None]
    padded = F.pad(images.reshape(n * c, 1, h, w), [1] * 4, mode="replicate")
    magnitude = F.conv2d(padded, filters).norm(dim=1).view(n, c, h, w).amax(1, keepdim=True)
    return 2 * magnitude / magnitude.amax((1, 2, 3), keepdim=True).clamp_min(1e-6) - 1


def _coverage(kinds: list[int], shape: Tensor, radius: Tensor, centre: Tensor, angle: Tensor, size: int) -> Tensor:
    """How much of each pixel the shape covers, from signed distances: [n, size, size] in [0, 1]."""
    at = (torch.arange(size) + 0.5) / size
    dy, dx = at[None, :, None] - centre[:, 1, None, None], at[None, None, :] - centre[:, 0, None, None]
    cos, sin = angle.cos()[:, None, None], angle.sin()[:, None, None]
    u, v = (cos * dx + sin * dy) / radius[:, None, None], (cos * dy - sin * dx) / radius[:, None, None]
    distance = torch.zeros(len(shape), size, size)
    for i, kind in enumerate(kinds):
        mine = shape == i
        distance[mine] = _signed_distance(SHAPES[kind], u[mine], v[mine])
    return (0.5 - distance * radius[:, None, None] * size).clamp(0, 1)


def _signed_distance(kind: str, u: Tensor, v: Tensor) -> Tensor:
    """Negative inside, in units of the radius."""
    if kind == "circle":
        return (u**2 + v**2).sqrt() - 0.9
    if kind == "square":
        return torch.maximum(u.abs(), v.abs()) - 0.8
    if kind == "triangle":
        slope = math.sqrt(3) / 2
        return torch.maximum(u.abs() * slope - v * 0.5 - 0.45, v - 0.6)
    if kind == "cross":
        a, b = torch.maximum(u.abs(), v.abs()), torch.minimum(u.abs(), v.abs())
        return torch.maximum(a - 0.95, b - 0.33)
    if kind == "ring":
        return ((u**2 + v**2).sqrt() - 0.7).abs() - 0.22
    angle = torch.atan2(u, -v)
    spread = (angle / (2 * math.pi / 5) - (angle / (2 * math.pi / 5)).round()).abs() * 2
    return (u**2 + v**2).sqrt() - (1.0 - 0.55 * spread)


def _ground(n: int, size: int, background: str, draw: torch.Generator) -> Tensor:
    first = 0.05 + 0.25 * torch.rand(n, 3, 1, 1, generator=draw)
    if background == "plain":
        return first.mean(1, keepdim=True).expand(n, 3, size, size).clone()
    second = 0.05 + 0.55 * torch.rand(n, 3, 1, 1, generator=draw)
    angle = torch.rand(n, 1, 1, generator=draw) * 2 * math.pi
    cycles = 2 + 4 * torch.rand(n, 1, 1, generator=draw)
    at = (torch.arange(size) + 0.5) / size - 0.5
    along = angle.cos() * at[None, None, :] + angle.sin() * at[None, :, None]
    mix = along + 0.5 if background == "gradient" else 0.5 + 0.5 * (2 * math.pi * cycles * along).sin()
    return first + mix.clamp(0, 1)[:, None] * (second - first)


def _hue_rotation(degrees: float) -> Tensor:
    """The rotation of RGB space about its grey axis."""
    a = degrees * math.pi / 180
    third, side = (1 - math.cos(a)) / 3, math.sin(a) / math.sqrt(3)
    return torch.tensor([[math.cos(a) + third, third - side, third + side],
                         [third + side, math.cos(a) + third, third - side],
                         [third - side, third + side, math.cos(a) + third]])
