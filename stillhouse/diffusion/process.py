"""Noise processes: x_t = alpha_t x + sigma_t eps, with t = 0 data and t = 1 noise, whatever the paper's own clock.

Every process is a path (how alpha and sigma depend on a clock c) and the clock as a function of t:

    path   alpha      sigma                 clock c
    vp     cos c      sigma_data sin c      an angle (variance preserving, TrigFlow)
    ve     1          c                     the noise level itself (EDM)
    flow   1 - c      c                     the time of flow matching

The slopes d alpha/dc and d sigma/dc are closed forms, so Euler and Heun steps are taken in c.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from stillhouse.errors import ConfigError, require

Path = Literal["vp", "ve", "flow"]


@dataclass(frozen=True)
class Process(ABC):
    """What all processes share; use one of `VPCosine`, `VPTable`, `VE`, `Flow`, `TrigFlow`."""

    path: ClassVar[Path] = "vp"
    noise_scale: ClassVar[float] = 1.0

    @abstractmethod
    def clock(self, t: Tensor) -> Tensor:
        """The clock c at time t; see the table of paths."""

    @abstractmethod
    def time(self, clock: Tensor) -> Tensor:
        """The inverse of `clock`."""

    def alpha(self, t: Float[Tensor, "*times"]) -> Float[Tensor, "*times"]:
        """Scale of the signal at time t."""
        c = self.clock(t)
        if self.path == "vp":
            return torch.cos(c)
        return torch.ones_like(c) if self.path == "ve" else 1 - c

    def sigma(self, t: Float[Tensor, "*times"]) -> Float[Tensor, "*times"]:
        """Standard deviation of the noise at time t."""
        c = self.clock(t)
        return self.noise_scale * torch.sin(c) if self.path == "vp" else c

    def slopes(self, t: Float[Tensor, "*times"]) -> tuple[Float[Tensor, "*times"], Float[Tensor, "*times"]]:
        """d alpha / dc and d sigma / dc at time t."""
        c = self.clock(t)
        if self.path == "vp":
            return -torch.sin(c), self.noise_scale * torch.cos(c)
        return (torch.zeros_like(c) if self.path == "ve" else -torch.ones_like(c)), torch.ones_like(c)

    def log_snr(self, t: Float[Tensor, "*times"]) -> Float[Tensor, "*times"]:
        """log(alpha_t^2 / sigma_t^2); infinite where alpha or sigma is 0."""
        return 2 * (self.alpha(t).abs().log() - self.sigma(t).log())

    def snr(self, t: Float[Tensor, "*times"]) -> Float[Tensor, "*times"]:
        """alpha_t^2 / sigma_t^2."""
        return (self.alpha(t) / self.sigma(t)) ** 2

    def time_of_log_snr(self, log_snr: Float[Tensor, "*times"]) -> Float[Tensor, "*times"]:
        """The time at which the process has this log SNR."""
        ratio = torch.exp(-log_snr / 2)
        if self.path == "vp":
            return self.time(torch.atan(ratio / self.noise_scale))
        return self.time(ratio if self.path == "ve" else ratio / (1 + ratio))

    def noise(
        self, x: Float[Tensor, "batch ..."], t: Float[Tensor, " batch"], eps: Float[Tensor, "batch ..."]
    ) -> Float[Tensor, "batch ..."]:
        """x_t = alpha_t x + sigma_t eps."""
        return expand(self.alpha(t), x) * x + expand(self.sigma(t), x) * eps

    def renoise(
        self,
        x_s: Float[Tensor, "batch ..."],
        s: Float[Tensor, " batch"],
        t: Float[Tensor, " batch"],
        eps: Float[Tensor, "batch ..."],
    ) -> Float[Tensor, "batch ..."]:
        """A draw of x_t given x_s, s <= t: mean (alpha_t / alpha_s) x_s, variance sigma_t^2 - (that sigma_s)^2."""
        ratio = self.alpha(t) / self.alpha(s)
        std = (self.sigma(t) ** 2 - (ratio * self.sigma(s)) ** 2).clamp(min=0).sqrt()
        return expand(ratio, x_s) * x_s + expand(std, x_s) * eps

    def prior(self, z: Float[Tensor, "batch ..."]) -> Float[Tensor, "batch ..."]:
        """Unit noise scaled to what a sampler starts from, sigma_1 z."""
        return self.sigma(torch.ones((), dtype=z.dtype, device=z.device)) * z

    def spec(self) -> dict[str, Any]:
        """What `process_of` needs to build the same process: numbers and strings only."""
        return {"kind": type(self).__name__, **asdict(self)}


@dataclass(frozen=True)
class VPCosine(Process):
    """alpha = cos c, sigma = sin c with the angle running linearly between the two ends of the log SNR bound.

    log SNR = -2 ln tan(b + (e - b) t), b = atan(exp(-bound / 2)), e = atan(exp(bound / 2)); alpha_1 is about
    exp(-bound / 2) instead of 0. `bound=None` is the plain cosine schedule with alpha_1 = 0.
    Salimans & Ho 2022 (arXiv 2202.00512), section 2 and the released code.
    """

    bound: float | None = 20.0

    def _ends(self) -> tuple[float, float]:
        if self.bound is None:
            return 0.0, math.pi / 2
        return math.atan(math.exp(-self.bound / 2)), math.atan(math.exp(self.bound / 2))

    def clock(self, t: Tensor) -> Tensor:
        start, end = self._ends()
        return start + (end - start) * t

    def time(self, clock: Tensor) -> Tensor:
        start, end = self._ends()
        return (clock - start) / (end - start)


@dataclass(frozen=True)
class VPTable(Process):
    """A discrete DDPM schedule: timestep k of T is the time t = (k + 1) / T, and t = 0 is clean data.

    `quantise` moves every time to the nearest timestep, which is what a network trained on integers has seen;
    without it the angle is interpolated linearly, exact at the timesteps.
    """

    alphas_cumprod: tuple[float, ...] = field(repr=False)
    quantise: bool = True

    def __post_init__(self):
        table = self.alphas_cumprod
        falls = len(table) > 1 and all(0 <= v <= 1 for v in table) and all(a > b for a, b in pairwise(table))
        require(falls, "alphas_cumprod must be two or more numbers in [0, 1] that decrease")
        object.__setattr__(self, "alphas_cumprod", tuple(float(v) for v in table))

    @property
    def timesteps(self) -> int:
        """T, the number of timesteps."""
        return len(self.alphas_cumprod)

    def timestep(self, t: Float[Tensor, "*times"]) -> Float[Tensor, "*times"]:
        """The timestep k = t T - 1 that a network expects at time t (whole numbers where `quantise`)."""
        k = t * self.timesteps - 1
        return (k.round() if self.quantise else k).clamp(min=0)

    def _angles(self, like: Tensor) -> Tensor:
        table = torch.tensor((1.0, *self.alphas_cumprod), dtype=torch.float64, device=like.device)
        return torch.atan2((1 - table).sqrt(), table.sqrt()).to(like.dtype)

    def clock(self, t: Tensor) -> Tensor:
        angles = self._angles(t)
        place = (t * self.timesteps).clamp(0, self.timesteps)
        if self.quantise:
            return angles[place.round().long()]
        below = place.floor().long().clamp(max=self.timesteps - 1)
        return torch.lerp(angles[below], angles[below + 1], place - below)

    def time(self, clock: Tensor) -> Tensor:
        angles = self._angles(clock)
        above = torch.searchsorted(angles, clock.contiguous()).clamp(1, self.timesteps)
        low, high = angles[above - 1], angles[above]
        t = (above - 1 + (clock - low) / (high - low)) / self.timesteps
        return (t * self.timesteps).round() / self.timesteps if self.quantise else t


@dataclass(frozen=True)
class VE(Process):
    """alpha = 1; sigma runs from sigma_min at t = 0 to sigma_max at t = 1.

    sigma^(1 / rho) is linear in t (Karras et al. 2022, arXiv 2206.00364, equation 5); rho = 0 stands for
    infinity, log sigma linear in t.
    """

    path: ClassVar[Path] = "ve"
    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0

    def __post_init__(self):
        require(0 < self.sigma_min < self.sigma_max, "VE needs 0 < sigma_min < sigma_max, got "
                f"{self.sigma_min} and {self.sigma_max}")
        require(self.rho >= 0, f"rho must be 0 (geometric) or positive, got {self.rho}")

    def clock(self, t: Tensor) -> Tensor:
        if self.rho == 0:
            return self.sigma_min * (self.sigma_max / self.sigma_min) ** t
        low, high = self.sigma_min ** (1 / self.rho), self.sigma_max ** (1 / self.rho)
        return (low + (high - low) * t) ** self.rho

    def time(self, clock: Tensor) -> Tensor:
        if self.rho == 0:
            return (clock / self.sigma_min).log() / math.log(self.sigma_max / self.sigma_min)
        low, high = self.sigma_min ** (1 / self.rho), self.sigma_max ** (1 / self.rho)
        return (clock ** (1 / self.rho) - low) / (high - low)


@dataclass(frozen=True)
class Flow(Process):
    """alpha = 1 - t, sigma = t: rectified flow and flow matching (Lipman et al. 2023; Liu et al. 2023)."""

    path: ClassVar[Path] = "flow"

    def clock(self, t: Tensor) -> Tensor:
        return t

    def time(self, clock: Tensor) -> Tensor:
        return clock


@dataclass(frozen=True)
class TrigFlow(Process):
    """alpha = cos(pi t / 2), sigma = sigma_data sin(pi t / 2) (Lu & Song 2024, arXiv 2410.11081)."""

    sigma_data: float = 0.5

    @property
    def noise_scale(self) -> float:  # type: ignore[override]
        return self.sigma_data

    def clock(self, t: Tensor) -> Tensor:
        return t * (math.pi / 2)

    def time(self, clock: Tensor) -> Tensor:
        return clock / (math.pi / 2)


def ddpm_linear(timesteps: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02) -> VPTable:
    """The linear-beta table of DDPM (Ho et al. 2020, arXiv 2006.11239)."""
    betas = torch.linspace(beta_start, beta_end, timesteps, dtype=torch.float64)
    return VPTable(tuple(torch.cumprod(1 - betas, 0).tolist()))


def process_of(spec: dict[str, Any]) -> Process:
    """The process described by `Process.spec`. Raises ConfigError where the kind is unknown."""
    kinds: dict[str, Any] = {kind.__name__: kind for kind in (VPCosine, VPTable, VE, Flow, TrigFlow)}
    options = {name: tuple(v) if isinstance(v, list) else v for name, v in spec.items() if name != "kind"}
    if spec.get("kind") not in kinds:
        raise ConfigError(f"unknown process {spec.get('kind')!r}; known are {', '.join(kinds)}")
    return kinds[spec["kind"]](**options)


def expand(value: Shaped[Tensor, " batch"] | Shaped[Tensor, ""], like: Shaped[Tensor, "batch ..."]) -> Tensor:
    """One number per sample, given trailing axes so that it multiplies a batch of any shape."""
    return value.reshape(*value.shape, *[1] * (like.ndim - value.ndim)) if value.ndim else value
