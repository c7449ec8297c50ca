"""Editing without training: a re-noise chain that puts what is known of a sample back after every step.

An edit is an orthogonal map A of samples to coefficients and a mask of the coefficients that are known; after every
step x <- A^-1[(A y) known + (A x) (1 - known)] (Song et al. 2023, arXiv 2303.01469, algorithm 4).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from stillhouse.diffusion.grids import check_times
from stillhouse.diffusion.samplers import Noise, at
from stillhouse.errors import DataError, require
from stillhouse.protocols import Denoiser

Map = Callable[[Tensor], Tensor]
LUMA = (0.2989, 0.5870, 0.1140)


@dataclass(frozen=True)
class Known:
    """What an edit keeps: `known` (True where a coefficient is given), and A and its inverse."""

    known: Bool[Tensor, "*shape"]
    analyse: Map
    synthesise: Map

    def project(self, x: Float[Tensor, "batch ..."], y: Float[Tensor, "batch ..."]) -> Float[Tensor, "batch ..."]:
        """x with the known coefficients of y."""
        return self.synthesise(torch.where(self.known.to(x.device), self.analyse(y), self.analyse(x)))


def inpainting(known: Bool[Tensor, "*shape"]) -> Known:
    """Entries where `known` (broadcast over the batch) are given; A is the identity."""
    return Known(known, _same, _same)


def colourisation(weights: tuple[float, float, float] = LUMA) -> Known:
    """Grey values are given, colour is made: A rotates [batch, 3, h, w] so that channel 0 is the weighted grey.

    y is any picture with the known grey values, such as the grey value in all three channels.
    """
    rotation = _completed(torch.tensor(weights, dtype=torch.float64))
    known = torch.tensor([True, False, False])[:, None, None]
    return Known(known, lambda x: _mix(rotation, x), lambda x: _mix(rotation.T, x))


def super_resolution(patch: int) -> Known:
    """The mean of every patch x patch square of [batch, c, h, w] is given; A is an orthogonal basis of a patch.

    y is any picture with the known means, such as the small picture with every pixel repeated.
    """
    require(patch >= 2, f"patch must be at least 2 pixels, got {patch}", DataError)
    basis = _completed(torch.ones(patch**2, dtype=torch.float64))
    known = (torch.arange(patch**2) == 0)[:, None, None, None]

    def analyse(x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        require(h % patch == 0 and w % patch == 0, f"pictures of {h} x {w} pixels have no whole patches of {patch} x "
                f"{patch}", DataError)
        cells = x.reshape(n, c, h // patch, patch, w // patch, patch).permute(0, 3, 5, 1, 2, 4)
        return torch.einsum("ij,njchw->nichw", basis.to(x), cells.flatten(1, 2))

    def synthesise(a: Tensor) -> Tensor:
        n, _, c, h, w = a.shape
        cells = torch.einsum("ji,njchw->nichw", basis.to(a), a).view(n, patch, patch, c, h, w)
        return cells.permute(0, 3, 4, 1, 5, 2).reshape(n, c, h * patch, w * patch)

    return Known(known, analyse, synthesise)


@torch.no_grad()
def edit(
    denoiser: Denoiser,
    y: Float[Tensor, "batch ..."],
    known: Known,
    times: Sequence[float],
    condition: Tensor | None = None,
    noise: Noise = torch.randn_like,
) -> Float[Tensor, "batch ..."]:
    """Samples that have the known coefficients of y, by a consistency model in len(times) - 1 calls.

    What of y is not known is not read. With times[0] below 1 and nothing known it refines a sketch y (SDEdit).
    """
    process, times, y = denoiser.process, check_times(times), y.contiguous()
    start = known.project(torch.zeros_like(y), y) if bool(known.known.any()) else y
    x_t = process.noise(start, at(times[0], y), noise(y))
    for t, s in pairwise(times):
        x = known.project(denoiser(x_t, at(t, y), condition), y)
        x_t = process.renoise(x, at(0.0, y), at(s, y), noise(y)) if s > 0 else x
    return x_t


def slerp(
    a: Float[Tensor, "batch ..."], b: Float[Tensor, "batch ..."], share: float
) -> Float[Tensor, "batch ..."]:
    """Spherical interpolation of noise, a at share 0 and b at 1, per sample: its samples interpolate."""
    flat_a, flat_b = a.flatten(1), b.flatten(1)
    cosine = torch.nn.functional.cosine_similarity(flat_a, flat_b, dim=1).clamp(-1 + 1e-7, 1 - 1e-7)
    angle = cosine.acos()[:, None]
    mixed = (((1 - share) * angle).sin() * flat_a + (share * angle).sin() * flat_b) / angle.sin()
    return mixed.view_as(a)


def denoise(
    denoiser: Denoiser, x: Float[Tensor, "batch ..."], sigma: float, condition: Tensor | None = None
) -> Float[Tensor, "batch ..."]:
    """x, a sample with noise of standard deviation sigma (over alpha), cleaned by one call."""
    process = denoiser.process
    t = process.time_of_log_snr(torch.full((len(x),), sigma, dtype=x.dtype, device=x.device).log() * -2).clamp(0, 1)
    return denoiser(x * process.alpha(t).view(-1, *[1] * (x.ndim - 1)), t, condition)


def _completed(first: Tensor) -> Tensor:
    """An orthogonal matrix whose first row is `first` made unit length."""
    rows, _ = torch.linalg.qr(torch.cat([first[:, None], torch.eye(len(first), dtype=first.dtype)[:, 1:]], 1))
    return (rows * torch.sign((rows[:, 0] * first).sum())).T


def _mix(matrix: Tensor, x: Tensor) -> Tensor:
    return torch.einsum("ij,njhw->nihw", matrix.to(x), x)


def _same(x: Tensor) -> Tensor:
    return x
