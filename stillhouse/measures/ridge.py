"""Self-distillation of (kernel) ridge regression in closed form, in float64.

Samples are ROWS everywhere: X is [n, d], targets y are [n] or [n, outputs], a kernel matrix K is [n, n].

Kernel form (Borup and Andersen 2021). With S = K (K + lambda I)^{-1} and y^(0) = y,

    y^(1) = S y,   y^(t) = S (alpha_t y + (1 - alpha_t) y^(t-1)),   f^(t)(x) = k(x, X) a^(t),

    a^(t) = (K + lambda I)^{-1} (alpha_t y + (1 - alpha_t) y^(t-1)),   alpha: the weight of the GROUND TRUTH.

Primal form (Das and Sanghavi 2023). With A = X^T X + lambda I,

    theta_T = A^{-1} X^T y,   theta_S = A^{-1} X^T (xi X theta_T + (1 - xi) y),   xi: the weight of the TEACHER.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from stillhouse.errors import DataError, require


def kernel_matrix(
    a: Float[Tensor, "n ..."], b: Float[Tensor, "m ..."], kernel: str = "rbf", **options: Any
) -> Float[Tensor, "n m"]:
    """k(a_i, b_j) by any kernel that scikit-learn names ("rbf", "linear", "polynomial", "laplacian", ...), with its
    `options` (gamma, degree, coef0); what is beyond the first dimension is flattened."""
    from sklearn.metrics.pairwise import pairwise_kernels

    rows = [part.detach().flatten(1).double().cpu().numpy() for part in (a, b)]
    return torch.from_numpy(pairwise_kernels(*rows, metric=kernel, **options))


Targets = Float[Tensor, "n *outputs"]
Weights = Float[Tensor, "d *outputs"]


class Rounds(NamedTuple):
    """The rounds of a self-distillation, from the first: fits [rounds, n, ...] and the coefficients of the same shape
    with which `kernel_matrix(new, X) @ coefficients[t]` predicts at new points."""

    fits: Tensor
    coefficients: Tensor


def _checked(kernel: Tensor, y: Tensor, lam: float) -> tuple[Tensor, Tensor]:
    require(lam > 0, f"lambda must be above 0, not {lam}")
    require(kernel.ndim == 2 and kernel.shape[0] == kernel.shape[1] == len(y),
            f"a kernel matrix of {len(y)} targets is [{len(y)}, {len(y)}], not {tuple(kernel.shape)}", DataError)
    return kernel.double(), y.double().reshape(len(y), -1)


def ridge_rounds(kernel: Float[Tensor, "n n"], y: Targets, lam: float, alphas: Sequence[float] = ()
                 ) -> Rounds:
    """Round 1 and one more round for each of `alphas` (alpha of round 2, 3, ...), one after the other; any real alpha.

    Raises ConfigError unless lambda > 0, DataError for a kernel matrix of another size.
    """
    shape = y.shape
    kernel, y = _checked(kernel, y, lam)
    factor = torch.linalg.cholesky(kernel + lam * torch.eye(len(y), dtype=kernel.dtype, device=kernel.device))
    coefficients = [torch.cholesky_solve(y, factor)]
    fits = [kernel @ coefficients[0]]
    for alpha in alphas:
        coefficients.append(torch.cholesky_solve(alpha * y + (1 - alpha) * fits[-1], factor))
        fits.append(kernel @ coefficients[-1])
    return Rounds(*(torch.stack(part).reshape(-1, *shape) for part in (fits, coefficients)))


def ridge_spectrum(eigenvalues: Float[Tensor, " n"], lam: float, alphas: Sequence[float] = ()
                   ) -> Float[Tensor, "rounds n"]:
    """The diagonals b^(t) of B^(t), y^(t) = V B^(t) V^T y: b^(1) = s, b^(t) = s (alpha_t + (1 - alpha_t) b^(t-1)),
    s = d / (d + lambda). With alpha = 0 they are s^t: ever sparser."""
    require(lam > 0, f"lambda must be above 0, not {lam}")
    d = eigenvalues.double()
    s = d / (d + lam)
    rounds = [s]
    for alpha in alphas:
        rounds.append(s * (alpha + (1 - alpha) * rounds[-1]))
    return torch.stack(rounds)


def ridge_rounds_at_once(kernel: Float[Tensor, "n n"], y: Targets, lam: float,
                         alphas: Sequence[float] = ()) -> Rounds:
    """What `ridge_rounds` gives, from one eigendecomposition K = V D V^T and the diagonals of `ridge_spectrum`."""
    shape = y.shape
    kernel, y = _checked(kernel, y, lam)
    d, v = torch.linalg.eigh(kernel)
    b = ridge_spectrum(d, lam, alphas)
    before = torch.cat([torch.ones_like(b[:1]), b[:-1]])
    alpha = torch.tensor([1.0, *alphas], dtype=b.dtype, device=b.device)[:, None]
    inner = (alpha + (1 - alpha) * before) / (d + lam)
    along = v.T @ y
    return Rounds(*((v @ (part[:, :, None] * along)).reshape(-1, *shape) for part in (b, inner)))


def ridge_limit(kernel: Float[Tensor, "n n"], y: Targets, lam: float, alpha: float) -> Rounds:
    """After infinitely many rounds with 0 < alpha <= 1: plain ridge with lambda / alpha. With alpha = 0 the zero
    function. One "round" in the result. Raises ConfigError for alpha outside [0, 1]."""
    require(0 <= alpha <= 1, f"the limit is known for alpha in [0, 1], not {alpha}")
    if alpha == 0:
        _checked(kernel, y, lam)
        zero = torch.zeros(1, *y.shape, dtype=torch.float64, device=y.device)
        return Rounds(zero, zero.clone())
    return ridge_rounds(kernel, y, lam / alpha)


def optimal_alpha(y: Float[Tensor, "*any"], f_y: Float[Tensor, "*any"], f_d: Float[Tensor, "*any"]
                  ) -> Float[Tensor, ""]:
    """alpha* = <y - f_d, f_y - f_d> / ||f_y - f_d||^2, with which alpha f_y + (1 - alpha) f_d is closest to y; not
    restricted to [0, 1]. f_y are the outputs of what was trained on the ground truth, f_d of what was trained on the
    teacher's outputs. 1 where the two are equal, as every alpha is best there."""
    gap = (f_y - f_d).double().flatten()
    scale = gap.square().sum()
    alpha = ((y - f_d).double().flatten() * gap).sum() / scale
    return torch.where(scale > 0, alpha, torch.ones_like(scale))


