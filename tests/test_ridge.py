"""Self-distillation of ridge regression in closed form."""

import math

import pytest
import torch

from stillhouse.errors import ConfigError, DataError
from stillhouse.measures.ridge import (
    best_ridge,
    best_self_distillation,
    expected_error,
    kernel_matrix,
    noise_of_anti_learning,
    optimal_alpha,
    optimal_xi,
    ridge_limit,
    ridge_problem,
    ridge_rounds,
    ridge_rounds_at_once,
    ridge_rounds_with_optimal_alpha,
    ridge_spectrum,
    ridge_student,
    ridge_student_bias,
    ridge_teacher,
    self_distilled,
)

POINTS = (0.38476636465198066, 1.2333967683416893, 1.33232242218057, 0.6920159488889518, -0.29756145531871736,
          -0.24189291901377769, -0.7964485769175675, -0.9616480167034174, -0.49672509509916934, -0.3469066003991437,
          0.5589512650600734)
"""The eleven values of the published example (Mobahi et al. 2020)."""


def draw(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def problem(n=9, outputs=3):
    x = draw(n, 20)
    return x @ x.T, draw(n, outputs, seed=1)


# ---------------------------------------------------------------- rounds


def test_the_published_table_of_the_sinusoid():
    """Losses against the true curve; the table's alpha is 0.35, RBF gamma 80, lambda 0.2."""
    y = torch.tensor(POINTS, dtype=torch.float64)
    x, grid = torch.arange(11).double()[:, None] / 10, torch.arange(101).double()[:, None] / 100
    kernel, cross = kernel_matrix(x, x, gamma=80.0), kernel_matrix(grid, x, gamma=80.0)
    curve = (2 * math.pi * grid[:, 0]).sin()
    published = {0.0: (0.16477, 0.15076, 0.14915, 0.15561, 0.16735, 0.18251, 0.49505),
                 0.35: (0.16477, 0.15424, 0.15089, 0.14983, 0.14954, 0.14948, 0.14959)}
    for alpha, losses in published.items():
        found = [*ridge_rounds(kernel, y, 0.2, [alpha] * 5).coefficients,
                 *ridge_limit(kernel, y, 0.2, alpha).coefficients]
        assert [(cross @ c - curve).square().mean().item() for c in found] == pytest.approx(losses, abs=5.1e-6)


def test_the_form_of_one_eigendecomposition_equals_the_iteration_for_any_alphas():
    kernel, y = problem()
    alphas = [0.3, -0.2, 0.8, 1.4, 0.0]
    one_by_one, at_once = ridge_rounds(kernel, y, 0.5, alphas), ridge_rounds_at_once(kernel, y, 0.5, alphas)
    assert torch.allclose(one_by_one.fits, at_once.fits, atol=1e-12)
    assert torch.allclose(one_by_one.coefficients, at_once.coefficients, atol=1e-12)
    assert torch.allclose(kernel @ one_by_one.coefficients, one_by_one.fits, atol=1e-12)
    d, v = torch.linalg.eigh(kernel)
    b = ridge_spectrum(d, 0.5, alphas)[-1]
    assert torch.allclose(v @ (b[:, None] * (v.T @ y)), one_by_one.fits[-1], atol=1e-12)


def test_one_output_gives_what_a_column_gives():
    kernel, y = problem()
    flat = ridge_rounds(kernel, y[:, 0], 0.5, [0.3])
    assert flat.fits.shape == (2, 9)
    assert torch.allclose(flat.fits, ridge_rounds(kernel, y, 0.5, [0.3]).fits[..., 0], atol=1e-12)


def test_labels_alone_stay_at_round_1_and_outputs_alone_give_powers_of_s():
    kernel, y = problem()
    s = kernel @ torch.linalg.inv(kernel + 0.5 * torch.eye(9, dtype=torch.float64))
    guided, blind = (ridge_rounds(kernel, y, 0.5, [alpha] * 4).fits for alpha in (1.0, 0.0))
    for t in range(5):
        assert torch.allclose(guided[t], s @ y, atol=1e-12)
        assert torch.allclose(blind[t], torch.linalg.matrix_power(s, t + 1) @ y, atol=1e-12)


def test_without_labels_the_spectrum_becomes_sparser_and_labels_dampen_it():
    d = torch.tensor([0.1, 1.0, 10.0], dtype=torch.float64)
    blind, guided = ridge_spectrum(d, 1.0, [0.0] * 5), ridge_spectrum(d, 1.0, [0.25] * 5)
    s = d / (d + 1)
    assert torch.allclose(blind, torch.stack([s ** (t + 1) for t in range(6)]), atol=1e-14)
    ratio = blind[:, 0] / blind[:, 2]
    assert (ratio[1:] < ratio[:-1]).all() and (guided[1:] > blind[1:]).all()


@pytest.mark.parametrize("alpha", [0.05, 0.3, 1.0])
def test_the_limit_is_ridge_with_lambda_over_alpha(alpha):
    kernel, y = problem()
    limit = ridge_limit(kernel, y, 0.5, alpha)
    direct = kernel @ torch.linalg.solve(kernel + 0.5 / alpha * torch.eye(9, dtype=torch.float64), y)
    iterated = ridge_rounds(kernel, y, 0.5, [alpha] * 3000)
    assert torch.allclose(limit.fits[0], direct, atol=1e-10)
    assert torch.allclose(limit.fits[0], iterated.fits[-1], atol=1e-10)
    assert torch.allclose(limit.coefficients[0], iterated.coefficients[-1], atol=1e-10)


def test_the_limit_in_one_dimension_and_without_labels():
    one = torch.ones(1, 1, dtype=torch.float64)
    assert ridge_limit(one, one[0], 1.0, 0.5).fits.item() == pytest.approx(1 / 3, abs=1e-15)
    kernel, y = problem()
    assert not ridge_limit(kernel, y, 0.5, 0.0).fits.any()
    assert ridge_rounds(kernel, y, 50.0, [0.0] * 200).fits[-1].abs().max() < 1e-10


def test_convergence_is_geometric_along_each_eigenvector():
    d = torch.tensor([0.5, 3.0], dtype=torch.float64)
    b, limit = ridge_spectrum(d, 1.0, [0.3] * 6), d / (d + 1 / 0.3)
    gap = b - limit
    assert torch.allclose(gap[1:] / gap[:-1], (0.7 * d / (d + 1)).expand(6, 2), atol=1e-10)


# ---------------------------------------------------------------- the best alpha


def test_predictions_are_affine_in_alpha_and_alpha_star_is_their_minimum():
    x, y, new, target = draw(12, 2), draw(12, seed=1), draw(30, 2, seed=2), draw(30, seed=3)
    kernel, cross = kernel_matrix(x, x, gamma=0.5), kernel_matrix(new, x, gamma=0.5)

    def said(alpha):
        return cross @ ridge_rounds(kernel, y, 0.3, [0.4, alpha]).coefficients[-1]

    f_y, f_d = said(1.0), said(0.0)
    assert torch.allclose(said(2.7), 2.7 * f_y - 1.7 * f_d, atol=1e-12)
    best = optimal_alpha(target, f_y, f_d)
    alpha = best.clone().requires_grad_()
    (alpha * f_y + (1 - alpha) * f_d - target).square().mean().backward()
    assert alpha.grad.abs() < 1e-12
    least = (said(float(best)) - target).square().mean()
    assert all((said(a) - target).square().mean() >= least for a in torch.linspace(-3, 3, 61).tolist())


def test_alpha_star_is_not_restricted_and_defined_for_equal_outputs():
    f_y, f_d = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    assert optimal_alpha(torch.tensor([3.0, -2.0]), f_y, f_d).item() == pytest.approx(3.0)
    assert optimal_alpha(torch.tensor([3.0, -2.0]), f_y, f_y).item() == 1.0


def test_rounds_with_the_best_alphas_are_the_rounds_of_these_alphas():
    x, y, new, target = draw(12, 2), draw(12, 2, seed=1), draw(30, 2, seed=2), draw(30, 2, seed=3)
    kernel, cross = kernel_matrix(x, x, gamma=0.5), kernel_matrix(new, x, gamma=0.5)
    found, alphas = ridge_rounds_with_optimal_alpha(kernel, y, 0.3, 4, cross, target)
    same = ridge_rounds(kernel, y, 0.3, alphas)
    assert len(alphas) == 3 and torch.allclose(found.fits, same.fits, atol=1e-10)
    assert torch.allclose(found.coefficients, same.coefficients, atol=1e-10)


@pytest.mark.parametrize("name", ["rbf", "linear", "laplacian", "polynomial"])
def test_any_kernel_of_scikit_learn_predicts_at_new_points(name):
    x, y, new = draw(8, 1, 2, 2), draw(8, seed=1), draw(3, 1, 2, 2, seed=2)
    rounds = ridge_rounds(kernel_matrix(x, x, name), y, 0.1, [0.5])
    assert torch.allclose(kernel_matrix(x[:2], x, name) @ rounds.coefficients[-1], rounds.fits[-1, :2], atol=1e-10)
    assert (kernel_matrix(new, x, name) @ rounds.coefficients[-1]).shape == (3,)


@pytest.mark.unchecked
def test_bad_input_is_refused():
    kernel, y = problem()
    with pytest.raises(ConfigError, match="lambda must be above 0"):
        ridge_rounds(kernel, y, 0.0)
    with pytest.raises(DataError, match=r"\[8, 8\], not \(9, 9\)"):
        ridge_rounds(kernel, y[:8], 1.0)
    with pytest.raises(ConfigError, match="alpha in"):
        ridge_limit(kernel, y, 1.0, 1.5)


# ---------------------------------------------------------------- the primal form


def test_the_student_is_the_teacher_less_a_shrunken_teacher():
    x, y = draw(30, 6), draw(30, seed=1)
    theta_t = ridge_teacher(x, y, 0.7)
    student = ridge_student(x, y, theta_t, 0.7, 1.7)
    assert torch.allclose(student, self_distilled(x, theta_t, 0.7, 1.7), rtol=0, atol=1e-12)
    assert torch.allclose(ridge_student(x, y, theta_t, 0.7, 0.0), theta_t, rtol=0, atol=1e-12)


def test_the_student_minimises_the_weighted_objective():
    x, y = draw(30, 6), draw(30, 2, seed=1)
    theta_t = ridge_teacher(x, y, 0.7)
    theta = ridge_student(x, y, theta_t, 0.7, 1.7).requires_grad_()
    loss = (1.7 * (x @ theta_t - x @ theta).square().sum() - 0.7 * (y - x @ theta).square().sum()
            + 0.7 * theta.square().sum())
    loss.backward()
    assert theta.grad.abs().max() < 1e-10


def test_it_is_the_kernel_form_with_the_linear_kernel():
    x, y = draw(10, 4), draw(10, seed=1)
    kernel_fit = ridge_rounds(x @ x.T, y, 0.7, [0.25]).fits[-1]
    assert torch.allclose(x @ ridge_student(x, y, ridge_teacher(x, y, 0.7), 0.7, 0.75), kernel_fit, atol=1e-12)


def test_without_regularisation_every_xi_gives_the_same():
    x, y = draw(30, 6), draw(30, seed=1)
    theta_t = ridge_teacher(x, y, 1e-12)
    for xi in (-1.0, 0.5, 3.0):
        assert torch.allclose(ridge_student(x, y, theta_t, 1e-12, xi), theta_t, atol=1e-10)


def test_xi_star_in_one_dimension():
    one = ridge_problem(torch.ones(1, 1), torch.ones(1))
    for noise in (0.0, 1.0, 3.0, 10.0):
        assert optimal_xi(one, 1.0, noise).item() == pytest.approx(2 * (noise - 1) / (noise + 1), abs=1e-14)
    assert optimal_xi(one, 1.0, 1e12).item() == pytest.approx(2, abs=1e-10)
    assert noise_of_anti_learning(one, 1.0) == pytest.approx(3, abs=1e-14)


def test_xi_star_is_the_minimum_of_the_expected_error_which_simulation_meets():
    x, theta = draw(15, 20), draw(20, seed=1)
    given = ridge_problem(x, theta)
    for noise in (0.0, 0.5, 20.0):
        xi = optimal_xi(given, 2.0, noise).requires_grad_()
        expected_error(given, 2.0, noise, xi).backward()
        assert xi.grad.abs() < 1e-9
    assert optimal_xi(given, 2.0, 0.0) <= 0
    assert optimal_xi(given, 2.0, noise_of_anti_learning(given, 2.0)).item() == pytest.approx(1, abs=1e-12)
    y = (x @ theta)[:, None] + 0.5**0.5 * draw(15, 20_000, seed=2)
    students = ridge_student(x, y, ridge_teacher(x, y, 2.0), 2.0, 0.6)
    simulated = (students - theta[:, None]).square().sum(0)
    expected = expected_error(given, 2.0, 0.5, 0.6).item()
    assert simulated.mean().item() == pytest.approx(expected, abs=4 * simulated.std().item() / 20_000**0.5)
    assert given.rest > 0


def test_self_distillation_beats_tuned_ridge_where_the_signal_lies_in_strong_directions():
    lambdas = torch.logspace(-3, 4, 4001, dtype=torch.float64)
    x = torch.linalg.qr(draw(30, 6)).Q * torch.tensor([1.0, 2, 3, 4, 5, 6], dtype=torch.float64)
    alike = ridge_problem(x, torch.ones(6, dtype=torch.float64))
    ridge, both = best_ridge(alike, 2.0, lambdas), best_self_distillation(alike, 2.0, lambdas)
    assert ridge.lam == pytest.approx(2.0, rel=1e-2) and both.error == pytest.approx(ridge.error, rel=1e-4)
    assert abs(optimal_xi(alike, 2.0, 2.0).item()) < 1e-12
    strong = ridge_problem(torch.diag(torch.tensor([1.0, 3.0])), torch.tensor([0.1, 3.0]))
    ridge, both = best_ridge(strong, 2.0, lambdas), best_self_distillation(strong, 2.0, lambdas)
    assert both.error < 0.5 * ridge.error and abs(optimal_xi(strong, ridge.lam, 2.0).item()) < 0.01


def test_the_bias_on_a_subset_falls_as_the_teacher_sees_more():
    s, theta = torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64), torch.tensor([1.0, -1.0, 2.0], dtype=torch.float64)
    norms = [ridge_student_bias(s.sqrt().diag(), (s + more).sqrt().diag(), theta, 1.0, 0.6).norm().item()
             for more in (0, 1, 3)]
    assert norms == pytest.approx([1.7889, 1.6667, 1.5800], abs=5e-5)


def test_the_bias_is_that_of_the_student_without_noise():
    x, theta = draw(40, 5), draw(5, seed=1)
    part, y = x[:12], x @ theta
    student = ridge_student(part, y[:12], ridge_teacher(x, y, 0.9), 0.9, 0.6)
    assert torch.allclose(student - theta, ridge_student_bias(part, x, theta, 0.9, 0.6), atol=1e-12)
