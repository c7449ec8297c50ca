"""The consistency engine: two neighbouring points of one path, and the time to which a model maps both.

A consistency function takes a point x_t of a probability-flow path to the path's point at a target time r, the same
from wherever on the path it starts: f(x_t, t -> r) = f(x_s, s -> r), f(x_r, r -> r) = x_r. Training needs

    a grid      t_1 < ... < t_N, finer and finer where N follows a curriculum
    a pair      x_t = alpha_t x + sigma_t z, and x_s by a solver step of a teacher or from the same x and z
    a target r  0 (consistency models), the edge of the segment that holds s, or s itself (plain step regression)
    an anchor   the model's own estimate at x_s, without gradient, by an averaged or merely detached copy

The estimate f is a DDIM step of a Denoiser from t to r, for r = 0 its x0. Whether f(x, 0) = x holds by construction
is up to the denoiser (`NetworkDenoiser(..., boundary=True)`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from stillhouse.diffusion.grids import Times, check_times
from stillhouse.diffusion.process import Process, expand
from stillhouse.diffusion.samplers import at, ddim_step, euler_step, heun_step
from stillhouse.errors import ConfigError, require
from stillhouse.protocols import Denoiser

Solver = Literal["euler", "heun", "ddim"]
Target = Literal["zero", "edge", "pair"]


def rho_grid(points: int, process: Process, rho: float = 7.0) -> Float[Tensor, " points"]:
    """The times t_1 = 0 < ... < t_N = 1 at which sigma / alpha runs linearly in its rho-th root.

    On VE the levels are (eps^(1 / rho) + (i - 1) / (N - 1) (T^(1 / rho) - eps^(1 / rho)))^rho, eps and T those of the
    process (Song et al. 2023, arXiv 2303.01469, section 3). rho = 0: times uniform in t, for any process.
    Raises ConfigError below two points, and where sigma / alpha is not finite at t = 1.
    """
    require(points >= 2, f"a consistency grid needs two points or more, got {points}")
    ramp = torch.linspace(0, 1, points, dtype=torch.float64)
    if rho == 0:
        return ramp
    low, high = (process.sigma(ramp[[0, -1]]) / process.alpha(ramp[[0, -1]])).tolist()
    require(high < 1e6, f"sigma / alpha of this process is {high:.3g} at t = 1, no end for a rho grid; use rho=0")
    levels = (low ** (1 / rho) + ramp * (high ** (1 / rho) - low ** (1 / rho))) ** rho
    inner = process.time_of_log_snr(-2 * levels[1:-1].log())
    return torch.cat([ramp[:1], inner, ramp[-1:]])


def points_at(k: int, total: int, s0: int, s1: int) -> int:
    """N(k) = ceil(sqrt(k / K ((s1 + 1)^2 - s0^2) + s0^2) - 1) + 1, from s0 to s1 + 1 (Song et al. 2023, appendix C)."""
    return math.ceil(math.sqrt(k / total * ((s1 + 1) ** 2 - s0**2) + s0**2) - 1) + 1


def decay_at(points: int, s0: int, mu0: float) -> float:
    """mu(k) = exp(s0 ln mu0 / N(k)); the released PyTorch code divides by N(k) - 1 (Song et al. 2023, appendix C)."""
    return math.exp(s0 * math.log(mu0) / points) if mu0 > 0 else 0.0


@torch.no_grad()
def solver_step(
    solver: Solver,
    teacher: Denoiser,
    x_t: Float[Tensor, "batch ..."],
    t: Float[Tensor, " batch"],
    s: Float[Tensor, " batch"],
    condition: Tensor | None = None,
) -> Float[Tensor, "batch ..."]:
    """One step of the teacher's probability-flow ODE from t to s: Euler or DDIM (one call), or Heun (two).

    Where sigma_s = 0 every solver takes the teacher's x0. Raises ConfigError on another solver.
    """
    if solver == "ddim":
        return ddim_step(teacher.process, x_t, teacher(x_t, t, condition), t, s)
    if solver == "euler":
        return euler_step(teacher, x_t, t, s, condition)
    require(solver == "heun", f"unknown solver {solver!r}; known are euler, heun, ddim")
    ends = teacher.process.sigma(s) == 0
    if not bool(ends.any()):
        return heun_step(teacher, x_t, t, s, condition)
    inner = torch.where(ends, t / 2, s)
    return torch.where(expand(ends, x_t), teacher(x_t, t, condition), heun_step(teacher, x_t, t, inner, condition))


def follow(
    solver: Solver,
    teacher: Denoiser,
    x_t: Float[Tensor, "batch ..."],
    times: Sequence[float],
    condition: Tensor | None = None,
) -> Float[Tensor, "batch ..."]:
    """Solver steps along falling `times`, the last of them included: the path's point at times[-1]."""
    for t, s in pairwise(times):
        x_t = solver_step(solver, teacher, x_t, at(t, x_t), at(s, x_t), condition)
    return x_t