def ridge_rounds_with_optimal_alpha(
    kernel: Float[Tensor, "n n"], y: Targets, lam: float, rounds: int,
    held_out_kernel: Float[Tensor, "m n"], held_out_y: Float[Tensor, "m ..."],
) -> tuple[Rounds, list[float]]:
    """`rounds` rounds, each with the alpha that is best for it on held-out data (k(new, X) and the targets there), and
    those alphas (of round 2, 3, ...)."""
    require(rounds >= 1, f"rounds must be 1 or more, not {rounds}")
    cross, held_out = held_out_kernel.double(), held_out_y.double()
    first = ridge_rounds(kernel, y, lam)
    f_y = torch.tensordot(cross, first.coefficients[0], 1)
    alphas: list[float] = []
    fits, coefficients = [first.fits[0]], [first.coefficients[0]]
    for _ in range(rounds - 1):
        again = ridge_rounds(kernel, fits[-1], lam)
        f_d = torch.tensordot(cross, again.coefficients[0], 1)
        alpha = float(optimal_alpha(held_out, f_y, f_d))
        alphas.append(alpha)
        fits.append(alpha * first.fits[0] + (1 - alpha) * again.fits[0])
        coefficients.append(alpha * first.coefficients[0] + (1 - alpha) * again.coefficients[0])
    return Rounds(torch.stack(fits), torch.stack(coefficients)), alphas


# -------------------------------------------------------------------- the primal form


