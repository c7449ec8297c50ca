"""Time grids: decreasing times from the first evaluation to 0, so n steps are n + 1 numbers.

Times follow the house convention (1 is noise, 0 is data). Where a scheduler counts integer timesteps k of T, the
time is (k + 1) / T, as in `VPTable`.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from jaxtyping import Float, Int
from torch import Tensor

from stillhouse.diffusion.process import Process, VPTable
from stillhouse.errors import require

Times = tuple[float, ...]


def uniform(steps: int) -> Times:
    """i / n for i = n, ..., 0."""
    require(steps >= 1, f"a time grid needs at least one step, got {steps}")
    return tuple(i / steps for i in range(steps, -1, -1))


def trailing(steps: int, timesteps: int = 1000) -> Times:
    """Timesteps round(T - i T / n) - 1, which begin at T - 1 (Lin et al. 2023, arXiv 2305.08891, table 2)."""
    require(1 <= steps <= timesteps, f"trailing spacing needs 1 to {timesteps} steps, got {steps}")
    return (*(round(timesteps - i * timesteps / steps) / timesteps for i in range(steps)), 0.0)


def leading(steps: int, timesteps: int = 1000, offset: int = 0) -> Times:
    """Timesteps i (T // n) + offset in falling order, which never reach T - 1 for n > 1 (DDIM's original spacing)."""
    require(1 <= steps <= timesteps, f"leading spacing needs 1 to {timesteps} steps, got {steps}")
    stride = timesteps // steps
    return check_times((*((i * stride + offset + 1) / timesteps for i in range(steps - 1, -1, -1)), 0.0))


def karras(
    steps: int, process: Process, rho: float = 7.0, sigma_min: float | None = None, sigma_max: float | None = None
) -> Times:
    """The times of `process` at which sigma / alpha runs linearly in sigma^(1 / rho), then 0.

    Karras et al. 2022 (arXiv 2206.00364), equation 5; the bounds default to those of the process at t = 0 and 1.
    """
    require(steps >= 1, f"a time grid needs at least one step, got {steps}")
    ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
    low, high = (process.sigma(ends) / process.alpha(ends)).tolist()
    low, high = sigma_min or low, sigma_max or high
    require(0 < low < high < float("inf"), f"the Karras grid needs finite bounds on sigma / alpha, got {low} and "
            f"{high}; pass sigma_min and sigma_max")
    ramp = torch.linspace(0, 1, steps, dtype=torch.float64)
    sigmas = (high ** (1 / rho) + ramp * (low ** (1 / rho) - high ** (1 / rho))) ** rho
    return check_times((*process.time_of_log_snr(-2 * sigmas.log()).clamp(1e-9, 1).tolist(), 0.0))


def from_timesteps(timesteps: Sequence[int], total: int = 1000) -> Times:
    """A scheduler's own list, such as [999, 749, 499, 249], as times."""
    return check_times((*((k + 1) / total for k in timesteps), 0.0))


def level_times(process: Process, index: Int[Tensor, " batch"], total: int = 1000) -> Float[Tensor, " batch"]:
    """The time of noise level `index` of `total`, counted from the smallest.

    On a `VPTable` index k is timestep k; on a continuous process index 0 is t = 0 and the last is t = 1 (on a
    Karras `VE` that is the stored sigma grid of Yin et al. 2024, arXiv 2405.14867).
    """
    if isinstance(process, VPTable):
        return (index * (process.timesteps / total)).floor().add(1).div(process.timesteps)
    return index.to(torch.get_default_dtype()) / (total - 1)


def two_phase_times(
    u: Float[Tensor, " batch"], progress: float, bounds: tuple[float, float], late: float, switch: float
) -> Float[Tensor, " batch"]:
    """Times from uniform u: over `bounds` at first, from the fraction `switch` of the steps on only up to `late`.

    Wang et al. 2023 (arXiv 2305.16213), section 4.3: large times give the layout, small ones the details.
    """
    low, high = bounds[0], late if progress >= switch else bounds[1]
    return low + (high - low) * u


def check_times(times: Sequence[float]) -> Times:
    """The times as a tuple. Raises ConfigError unless they fall from at most 1 to exactly 0."""
    times = tuple(float(t) for t in times)
    falls = len(times) >= 2 and times[0] <= 1 and times[-1] == 0 and all(a > b for a, b in pairwise(times))
    require(falls, f"times must fall from at most 1 to 0, such as (1.0, 0.5, 0.0); got {times}")
    return times
