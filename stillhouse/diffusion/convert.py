"""Conversions among what denoising networks predict, at given alpha and sigma (x_t = alpha x + sigma eps).

    kind       output                                   x0
    x0         x                                        the output
    eps        eps                                      (x_t - sigma eps) / alpha; undefined at alpha = 0
    v          alpha eps - sigma x                      (alpha x_t - sigma v) / (alpha^2 + sigma^2)
    flow       eps - x                                  (x_t - sigma u) / (alpha + sigma)
    edm        F, x = c_skip x_t + c_out F              Karras et al. 2022, table 1, on x_t / alpha
    trigflow   -F of edm                                Lu & Song 2024 (cos c x_t - sin c sigma_data F)
    joint      [x, eps] along axis 1                    sigma^2 x + alpha^2 x(eps), both over alpha^2 + sigma^2

`joint` is Salimans & Ho 2022 (section 4); it has no inverse. `sigma_data` matters for edm and trigflow only.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from stillhouse.diffusion.process import Process, expand
from stillhouse.errors import ConfigError, require

Parameterisation = Literal["x0", "eps", "v", "flow", "edm", "trigflow", "joint"]
PARAMETERISATIONS: tuple[str, ...] = get_args(Parameterisation)


def to_x0(
    kind: Parameterisation,
    output: Float[Tensor, "batch ..."],
    x_t: Float[Tensor, "batch ..."],
    alpha: Float[Tensor, " batch"],
    sigma: Float[Tensor, " batch"],
    sigma_data: float = 1.0,
) -> Float[Tensor, "batch ..."]:
    """The estimate of x that a network's output of this kind stands for. Raises ConfigError on an unknown kind."""
    a, s = expand(alpha, x_t), expand(sigma, x_t)
    match kind:
        case "x0":
            return output
        case "eps":
            return (x_t - s * output) / a
        case "v":
            return (a * x_t - s * output) / (a**2 + s**2)
        case "flow":
            return (x_t - s * output) / (a + s)
        case "edm":
            c_skip, c_out = _edm(a, s, sigma_data)
            return c_skip * x_t + c_out * output
        case "trigflow":
            c_skip, c_out = _edm(a, s, sigma_data)
            return c_skip * x_t - c_out * output
        case "joint":
            require(output.shape[1] == 2 * x_t.shape[1], f"a joint (x, eps) output has twice the channels of its "
                    f"input: expected {2 * x_t.shape[1]} along axis 1, got {output.shape[1]}")
            x, eps = output.chunk(2, dim=1)
            return (s**2 * x + a * (x_t - s * eps)) / (a**2 + s**2)
    raise ConfigError(f"unknown parameterisation {kind!r}; known are {', '.join(PARAMETERISATIONS)}")


def from_x0(
    kind: Parameterisation,
    x0: Float[Tensor, "batch ..."],
    x_t: Float[Tensor, "batch ..."],
    alpha: Float[Tensor, " batch"],
    sigma: Float[Tensor, " batch"],
    sigma_data: float = 1.0,
) -> Float[Tensor, "batch ..."]:
    """The output of this kind that stands for x0; needs sigma > 0 except for kind x0.

    Raises ConfigError on an unknown kind, and on `joint`, which x0 alone does not determine.
    """
    a, s = expand(alpha, x_t), expand(sigma, x_t)
    match kind:
        case "x0":
            return x0
        case "eps":
            return eps_of(x0, x_t, alpha, sigma)
        case "v":
            return a * eps_of(x0, x_t, alpha, sigma) - s * x0
        case "flow":
            return eps_of(x0, x_t, alpha, sigma) - x0
        case "edm":
            c_skip, c_out = _edm(a, s, sigma_data)
            return (x0 - c_skip * x_t) / c_out
        case "trigflow":
            c_skip, c_out = _edm(a, s, sigma_data)
            return (c_skip * x_t - x0) / c_out
        case "joint":
            raise ConfigError("a joint (x, eps) output is not determined by x0; choose x0, eps or v")
    raise ConfigError(f"unknown parameterisation {kind!r}; known are {', '.join(PARAMETERISATIONS)}")


