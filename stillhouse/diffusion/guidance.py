"""Classifier-free guidance: uncond + scale (cond - uncond), on x0 estimates.

Scale 1 is no guidance. A paper's w with (1 + w) cond - w uncond is scale 1 + w (Ho & Salimans 2022, arXiv
2207.12598; diffusers' guidance_scale is the scale here).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from stillhouse.diffusion.convert import eps_of
from stillhouse.errors import RoleError
from stillhouse.protocols import Denoiser


class Guided(nn.Module):
    """A denoiser under guidance. `calls` counts evaluations of the network per sample: two, or one at scale 1.

    Gradients flow to the input as through any denoiser; parameters are the caller's to freeze.
    """

    denoiser: Any
    null_condition: Any

    def __init__(self, denoiser: Denoiser, scale: float = 1.0, null_condition: Tensor | None = None):
        super().__init__()
        null = denoiser.null_condition if null_condition is None else null_condition
        if null is None and scale != 1:
            raise RoleError(f"guidance at scale {scale} needs a null condition, and the denoiser names none; pass "
                            "null_condition, or use scale 1")
        self.denoiser = denoiser
        self.process = denoiser.process
        self.scale = scale
        self.register_buffer("null_condition", null, persistent=False)
        self.calls = 0

    def forward(
        self, x_t: Float[Tensor, "batch ..."], t: Float[Tensor, " batch"], condition: Tensor | None = None
    ) -> Float[Tensor, "batch ..."]:
        """The guided estimate of x0. Raises RoleError where guidance is asked for without a condition."""
        if self.scale == 1:
            self.calls += 1
            return self.denoiser(x_t, t, condition)
        if condition is None:
            raise RoleError(f"guidance at scale {self.scale} needs a condition for every sample, got None")
        self.calls += 2
        null = null_like(self.null_condition, condition)
        both = self.denoiser(torch.cat([x_t, x_t]), torch.cat([t, t]), torch.cat([condition, null]))
        cond, uncond = both.chunk(2)
        return uncond + self.scale * (cond - uncond)


def null_like(null_condition: Tensor, condition: Shaped[Tensor, "batch ..."]) -> Shaped[Tensor, "batch ..."]:
    """One null condition (no batch axis) repeated for every sample of `condition`."""
    return null_condition.to(condition.device, condition.dtype).expand_as(condition)


def noise_predictions(
    process: Any, x_t: Float[Tensor, "batch ..."], t: Float[Tensor, " batch"], **x0: Callable[[], Tensor]
) -> dict[str, Callable[[], Tensor]]:
    """Named estimates of x0 as the noise they imply, each made only when it is asked for: what
    `stillhouse.measures.score_distillation` combines."""
    alpha, sigma = process.alpha(t), process.sigma(t)

    def reading(estimate: Callable[[], Tensor]) -> Callable[[], Tensor]:
        return lambda: eps_of(estimate(), x_t, alpha, sigma)

    return {name: reading(estimate) for name, estimate in x0.items()}
