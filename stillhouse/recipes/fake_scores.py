"""The fitting of a fake score: a denoiser that follows the distribution of what is being made."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor, nn

from stillhouse.diffusion.weights import weighted_error, x0_weight
from stillhouse.parts.fake_scores import FakeScore, SeparateScores
from stillhouse.parts.lora import adapted
from stillhouse.run import Run

LOWEST = 1e-3


@contextlib.contextmanager
def adapted_score(teacher: Any, rank: int, cameras: bool = True) -> Iterator[FakeScore]:
    """LoRA on the teacher's own network as a fake score; the adapters leave the teacher at the end."""
    with adapted(getattr(teacher, "network", teacher), rank) as lora:
        yield FakeScore(teacher, lora, cameras)


def network_score(network: Callable[[], nn.Module], cameras: bool = True, separate: int = 0) -> nn.Module:
    """A network of its own as a fake score, or `separate` copies of it, one a particle."""
    fake = FakeScore(network(), cameras=cameras)
    return SeparateScores(fake, separate) if separate else fake


def fake_loss(
    fake: Any, x: Float[Tensor, "batch ..."], run: Run, condition: Tensor | None = None,
    pose: Float[Tensor, "batch 4 4"] | None = None, particle: Int[Tensor, " batch"] | None = None, free: float = 0.1,
) -> Tensor:
    """|eps_phi - eps|^2 (|v_phi - v|^2 of a v-network) on noised x, at times over the whole range.

    A camera `pose` is left out with probability `free`; `particle` says which of several fake scores is meant.
    """
    n, process = len(x), fake.process
    t = LOWEST + (1 - LOWEST) * run.rand(n)
    x_t = process.noise(x, t, run.randn_like(x))
    if pose is not None:
        pose = pose * (run.rand(n) >= free)[:, None, None]
    weight = x0_weight("snr" if fake.parameterisation == "eps" else "snr_plus_one", process, t)
    own = () if particle is None else (particle,)
    return weighted_error(fake(x_t, t, condition, pose, *own), x, weight)