def convert(
    output: Float[Tensor, "batch ..."],
    given: Parameterisation,
    wanted: Parameterisation,
    x_t: Float[Tensor, "batch ..."],
    alpha: Float[Tensor, " batch"],
    sigma: Float[Tensor, " batch"],
    sigma_data: float = 1.0,
) -> Float[Tensor, "batch ..."]:
    """An output of kind `given` as one of kind `wanted`."""
    x0 = to_x0(given, output, x_t, alpha, sigma, sigma_data)
    return from_x0(wanted, x0, x_t, alpha, sigma, sigma_data)


def eps_of(
    x0: Float[Tensor, "batch ..."],
    x_t: Float[Tensor, "batch ..."],
    alpha: Float[Tensor, " batch"],
    sigma: Float[Tensor, " batch"],
) -> Float[Tensor, "batch ..."]:
    """The noise that x0 implies, (x_t - alpha x0) / sigma."""
    return (x_t - expand(alpha, x_t) * x0) / expand(sigma, x_t)


def score_of(
    x0: Float[Tensor, "batch ..."],
    x_t: Float[Tensor, "batch ..."],
    alpha: Float[Tensor, " batch"],
    sigma: Float[Tensor, " batch"],
) -> Float[Tensor, "batch ..."]:
    """grad log p_t(x_t) = (alpha x0 - x_t) / sigma^2 (Tweedie)."""
    return (expand(alpha, x_t) * x0 - x_t) / expand(sigma, x_t) ** 2


def input_scale(alpha: Tensor, sigma: Tensor, sigma_data: float = 1.0) -> Tensor:
    """c_in = 1 / sqrt(alpha^2 sigma_data^2 + sigma^2): what gives a network's input unit variance."""
    return torch.rsqrt((alpha * sigma_data) ** 2 + sigma**2)


def boundary_scales(
    process: Process, t: Float[Tensor, " batch"], sigma_data: float = 1.0, kind: Parameterisation = "edm"
) -> tuple[Float[Tensor, " batch"], Float[Tensor, " batch"]]:
    """c_skip and c_out of a consistency model f = c_skip x_t + c_out F, with c_skip = 1 and c_out = 0 at t = 0.

    With d = sigma_t - alpha_t sigma_0 / alpha_0, on x_t / alpha_t, and sigma_data as in edm:

        c_skip = alpha_0 alpha_t sigma_data^2 / (d^2 + alpha_t^2 sigma_data^2)
        c_out  = alpha_0 sigma_data d / sqrt(alpha_t^2 sigma_data^2 + sigma_t^2)

    On VE these are those of Song et al. 2023 (arXiv 2303.01469), appendix C; with sigma_0 = 0 those of edm. F is the
    network's output for edm, its negative for trigflow; for every other kind F is the estimate of x0, and
    c_out = alpha_0 d / sqrt(d^2 + alpha_t^2 sigma_data^2) (Luo et al. 2023, arXiv 2310.04378, section 4.1).
    """
    alpha, sigma = process.alpha(t), process.sigma(t)
    alpha_0, sigma_0 = process.alpha(torch.zeros_like(t)), process.sigma(torch.zeros_like(t))
    d, signal = sigma - alpha / alpha_0 * sigma_0, alpha * alpha * sigma_data**2
    c_skip = alpha_0 * alpha * sigma_data**2 / (d**2 + signal)
    if kind in ("edm", "trigflow"):
        c_out = alpha_0 * sigma_data * d / (signal + sigma**2).sqrt()
        return c_skip, c_out if kind == "edm" else -c_out
    return c_skip, alpha_0 * d / (d**2 + signal).sqrt()


def _edm(alpha: Tensor, sigma: Tensor, sigma_data: float) -> tuple[Tensor, Tensor]:
    variance = (alpha * sigma_data) ** 2 + sigma**2
    return alpha * sigma_data**2 / variance, sigma * sigma_data / variance.sqrt()
