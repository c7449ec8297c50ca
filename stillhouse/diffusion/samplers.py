"""Deterministic steps, re-noise chains, and the few-step sampler that diffusion distillation returns.

Every step is a differentiable function of its inputs and works in both directions: s < t towards data, s > t
towards noise (from t = 0 only where sigma_0 > 0).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from stillhouse import store
from stillhouse.diffusion.denoise import NetworkDenoiser
from stillhouse.diffusion.grids import Times, check_times, uniform
from stillhouse.diffusion.process import Process, expand
from stillhouse.errors import StoreError, require
from stillhouse.protocols import Denoiser

Mode = Literal["ddim", "renoise", "consistency"]
Noise = Callable[[Tensor], Tensor]


def at(t: float | Tensor, like: Float[Tensor, "batch ..."]) -> Float[Tensor, " batch"]:
    """The time t once per sample of `like`."""
    return torch.as_tensor(t, dtype=like.dtype, device=like.device).expand(len(like))


def ddim_step(
    process: Process,
    x_t: Float[Tensor, "batch ..."],
    x0: Float[Tensor, "batch ..."],
    t: Float[Tensor, " batch"],
    s: Float[Tensor, " batch"],
) -> Float[Tensor, "batch ..."]:
    """x_s = alpha_s x0 + (sigma_s / sigma_t)(x_t - alpha_t x0); at s = 0 it is x0 itself.

    Song et al. 2021 (arXiv 2010.02502), equation 12 with eta = 0. On VE and flow paths it is an Euler step.
    """
    ratio = expand(process.sigma(s) / process.sigma(t), x_t)
    x_s = expand(process.alpha(s), x_t) * x0 + ratio * (x_t - expand(process.alpha(t), x_t) * x0)
    return torch.where(expand(s == 0, x_t), x0, x_s)


def ddim_target(
    process: Process,
    x_t: Float[Tensor, "batch ..."],
    x_s: Float[Tensor, "batch ..."],
    t: Float[Tensor, " batch"],
    s: Float[Tensor, " batch"],
) -> Float[Tensor, "batch ..."]:
    """The x0 for which one DDIM step t -> s lands on x_s; at s = 0 it is x_s itself.

    Salimans & Ho 2022 (arXiv 2202.00512), appendix G: (x_s - r x_t) / (alpha_s - r alpha_t), r = sigma_s / sigma_t.
    """
    ratio = process.sigma(s) / process.sigma(t)
    x0 = (x_s - expand(ratio, x_t) * x_t) / expand(process.alpha(s) - ratio * process.alpha(t), x_t)
    return torch.where(expand(s == 0, x_t), x_s, x0)


def slope(
    process: Process, x_t: Float[Tensor, "batch ..."], x0: Float[Tensor, "batch ..."], t: Float[Tensor, " batch"]
) -> Float[Tensor, "batch ..."]:
    """dx_t / dc of the probability-flow ODE in the clock of the process (sigma on VE, t on flow, the angle on VP)."""
    eps = (x_t - expand(process.alpha(t), x_t) * x0) / expand(process.sigma(t), x_t)
    alpha_slope, sigma_slope = process.slopes(t)
    return expand(alpha_slope, x_t) * x0 + expand(sigma_slope, x_t) * eps


def euler_step(
    denoiser: Denoiser,
    x_t: Float[Tensor, "batch ..."],
    t: Float[Tensor, " batch"],
    s: Float[Tensor, " batch"],
    condition: Tensor | None = None,
) -> Float[Tensor, "batch ..."]:
    """One Euler step of the probability-flow ODE in the clock of the process."""
    process = denoiser.process
    step = expand(process.clock(s) - process.clock(t), x_t)
    return x_t + step * slope(process, x_t, denoiser(x_t, t, condition), t)


def heun_step(
    denoiser: Denoiser,
    x_t: Float[Tensor, "batch ..."],
    t: Float[Tensor, " batch"],
    s: Float[Tensor, " batch"],
    condition: Tensor | None = None,
) -> Float[Tensor, "batch ..."]:
    """One second-order step, two evaluations; Karras et al. 2022, algorithm 1, where the clock is sigma."""
    process = denoiser.process
    step = expand(process.clock(s) - process.clock(t), x_t)
    first = slope(process, x_t, denoiser(x_t, t, condition), t)
    x_s = x_t + step * first
    return x_t + step * 0.5 * (first + slope(process, x_s, denoiser(x_s, s, condition), s))


@torch.no_grad()
def ode_endpoint(
    denoiser: Denoiser,
    z: Float[Tensor, "batch ..."],
    times: Sequence[float] | None = None,
    condition: Tensor | None = None,
    order: Literal[1, 2] = 2,
) -> Float[Tensor, "batch ..."]:
    """Where the probability-flow ODE takes unit noise z: Heun (or DDIM, order 1) steps along `times`.

    The last step, to t = 0, is the denoiser's x0. `times` defaults to 64 uniform steps.
    """
    times = check_times(uniform(64) if times is None else times)
    x_t = denoiser.process.prior(z)
    for t, s in pairwise(times[:-1]):
        if order == 2:
            x_t = heun_step(denoiser, x_t, at(t, z), at(s, z), condition)
        else:
            x_t = ddim_step(denoiser.process, x_t, denoiser(x_t, at(t, z), condition), at(t, z), at(s, z))
    return denoiser(x_t, at(times[-2], z), condition)


def ddim_rollout(
    denoiser: Denoiser,
    x_t: Float[Tensor, "batch ..."],
    times: Sequence[float | Tensor],
    condition: Tensor | None = None,
) -> Float[Tensor, "batch ..."]:
    """Several DDIM steps along `times` (numbers, or one time per sample), differentiable; the last point reached."""
    for t, s in pairwise(times):
        t, s = at(t, x_t), at(s, x_t)
        x_t = ddim_step(denoiser.process, x_t, denoiser(x_t, t, condition), t, s)
    return x_t


def rollout_target(
    denoiser: Denoiser,
    x_t: Float[Tensor, "batch ..."],
    times: Sequence[float | Tensor],
    condition: Tensor | None = None,
) -> Float[Tensor, "batch ..."]:
    """The x0 with which one DDIM step goes where the denoiser's several steps along `times` go.

    With three times it is the target of progressive distillation (`ddim_target`).
    """
    x_s = ddim_rollout(denoiser, x_t, times, condition)
    return ddim_target(denoiser.process, x_t, x_s, at(times[0], x_t), at(times[-1], x_t))


def renoise_chain(
    denoiser: Denoiser,
    x_t: Float[Tensor, "batch ..."],
    times: Sequence[float],
    condition: Tensor | None = None,
    noise: Noise = torch.randn_like,
    from_start: bool = False,
) -> Float[Tensor, "batch ..."]:
    """Denoise, then noise x0 afresh to the next of `times`; returns the sample at the last of them.

    With times[:k + 1] this is backward simulation: the input that a k-th step sees at test (Yin et al. 2024).
    `from_start` takes x0 for a point of the process at t = 0, which has the noise sigma_0 already: on VE it adds
    sqrt(sigma_s^2 - sigma_0^2) eps, the multistep sampler of consistency models (Song et al. 2023, algorithm 1).
    """
    process = denoiser.process
    for t, s in pairwise(times):
        x_t = denoiser(x_t, at(t, x_t), condition)
        if s > 0:
            again = partial(process.renoise, x_t, at(0.0, x_t)) if from_start else partial(process.noise, x_t)
            x_t = again(at(s, x_t), noise(x_t))
    return x_t


class FewStepSampler:
    """Noise in, samples out, in len(times) - 1 calls of a denoiser.

    `mode`: "ddim" steps deterministically; "renoise" draws fresh noise between steps; "consistency" does too, for a
    consistency model, whose output has the noise sigma_0 already. `clip` bounds every x0
    estimate to [-clip, clip], for pictures.
    """

    def __init__(self, denoiser: Denoiser, times: Sequence[float] = (1.0, 0.0), mode: Mode = "ddim",
                 clip: float | None = None):
        require(mode in get_args(Mode), f"mode must be one of {', '.join(get_args(Mode))}, got {mode!r}")
        require(clip is None or clip > 0, f"clip must be positive or None, got {clip}")
        self.denoiser = denoiser
        self.times: Times = check_times(times)
        self.mode: Mode = mode
        self.clip = clip

    @property
    def steps(self) -> int:
        """Calls of the denoiser per sample."""
        return len(self.times) - 1

    def __call__(
        self, z: Float[Tensor, "batch ..."], condition: Tensor | None = None, noise: Noise = torch.randn_like
    ) -> Float[Tensor, "batch ..."]:
        """Samples from unit noise z; `noise` draws what a re-noise chain adds between steps."""
        x_t, denoiser = self.denoiser.process.prior(z), _Clipped(self.denoiser, self.clip)
        if self.mode == "ddim":
            return ddim_rollout(denoiser, x_t, self.times, condition)
        return renoise_chain(denoiser, x_t, self.times, condition, noise, self.mode == "consistency")

    def save(self, folder: Path | str) -> Path:
        """Write weights and settings into `folder`; `FewStepSampler.load(folder, network)` reads them.

        The architecture is not stored: `load` fills the weights into a network that you build. Raises StoreError
        where the denoiser is not a `NetworkDenoiser`, or the folder cannot be written.
        """
        folder = Path(folder)
        if not isinstance(self.denoiser, NetworkDenoiser):
            raise StoreError(f"only a sampler of a NetworkDenoiser can be saved, not {type(self.denoiser).__name__}")
        settings = {"times": list(self.times), "mode": self.mode, "clip": self.clip, "denoiser": self.denoiser.spec()}
        store.save_tree(folder / "weights.safetensors", dict(self.denoiser.network.state_dict()))
        store.write_text(folder / "sampler.json", json.dumps(settings, indent=1))
        return folder

    @classmethod
    def load(cls, folder: Path | str, network: nn.Module) -> FewStepSampler:
        """The sampler saved in `folder`, its weights put into `network`.

        Raises StoreError where the folder holds no sampler, or the network has other weights.
        """
        folder = Path(folder)
        path = folder / "sampler.json"
        if not path.is_file():
            raise StoreError(f"{folder} holds no saved sampler: sampler.json is missing")
        settings = json.loads(path.read_text())
        try:
            network.load_state_dict(store.load_tree(folder / "weights.safetensors"))
        except RuntimeError as error:
            raise StoreError(f"the network given does not have the weights saved in {folder}: {error}") from error
        denoiser = NetworkDenoiser.from_spec(network, settings["denoiser"])
        return cls(denoiser, settings["times"], settings["mode"], settings["clip"])


class SamplerLadder:
    """Samplers of one model by step count, as halving leaves them: `ladder[4]` takes four steps."""

    def __init__(self, samplers: Mapping[int, FewStepSampler]):
        require(bool(samplers), "a ladder needs at least one sampler")
        self.samplers = {n: samplers[n] for n in sorted(samplers, reverse=True)}

    @property
    def rungs(self) -> tuple[int, ...]:
        """The step counts, falling."""
        return tuple(self.samplers)

    def __getitem__(self, steps: int) -> FewStepSampler:
        require(steps in self.samplers, f"no sampler with {steps} steps was kept, only {self.rungs}")
        return self.samplers[steps]

    def __call__(self, z: Float[Tensor, "batch ..."], condition: Tensor | None = None) -> Float[Tensor, "batch ..."]:
        """Samples from unit noise with the fewest steps."""
        return self[self.rungs[-1]](z, condition)

    def save(self, folder: Path | str) -> Path:
        """Write each sampler into its own folder, `steps-4` and so on."""
        for n in self.rungs:
            self[n].save(Path(folder) / f"steps-{n}")
        return Path(folder)

    @classmethod
    def load(cls, folder: Path | str, network: Callable[[], nn.Module]) -> SamplerLadder:
        """The ladder saved in `folder`; `network` is called once per sampler. Raises StoreError where there is none."""
        found = sorted(Path(folder).glob("steps-*"))
        if not found:
            raise StoreError(f"{folder} holds no saved samplers (no folder steps-*)")
        return cls({int(p.name.removeprefix("steps-")): FewStepSampler.load(p, network()) for p in found})


class _Clipped:
    def __init__(self, denoiser: Denoiser, bound: float | None):
        self.denoiser, self.bound, self.process = denoiser, bound, denoiser.process
        self.null_condition = denoiser.null_condition

    def __call__(self, x_t: Tensor, t: Tensor, condition: Tensor | None = None) -> Tensor:
        x0 = self.denoiser(x_t, t, condition)
        return x0 if self.bound is None else x0.clamp(-self.bound, self.bound)
