"""Normalising flows: invertible layers with known log-determinants, and the density model made of them.

Every layer has `forward(x) -> (y, log_det)` and `inverse(y) -> (x, log_det)`, log_det [batch] each of the direction
taken. Invertibility and log-determinants hold in eval mode; in train mode batch normalisation mixes samples.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from stillhouse.data.dequantise import from_logit, grey_levels, picture, to_logit
from stillhouse.errors import require

Pair = tuple[Tensor, Tensor]
Kind = Literal["affine", "additive"]


def checkerboard(height: int, width: int, odd: bool = False) -> Float[Tensor, "1 height width"]:
    """1 where row + column is even (odd if `odd`), else 0."""
    place = torch.arange(height)[:, None] + torch.arange(width)
    return ((place % 2 == 0) != odd).float()[None]


def half(size: int, second: bool = False) -> Float[Tensor, " size"]:
    """1 on the first half of the entries (the second if `second`), else 0."""
    return ((torch.arange(size) < size // 2) != second).float()


def squeeze(x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch more less_height less_width"]:
    """[n, c, h, w] -> [n, 4 c, h / 2, w / 2]: each 2 x 2 block becomes the channels of one place."""
    return F.pixel_unshuffle(x, 2)


def unsqueeze(x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch less height2 width2"]:
    """The inverse of `squeeze`."""
    return F.pixel_shuffle(x, 2)


class Coupling(nn.Module):
    """y = b x + (1 - b)(x exp(s) + t) with s and t of b x: log-determinant sum of s over the entries with b = 0.

    `network` gives twice the channels of its input, along axis 1: s is a learned scale per channel times the tanh of
    the first half, t the second. "additive" has s = 0. Dinh et al. 2017 (arXiv 1605.08803), equations 7 to 9.
    """

    mask: Tensor

    def __init__(self, mask: Tensor, network: nn.Module, channels: int, kind: Kind = "affine"):
        super().__init__()
        self.register_buffer("mask", mask, persistent=False)
        self.network, self.kind = network, kind
        self.scale = nn.Parameter(torch.ones(channels, *[1] * (mask.ndim - 1))) if kind == "affine" else None

    def parts(self, kept: Float[Tensor, "batch ..."]) -> tuple[Float[Tensor, "batch ..."], Float[Tensor, "batch ..."]]:
        """s and t, 0 where the mask is 1."""
        raw, t = self.network(kept).chunk(2, 1)
        s = torch.zeros_like(t) if self.scale is None else self.scale * raw.tanh()
        return s * (1 - self.mask), t * (1 - self.mask)

    def forward(self, x: Float[Tensor, "batch ..."]) -> Pair:
        s, t = self.parts(self.mask * x)
        return x * s.exp() + t, s.flatten(1).sum(1)

    def inverse(self, y: Float[Tensor, "batch ..."]) -> Pair:
        s, t = self.parts(self.mask * y)
        return (y - t) * (-s).exp(), -s.flatten(1).sum(1)


class FlowBatchNorm(nn.Module):
    """y = (x - m) / sqrt(var + eps) per channel, without learned scale or shift, as a layer of a flow.

    In train mode m and var are those of the batch (biased, with gradient), in eval mode running averages. The
    log-determinant is -0.5 log(var + eps) over all entries. Dinh et al. 2017, section 3.7 and appendix E.
    """

    mean: Tensor
    var: Tensor

    def __init__(self, channels: int, eps: float = 1e-5, rate: float = 0.1):
        super().__init__()
        self.eps, self.rate = eps, rate
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("var", torch.ones(channels))

    def forward(self, x: Float[Tensor, "batch channels ..."]) -> Pair:
        mean, var = self.mean, self.var
        if self.training:
            others = [0, *range(2, x.ndim)]
            mean, var = x.mean(others), x.var(others, unbiased=False)
            with torch.no_grad():
                self.mean.lerp_(mean, self.rate)
                self.var.lerp_(var, self.rate)
        mean, std = (self._wide(v, x) for v in (mean, (var + self.eps).sqrt()))
        return (x - mean) / std, -std.log().expand_as(x).flatten(1).sum(1)

    def inverse(self, y: Float[Tensor, "batch channels ..."]) -> Pair:
        mean, std = self._wide(self.mean, y), self._wide((self.var + self.eps).sqrt(), y)
        return y * std + mean, std.log().expand_as(y).flatten(1).sum(1)

    @staticmethod
    def _wide(value: Tensor, like: Tensor) -> Tensor:
        return value.view(1, -1, *[1] * (like.ndim - 2))


class Scaling(nn.Module):
    """y = exp(a) x with one learned a per entry: the last layer of NICE (Dinh et al. 2015, arXiv 1410.8516)."""

    def __init__(self, shape: Sequence[int]):
        super().__init__()
        self.log_scale = nn.Parameter(torch.zeros(*shape))

    def forward(self, x: Float[Tensor, "batch ..."]) -> Pair:
        return x * self.log_scale.exp(), self.log_scale.sum().expand(len(x))

    def inverse(self, y: Float[Tensor, "batch ..."]) -> Pair:
        return y * (-self.log_scale).exp(), -self.log_scale.sum().expand(len(y))


class Chain(nn.Module):
    """Layers one after the other."""

    def __init__(self, layers: Sequence[nn.Module]):
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Float[Tensor, "batch ..."]) -> Pair:
        total = x.new_zeros(len(x))
        for layer in self.layers:
            x, log_det = layer(x)
            total = total + log_det
        return x, total

    def inverse(self, y: Float[Tensor, "batch ..."]) -> Pair:
        total = y.new_zeros(len(y))
        layers: Any = reversed(self.layers)
        for layer in layers:
            y, log_det = layer.inverse(y)
            total = total + log_det
        return y, total


class MultiScale(nn.Module):
    """The flow of pictures: x [batch, c, h, w] to a flat latent [batch, c h w], everything that was factored out first.

    Every scale but the last has three checkerboard couplings, a squeeze and three channel-wise couplings; then half of
    the channels leave as latents (not if `factor` is off) and the rest goes on. The last scale has four checkerboard
    couplings. Hidden maps double at each squeeze. With `norm` each coupling is followed by `FlowBatchNorm`.
    Dinh et al. 2017, sections 3.4 to 3.7.
    """

    def __init__(self, shape: tuple[int, int, int], scales: int = 2, hidden: int = 32, blocks: int = 4,
                 kind: Kind = "affine", norm: bool = True, factor: bool = True):
        super().__init__()
        c, h, w = shape
        require(scales >= 1 and h % 2 ** (scales - 1) == 0 and w % 2 ** (scales - 1) == 0, f"{scales} scales halve a "
                f"picture {scales - 1} times, which {h} x {w} pixels do not allow")
        self.factor = factor
        self.before, self.after = nn.ModuleList(), nn.ModuleList()
        self.shapes: list[tuple[int, int, int]] = []

        def couplings(masks: Sequence[Tensor]) -> Chain:
            layers: list[nn.Module] = []
            for mask in masks:
                layers.append(Coupling(mask, ResidualNet(c, 2 * c, hidden, blocks), c, kind))
                layers += [FlowBatchNorm(c)] if norm else []
            return Chain(layers)

        for _ in range(scales - 1):
            self.before.append(couplings([checkerboard(h, w, i % 2 == 1) for i in range(3)]))
            c, h, w, hidden = 4 * c, h // 2, w // 2, 2 * hidden
            self.after.append(couplings([half(c, i % 2 == 1)[:, None, None] for i in range(3)]))
            self.shapes.append((c, h, w))
            c = c // 2 if factor else c
        self.shapes.append((c, h, w))
        self.last = couplings([checkerboard(h, w, i % 2 == 1) for i in range(4)])

    def forward(self, x: Float[Tensor, "batch channels height width"]) -> Pair:
        latents, total = [], x.new_zeros(len(x))
        for before, after in zip(self.before, self.after, strict=True):
            x, first = before(x)
            x, second = after(squeeze(x))
            total = total + first + second
            if self.factor:
                out, x = x.chunk(2, 1)
                latents.append(out.flatten(1))
        x, log_det = self.last(x)
        return torch.cat([*latents, x.flatten(1)], 1), total + log_det

    def inverse(self, z: Float[Tensor, "batch entries"]) -> Pair:
        sizes = [math.prod(shape) // 2 for shape in self.shapes[:-1]] if self.factor else []
        *latents, rest = z.split([*sizes, z.shape[1] - sum(sizes)], 1)
        c, h, w = self.shapes[-1]
        x, total = self.last.inverse(rest.reshape(len(z), c, h, w))
        for i in reversed(range(len(self.before))):
            if self.factor:
                c, h, w = self.shapes[i]
                x = torch.cat([latents[i].view(len(z), c // 2, h, w), x], 1)
            after, before = self.after[i], self.before[i]
            assert isinstance(after, Chain) and isinstance(before, Chain)
            x, second = after.inverse(x)
            x, first = before.inverse(unsqueeze(x))
            total = total + first + second
        return x, total


class ResidualNet(nn.Module):
    """s and t of a picture: weight-normalised residual blocks with batch norm, ReLU and skips to the output.

    `blocks` blocks of `hidden` maps; Dinh et al. 2017, section 4.1.
    """

    def __init__(self, channels: int, outputs: int, hidden: int = 32, blocks: int = 4):
        super().__init__()
        require(hidden >= 1 and blocks >= 1, f"hidden and blocks must be 1 or more, got {hidden} and {blocks}")
        self.enter = weight_norm(nn.Conv2d(channels, hidden, 3, padding=1))
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.BatchNorm2d(hidden), nn.ReLU(), weight_norm(nn.Conv2d(hidden, hidden, 3, padding=1)),
                          nn.BatchNorm2d(hidden), nn.ReLU(), weight_norm(nn.Conv2d(hidden, hidden, 3, padding=1)))
            for _ in range(blocks))
        self.skips = nn.ModuleList(weight_norm(nn.Conv2d(hidden, hidden, 1)) for _ in range(blocks + 1))
        self.leave = nn.Sequential(nn.BatchNorm2d(hidden), nn.ReLU(), weight_norm(nn.Conv2d(hidden, outputs, 1)))

    def forward(self, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch outputs height width"]:
        h = self.enter(x)
        out = self.skips[0](h)
        for block, skip in zip(self.blocks, self.skips[1:], strict=True):
            h = h + block(h)
            out = out + skip(h)
        return self.leave(out)


def mlp(size: int, outputs: int, width: int = 64, depth: int = 2) -> nn.Sequential:
    """s and t of points: `depth` weight-normalised hidden layers with ReLU."""
    layers: list[nn.Module] = []
    for i in range(depth):
        layers += [weight_norm(nn.Linear(width if i else size, width)), nn.ReLU()]
    return nn.Sequential(*layers, weight_norm(nn.Linear(width, outputs)))


class FlowDensity(nn.Module):
    """A density: `flow` maps a sample of `shape` to a latent of as many numbers, which is standard normal.

    With `levels`, samples are pictures in [-1, 1] of so many grey levels: `log_prob` is then the density of the
    dequantised picture scaled to [0, 1), through a logit (`stillhouse.data.dequantise`), and samples are whole levels.
    """

    def __init__(self, flow: nn.Module, shape: Sequence[int], levels: int = 0, alpha: float = 0.05):
        super().__init__()
        require(levels == 0 or levels >= 2, f"levels is 0 for numbers, 2 or more for pictures, not {levels}")
        require(0 < alpha < 0.5, f"alpha must lie between 0 and 0.5, not {alpha}")
        self.flow, self.shape, self.levels, self.alpha = flow, tuple(shape), levels, alpha

    @property
    def dimensions(self) -> int:
        """D, the numbers in a sample."""
        return math.prod(self.shape)

    def encode(self, x: Float[Tensor, "batch ..."], u: Float[Tensor, "batch ..."] | None = None) -> Pair:
        """The latent z [batch, D] and log |dz / dx|; u in [0, 1) is what pictures are dequantised with, drawn if None.
        """
        log_det: Tensor | float = 0.0
        if self.levels:
            u = torch.rand_like(x) if u is None else u
            x, log_det = to_logit((grey_levels(x, self.levels) + u) / self.levels, self.alpha)
        z, inner = self.flow(x)
        return z.flatten(1), inner + log_det

    def decode(self, z: Float[Tensor, "batch entries"]) -> Float[Tensor, "batch ..."]:
        """The sample whose latent is z; for pictures cut to whole grey levels."""
        inverse: Any = self.flow.inverse
        x = inverse(z)[0].view(len(z), *self.shape)
        return picture(from_logit(x, self.alpha) * self.levels, self.levels) if self.levels else x

    def log_prob(
        self, x: Float[Tensor, "batch ..."], u: Float[Tensor, "batch ..."] | None = None
    ) -> Float[Tensor, " batch"]:
        """log p(x) in nats."""
        z, log_det = self.encode(x, u)
        return -0.5 * (z.square() + math.log(2 * math.pi)).sum(1) + log_det

    def sample(self, n: int, generator: torch.Generator | None = None) -> Float[Tensor, "n ..."]:
        """n independent samples, in one pass."""
        like = next(self.parameters())
        return self.decode(torch.randn(n, self.dimensions, generator=generator, dtype=like.dtype, device=like.device))

    def forward(self, x: Float[Tensor, "batch ..."]) -> Float[Tensor, " batch"]:
        return self.log_prob(x)

    @torch.no_grad()
    def manifold(self, x: Float[Tensor, "4 ..."], side: int = 8) -> Float[Tensor, "grid ..."]:
        """side x side samples on the latent surface through four samples.

        z = cos p (cos q z1 + sin q z2) + sin p (cos q z3 + sin q z4), p and q in [0, 2 pi) (Dinh et al. 2017,
        appendix D).
        """
        z = self.encode(x)[0]
        angles = torch.arange(side, device=z.device, dtype=z.dtype) * (2 * math.pi / side)
        circle = torch.stack([angles.cos(), angles.sin()], 1)
        return self.decode(torch.einsum("pa,qb,abd->pqd", circle, circle, z.view(2, 2, -1)).flatten(0, 1))


def point_flow(size: int = 2, couplings: int = 6, width: int = 64, kind: Kind = "affine", norm: bool = True,
               scaling: bool = False) -> FlowDensity:
    """A density of points [batch, size] from couplings whose masks swap the two halves of the entries."""
    layers: list[nn.Module] = []
    for i in range(couplings):
        layers.append(Coupling(half(size, i % 2 == 1), mlp(size, 2 * size, width), size, kind))
        layers += [FlowBatchNorm(size)] if norm else []
    return FlowDensity(Chain([*layers, Scaling((size,))] if scaling else layers), (size,))


def picture_flow(shape: tuple[int, int, int] = (3, 32, 32), levels: int = 256, scales: int = 2, hidden: int = 64,
                 blocks: int = 8, kind: Kind = "affine", norm: bool = True, factor: bool = True,
                 scaling: bool = False) -> FlowDensity:
    """A density of pictures; the defaults are those of CIFAR-10 (one downscaling, 8 residual blocks of 64 maps)."""
    flow: nn.Module = MultiScale(shape, scales, hidden, blocks, kind, norm, factor)
    if scaling:
        flow = Chain([flow, Scaling((math.prod(shape),))])
    return FlowDensity(flow, shape, levels)


def weight_scales(module: nn.Module) -> list[nn.Parameter]:
    """The scales g of all weight-normalised layers, and those of couplings."""
    return [p for name, p in module.named_parameters()
            if name.endswith("parametrizations.weight.original0") or name.endswith(".scale")]