def _gram(x: Tensor, lam: float) -> Tensor:
    require(lam > 0, f"lambda must be above 0, not {lam}")
    require(x.ndim == 2, f"X is [samples, features], not {tuple(x.shape)}", DataError)
    x = x.double()
    return x.T @ x + lam * torch.eye(x.shape[1], dtype=x.dtype, device=x.device)


def _solve(a: Tensor, b: Tensor) -> Tensor:
    return torch.linalg.solve(a, b.reshape(len(a), -1)).reshape(b.shape)


def ridge_teacher(x: Float[Tensor, "n d"], y: Targets, lam: float) -> Weights:
    """theta_T = A^{-1} X^T y, A = X^T X + lambda I; samples as rows."""
    return _solve(_gram(x, lam), torch.tensordot(x.double().T, y.double(), 1))


def ridge_student(
    x: Float[Tensor, "n d"], y: Targets, theta_t: Weights, lam: float, xi: float
) -> Weights:
    """theta_S = A^{-1} X^T (xi X theta_T + (1 - xi) y), any real xi, the weight of the teacher; samples as rows.

    The teacher may come from other samples: with X the rows of a kept subset, a teacher of all the data and xi called
    alpha, this is the student of distillation on pruned data (Ben-Baruch et al. 2024). Where teacher and student have
    the same X, it is `self_distilled`.
    """
    mixed = xi * torch.tensordot(x.double(), theta_t.double(), 1) + (1 - xi) * y.double()
    return ridge_teacher(x, mixed, lam)


def self_distilled(x: Float[Tensor, "n d"], theta_t: Weights, lam: float, xi: float
                   ) -> Weights:
    """theta_S = theta_T - xi lambda A^{-1} theta_T: the student of a teacher with the same X and lambda, without its
    targets (exact)."""
    return theta_t.double() - xi * lam * _solve(_gram(x, lam), theta_t.double())


def ridge_student_bias(
    x: Float[Tensor, "n d"], x_teacher: Float[Tensor, "m d"], theta: Float[Tensor, " d"], lam: float, xi: float
) -> Float[Tensor, " d"]:
    """E[theta_S] - theta* = -lambda A^{-1} (I + xi S A_T^{-1}) theta*, S = X^T X and A_T the teacher's regularised
    Gram matrix: the bias of `ridge_student` where y = X theta* + noise for both. Samples as rows."""
    theta = theta.double()
    through = x.double().T @ (x.double() @ _solve(_gram(x_teacher, lam), theta))
    return -lam * _solve(_gram(x, lam), theta + xi * through)


class RidgeProblem(NamedTuple):
    """y = X theta* + noise, along the right singular vectors v_i of X: the singular values s_i, a_i = v_i . theta*,
    and ||theta*||^2 outside of the row space, which no fit can reach."""

    s: Float[Tensor, " k"]
    a: Float[Tensor, " k"]
    rest: float


def ridge_problem(x: Float[Tensor, "n d"], theta: Float[Tensor, " d"]) -> RidgeProblem:
    """The problem of X (samples as rows) and the true theta*."""
    theta = theta.double()
    _, s, vh = torch.linalg.svd(x.double(), full_matrices=False)
    a = vh @ theta
    return RidgeProblem(s, a, float((theta.square().sum() - a.square().sum()).clamp_min(0)))


def _together(*values: float | Tensor) -> tuple[Tensor, ...]:
    return torch.broadcast_tensors(*(torch.as_tensor(value, dtype=torch.float64) for value in values))