def target_time(
    target: Target, s: Float[Tensor, " batch"], edges: Sequence[float] = (0.0, 1.0)
) -> Float[Tensor, " batch"]:
    """r for pairs whose lower time is s: 0, the highest of the rising `edges` that is not above s, or s itself."""
    match target:
        case "zero":
            return torch.zeros_like(s)
        case "pair":
            return s
        case "edge":
            require(len(edges) >= 2 and edges[0] == 0 and all(a < b for a, b in pairwise(edges)),
                    f"segment edges must rise from 0, got {tuple(edges)}")
            known = torch.tensor(edges, dtype=s.dtype, device=s.device)
            return known[torch.searchsorted(known, s.contiguous(), right=True) - 1]
    raise ConfigError(f"unknown target {target!r}; known are zero, edge, pair")


def jump(
    denoiser: Denoiser,
    x_t: Float[Tensor, "batch ..."],
    t: Float[Tensor, " batch"],
    r: Float[Tensor, " batch"],
    condition: Tensor | None = None,
) -> Float[Tensor, "batch ..."]:
    """f(x_t, t -> r): the DDIM step of the denoiser, which is its x0 for r = 0 and x_t itself for r = t > 0."""
    return ddim_step(denoiser.process, x_t, denoiser(x_t, t, condition), t, r)


def consistency_pair(
    student: Denoiser,
    anchor: Denoiser,
    x_t: Float[Tensor, "batch ..."],
    t: Float[Tensor, " batch"],
    x_s: Float[Tensor, "batch ..."],
    s: Float[Tensor, " batch"],
    r: Float[Tensor, " batch"] | None = None,
    condition: Tensor | None = None,
) -> tuple[Float[Tensor, "batch ..."], Float[Tensor, "batch ..."]]:
    """f(x_t, t -> r) of the student, and what it must equal, f(x_s, s -> r) of the anchor without gradient.

    Both calls see the same dropout masks. r defaults to 0.
    """
    r = torch.zeros_like(s) if r is None else r
    with torch.no_grad(), torch.random.fork_rng([x_t.device] if x_t.is_cuda else [], enabled=True):
        goal = jump(anchor, x_s, s, r, condition)
    return jump(student, x_t, t, r, condition), goal


def greedy_times(
    score: Callable[[Times], float], calls: int, tolerance: float = 0.02, low: float = 0.0
) -> Times:
    """Times for a sampler of `calls` calls, found one after the other by ternary search on `score` (smaller is better).

    The first time is 1; each further one is searched between `low` and the last (Song et al. 2023, section 3).
    A score that is not unimodal gives a local minimum; use common random numbers in it.
    """
    require(calls >= 1 and tolerance > 0 and 0 <= low < 1, "greedy_times needs calls >= 1, tolerance > 0 and low in "
            f"[0, 1), got {calls}, {tolerance} and {low}")
    times: list[float] = [1.0]
    for _ in range(calls - 1):
        left, right = low, times[-1]
        while right - left > tolerance:
            third = (right - left) / 3
            lower, upper = (score((*times, t, 0.0)) for t in (left + third, right - third))
            left, right = (left, right - third) if lower < upper else (left + third, right)
        times.append((left + right) / 2)
    return check_times((*times, 0.0))