def _shares(problem: RidgeProblem, lam: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """c, r = 1 - c and the variance w per unit of noise variance; a last dimension for the directions."""
    require(bool((lam > 0).all()), "lambda must be above 0")
    squared = problem.s.square()
    total = squared + lam[..., None]
    return lam[..., None] / total, squared / total, squared / total.square()


def expected_error(
    problem: RidgeProblem, lam: float | Tensor, noise: float | Tensor, xi: float | Tensor
) -> Float[Tensor, "*grid"]:
    """E ||theta_S(xi) - theta*||^2 = sum_i (r_i (1 - xi c_i) - 1)^2 a_i^2 + (1 - xi c_i)^2 noise w_i, plus `rest`, with
    c = lambda / (s^2 + lambda), r = 1 - c, w = s^2 / (s^2 + lambda)^2 and `noise` the variance of the noise. The three
    numbers may be tensors that broadcast; xi = 0 is the teacher, plain ridge."""
    lams, variance, weight = _together(lam, noise, xi)
    c, r, w = _shares(problem, lams)
    kept = 1 - weight[..., None] * c
    each = (r * kept - 1).square() * problem.a.square() + kept.square() * variance[..., None] * w
    return each.sum(-1) + problem.rest


def optimal_xi(problem: RidgeProblem, lam: float | Tensor, noise: float | Tensor) -> Float[Tensor, "*grid"]:
    """xi* = sum_i c_i (v_i - r_i c_i a_i^2) / sum_i c_i^2 (v_i + r_i^2 a_i^2), v = noise w: the minimum of
    `expected_error` in xi. Not above 0 without noise; above 1 where the noise exceeds `noise_of_anti_learning`."""
    lams, variance = _together(lam, noise)
    c, r, w = _shares(problem, lams)
    v, signal = variance[..., None] * w, problem.a.square()
    return (c * (v - r * c * signal)).sum(-1) / (c.square() * (v + r.square() * signal)).sum(-1)


def noise_of_anti_learning(problem: RidgeProblem, lam: float) -> float:
    """The variance of the noise at which xi* = 1: sum_i c_i^2 r_i (1 + r_i) a_i^2 / sum_i c_i r_i w_i. Above it the
    best student is pushed away from its labels."""
    c, r, w = _shares(problem, torch.tensor(lam, dtype=torch.float64))
    return float((c.square() * r * (1 + r) * problem.a.square()).sum() / (c * r * w).sum())


class Best(NamedTuple):
    """The least expected error and where it lies."""

    error: float
    lam: float
    xi: float


def best_ridge(problem: RidgeProblem, noise: float, lambdas: Float[Tensor, " grid"]) -> Best:
    """The best plain ridge (xi = 0) on a grid of lambda."""
    errors = expected_error(problem, lambdas, noise, 0.0)
    where = int(errors.argmin())
    return Best(float(errors[where]), float(lambdas[where]), 0.0)


def best_self_distillation(problem: RidgeProblem, noise: float, lambdas: Float[Tensor, " grid"]) -> Best:
    """The best pair (lambda, xi): xi* in closed form at every lambda of the grid, never worse than `best_ridge`.

    At ridge's best lambda xi* is 0, as a small xi and a larger lambda move the estimate in the same direction
    (d theta / d xi = lambda d theta / d lambda at xi = 0). A gain lies at another lambda, as it does where theta* lies
    in the directions of large singular values.
    """
    xi = optimal_xi(problem, lambdas, noise)
    errors = expected_error(problem, lambdas, noise, xi)
    where = int(errors.argmin())
    return Best(float(errors[where]), float(lambdas[where]), float(xi[where]))


def ridge_student_errors(
    x: Float[Tensor, "n d"], kept: Tensor, seen: Tensor, theta: Float[Tensor, " d"], lam: float, alpha: float,
    noise: float, draws: int = 200, seed: int = 0,
) -> tuple[float, float]:
    """Ridge regression with y = X theta* + noise, a student on the rows `kept` and a teacher on the rows `seen`: the
    norm of the student's bias in closed form, and the root of its mean squared deviation from its expectation over
    `draws` of the noise."""
    bias = ridge_student_bias(x[kept], x[seen], theta, lam, alpha)
    generator = torch.Generator().manual_seed(seed)
    y = (x @ theta)[:, None] + noise * torch.randn(len(x), draws, dtype=x.dtype, generator=generator)
    learned = ridge_student(x[kept], y[kept], ridge_teacher(x[seen], y[seen], lam), lam, alpha)
    spread = (learned - (theta + bias)[:, None]).square().sum(0).mean().sqrt()
    return bias.norm().item(), spread.item()
