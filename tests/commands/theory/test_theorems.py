"""The theory lab's mathematics: every theorem on 100 random instances, each part against an oracle."""

import math

import numpy as np
import pytest
import torch
from scipy.linalg import subspace_angles
from torch.linalg import matrix_norm

from app.commands.theory.alignment import hitting_times
from app.commands.theory.descent import (
    descend,
    descend_core,
    lora_ga_init,
    random_init,
    spectral_init,
)
from app.commands.theory.instances import (
    USUAL,
    Shape,
    column,
    linear_instances,
    misalignment,
)
from app.commands.theory.problems import (
    LinearProblem,
    ReluProblem,
    low_rank_change,
    normal,
    relu_problem,
    sample_second_moment,
    second_moment_of,
    spaced,
)
from app.commands.theory.theorems import (
    THEOREMS,
    Check,
    exact_alignment,
    linear_convergence,
    spectral_initialization,
)
from app.initialization.gradient_estimators import ExactGradient

EVERY = [(kind, name) for kind, theorems in THEOREMS.items() for name in theorems]


def rng(seed=0):
    return np.random.default_rng(seed)


def doubles(*values):
    return torch.tensor(values, dtype=torch.float64)


def tensors(*arrays):
    return (torch.from_numpy(np.asarray(array)) for array in arrays)


def slope(x, y):
    """Fit the exponent of y ~ x^slope."""
    return float(np.polyfit(np.log(np.asarray(x)), np.log(np.asarray(y)), 1)[0])


# The inequalities


@pytest.mark.parametrize(("kind", "name"), EVERY)
def test_inequality(kind, name):
    checks = THEOREMS[kind][name](rng(7), 100)
    assert checks
    for check in checks:
        assert check.instances == 100
        assert check.measured.shape == check.bound.shape
        assert bool((check.bound > 0).all())
        assert float(check.measured.amax(dim=tuple(range(1, check.measured.ndim))).min()) > 0
        assert check.holds, (check.name, check.worst)
        # A bound that is far away would be no test; rounding may be as small as it likes.
        assert check.worst > (0.01 if "exact" in check.name or "Lemma" in check.name else 0.3)


@pytest.mark.parametrize("shape", [Shape(24, 16, 4), Shape(12, 12, 1), Shape(8, 30, 5)])
def test_inequality_in_other_shapes(shape):
    checks = exact_alignment(rng(1), 100, shape) + spectral_initialization(rng(2), 100, shape)
    for preconditioned in (False, True):
        checks += linear_convergence(rng(3), 100, preconditioned, shape)
    assert {(check.instances, check.holds) for check in checks} == {(100, True)}


def test_a_check_fails_where_one_number_is_above_its_bound_or_none():
    bound = torch.ones(3, 2)
    assert Check("", "", bound.clone(), bound).holds
    for wrong in (1.001, float("nan"), float("inf")):
        measured = bound.clone()
        measured[1, 1] = wrong
        assert not Check("", "", measured, bound).holds


def test_instances_are_what_the_theorems_want():
    problem, kappa, top, deviation = linear_instances(rng(), 100, USUAL, 100, 0.5)
    S = torch.linalg.svdvals(problem.change)
    torch.testing.assert_close(S[:, 0], top)
    torch.testing.assert_close(S[:, 0] / S[:, 3], kappa)
    assert float((S[:, 4] / S[:, 0]).max()) < 1e-14
    assert bool((deviation <= 0.5 / kappa).all())
    assert float((deviation * kappa).max()) > 0.25  # and not by far
    assert float(kappa.max() / kappa.min()) > 30
    # With one input the deviation varies most: what exceeds the limit has been drawn again.
    narrow = linear_instances(rng(), 400, Shape(2, 1, 1), 1, 0.5)
    assert 0.45 < float(narrow.deviation.max()) <= 0.5


# Equalities


@pytest.mark.parametrize("rank", [4, 6])
def test_spectral_error_is_delta_times_the_deviation_of_the_data(rank):
    problem = linear_instances(rng(), 100, USUAL, 10, 0.5).problem
    lora_A, lora_B = spectral_init(problem, rank)
    wanted = problem.change @ (problem.second_moment - torch.eye(24).double())
    error = matrix_norm(lora_B @ lora_A - problem.change - wanted) / matrix_norm(problem.change)
    assert float(error.max()) < 1e-13


def test_spectral_start_below_the_true_rank_misses_little_more_than_it_must():
    """No theorem: Weyl's and Eckart-Young's inequalities for P_r(Delta Sigma)."""
    problem, _, top, deviation = linear_instances(rng(), 100, USUAL, 4, 0.5)
    lora_A, lora_B = spectral_init(problem, 2)
    error = matrix_norm(lora_B @ lora_A - problem.change, 2)
    third = torch.linalg.svdvals(problem.change)[:, 2]
    assert bool((error >= third * (1 - 1e-12)).all())
    assert bool((error <= third + 2 * deviation * top).all())


def test_linear_risk_is_the_squared_error():
    problem = linear_instances(rng(), 5, USUAL, 4, 0.5).problem
    update = normal(rng(1), 5, 16, 24)
    x = normal(rng(2), 400_000, 24)
    for i in range(5):
        sampled = (x @ (update - problem.change)[i].T).square().sum(-1).mean()
        assert float(problem.risk(update)[i]) == pytest.approx(float(sampled), rel=0.01)


# Scaling laws, where the paper's constant is unknown


@pytest.mark.parametrize(
    ("places", "low", "high"),
    [
        ([(theta, 0.1, 64) for theta in (0.3, 0.03, 0.003, 0.0003)], 0.75, 1.1),
        ([(0.1, lr, 64) for lr in (0.5, 0.05, 0.005)], 0.9, 1.05),
        ([(0.1, 0.1, n) for n in (16, 64, 256)], 0.6, 1.4),
    ],
)
def test_time_of_alignment_is_proportional_to_the_theorem_s(places, low, high):
    """Thm 3.2: t* = Theta(ln(sqrt(n) / theta) / ln(1 + lr s_r*)), over angles, step sizes, lengths."""
    expected, found = zip(*(hitting_times(3, *place, 8) for place in places), strict=True)
    assert low < slope(np.mean(expected, 1), np.mean(found, 1)) < high
    ratio = np.divide(found, expected)
    assert ratio.min() > 0.5
    assert ratio.max() < 2


def test_spectral_error_falls_with_the_root_of_the_samples():
    change = low_rank_change(rng(), spaced(4, doubles(*[4.0] * 20)), 16, 24)
    many = [10**i for i in range(3, 11)]
    errors = []
    for samples in many:
        problem = LinearProblem(change, sample_second_moment(rng(1), 20, 24, samples))
        lora_A, lora_B = spectral_init(problem, 4)
        errors.append(float(matrix_norm(lora_B @ lora_A - change, 2).mean()))
    assert slope(many, errors) == pytest.approx(-0.5, abs=0.01)


def rates(kappas, lr, damping, steps):
    """Return the last step's 1 - |E_t+1| / |E_t| for each condition number."""
    change = low_rank_change(rng(), spaced(4, doubles(*kappas)), 16, 24)
    problem = LinearProblem(change, sample_second_moment(rng(1), len(kappas), 24, 10**9))
    errors = [
        matrix_norm(lora_B @ lora_A - change)
        for lora_A, lora_B in descend(problem, spectral_init(problem, 4), lr, steps, damping)
    ]
    return (1 - errors[-1] / errors[-2]).tolist()


def test_rate_of_gradient_descent_is_one_over_kappa():
    """The slowest direction moves by lr s_r*(Delta), s_1 being 1: near the answer exactly."""
    for kappa in (3.0, 10.0, 30.0, 100.0, 300.0):
        [found] = rates([kappa], 0.3, None, round(20 * kappa))
        assert found == pytest.approx(0.3 / kappa, rel=0.02), kappa


def test_rate_of_the_preconditioned_descent_is_free_of_kappa():
    found = rates([1.0, 10.0, 100.0, 1000.0], 0.3, 0.0, 25)
    assert found == pytest.approx([0.3] * 4, rel=1e-3)


def test_relu_start_is_off_by_the_turn_of_the_rows():
    """E[dL/dW] = -Delta / 2 + a remainder that shrinks with |Delta_i| / |w_i| (Assumption 4.1)."""
    change = low_rank_change(rng(), spaced(2, doubles(*[2.0] * 20)), 8, 10)
    signals, rest = [2.0, 20.0, 200.0, 2000.0], []
    for signal in signals:
        problem = relu_problem(rng(1), change, 1, signal)
        gradient = problem.expected_gradient(torch.zeros_like(change))
        rest.append(float((matrix_norm(gradient + change / 2) / matrix_norm(change)).mean()))
    assert slope(signals, rest) == pytest.approx(-1, abs=0.03)
    assert rest[0] < 0.25


# Problems against autograd and samples


def linear_and_relu():
    inputs = normal(rng(0), 3, 50, 6)
    base, change = normal(rng(1), 3, 5, 6), normal(rng(2), 3, 5, 6)
    linear = LinearProblem(change, second_moment_of(inputs))
    return inputs, base, change, linear, ReluProblem(base, change, inputs)


@pytest.mark.parametrize("kind", ["linear", "relu"])
def test_loss_and_gradient_are_those_of_the_samples(kind):
    inputs, base, change, linear, relu = linear_and_relu()
    problem, bend = (relu, torch.relu) if kind == "relu" else (linear, lambda x: x)
    update = normal(rng(3), 3, 5, 6).requires_grad_()
    outputs = bend(torch.einsum("pij,pnj->pni", base + update, inputs))
    wanted = bend(torch.einsum("pij,pnj->pni", base + change, inputs))
    loss = (outputs - wanted).square().sum((1, 2)) / 100
    loss.sum().backward()
    torch.testing.assert_close(problem.loss(update.detach()), loss.detach())
    torch.testing.assert_close(problem.gradient(update.detach()), update.grad)


def test_gradient_is_what_the_initialisation_of_a_real_run_accumulates():
    inputs, base, change, linear, _ = linear_and_relu()
    x = inputs[0]
    delta = (x @ base[0].T - x @ (base + change)[0].T) / len(x)
    store = ExactGradient(5, 6, torch.device("cpu"))
    for rows in (slice(0, 20), slice(20, 50)):
        store.update(x[rows], delta[rows])
    wanted = linear.gradient(torch.zeros_like(change))[0]
    torch.testing.assert_close(store.total.double(), wanted, rtol=1e-5, atol=1e-6)


def test_expectations_of_the_relu_layer():
    change = 0.7 * normal(rng(0), 1, 4, 5)
    problem = ReluProblem(normal(rng(1), 1, 4, 5), change, normal(rng(2), 1, 1_000_000, 5))
    for update in (torch.zeros_like(change), normal(rng(3), 1, 4, 5), -2 * problem.base):
        sampled = problem.gradient(update)
        torch.testing.assert_close(problem.expected_gradient(update), sampled, atol=0.01, rtol=0)
        risk = 2 * float(problem.loss(update))
        assert float(problem.risk(update)) == pytest.approx(risk, rel=0.01)
    assert float(problem.risk(change)) == pytest.approx(0, abs=1e-15)


def test_second_moments_are_drawn_from_their_law():
    n, samples, count = 6, 10, 4000
    drawn = sample_second_moment(rng(0), count, n, samples)
    direct = second_moment_of(normal(rng(1), count, samples, n))
    eye = torch.eye(n).double()
    for moments in (drawn, direct):
        assert float((moments.mean(0) - eye).abs().max()) < 0.05
        assert float((moments - eye).square().sum((1, 2)).mean()) == pytest.approx(4.2, rel=0.05)
    for quantile in (0.1, 0.5, 0.9):
        low, other = (
            torch.linalg.eigvalsh(moments).T.quantile(quantile, dim=1)
            for moments in (drawn, direct)
        )
        torch.testing.assert_close(low, other, atol=0.08, rtol=0)
    with pytest.raises(ValueError, match="samples must be >= n = 6, got 5"):
        sample_second_moment(rng(0), 1, 6, 5)


# Starts and descents against numpy and autograd


@pytest.mark.parametrize(("kind", "paper_gamma"), [("linear", 1), ("relu", 2)])
def test_spectral_start_is_the_paper_s(kind, paper_gamma):
    """Paper: A_0 = gamma^(1/2) U S^(1/2), B_0 = gamma^(1/2) S^(1/2) V^T, U S V^T = SVD of -dL/dW^T."""
    _, _, change, linear, relu = linear_and_relu()
    problem = relu if kind == "relu" else linear
    lora_A, lora_B = spectral_init(problem, 3)
    assert lora_A.dtype == lora_B.dtype == torch.float64
    for i, gradient in enumerate(problem.gradient(torch.zeros_like(change))):
        U, S, Vt = np.linalg.svd(-gradient.numpy().T)
        A = np.sqrt(paper_gamma) * U[:, :3] * np.sqrt(S[:3])
        B = np.sqrt(paper_gamma) * np.sqrt(S[:3])[:, None] * Vt[:3]
        signs = np.sign(np.sum(A * lora_A[i].numpy().T, 0))
        np.testing.assert_allclose(lora_A[i].numpy().T * signs, A, atol=1e-12)
        np.testing.assert_allclose(lora_B[i].numpy().T * signs[:, None], B, atol=1e-12)


@pytest.mark.parametrize("damping", [None, 0.0, 0.3])
def test_a_step_is_the_gradient_of_the_factors(damping):
    _, _, _, _, problem = linear_and_relu()
    start = spectral_init(problem, 3)
    offset = normal(rng(5), 3, 5, 6)
    lr = doubles(0.1, 0.2, 0.3)
    first, second = descend(problem, start, column(lr), 1, damping, offset)
    assert first is start
    lora_A, lora_B = (factor.clone().requires_grad_() for factor in start)
    problem.loss(offset + lora_B @ lora_A).sum().backward()
    for i in range(3):
        A, B, g_A, g_B = (t[i].detach().numpy() for t in (lora_A, lora_B, lora_A.grad, lora_B.grad))
        if damping is not None:
            g_A = np.linalg.inv(B.T @ B + damping * np.eye(3)) @ g_A
            g_B = g_B @ np.linalg.inv(A @ A.T + damping * np.eye(3))
        np.testing.assert_allclose(second.lora_A[i].numpy(), A - float(lr[i]) * g_A, atol=1e-10)
        np.testing.assert_allclose(second.lora_B[i].numpy(), B - float(lr[i]) * g_B, atol=1e-10)


def test_without_damping_a_singular_gram_matrix_is_an_error():
    problem = linear_instances(rng(), 2, USUAL, 4, 0.5).problem
    start = random_init(rng(1), problem, 4, 0.1)
    with pytest.raises(RuntimeError, match=r"lora_B\^T lora_B is singular"):
        list(descend(problem, start, 0.1, 1, damping=0.0))


def test_random_start_is_lora_s():
    problem = linear_instances(rng(), 200, USUAL, 4, 0.5).problem
    lora_A, lora_B = random_init(rng(1), problem, 5, 0.3)
    assert (lora_A.shape, lora_B.shape) == ((200, 5, 24), (200, 16, 5))
    assert not lora_B.any()
    assert float(lora_A.std()) == pytest.approx(0.3, rel=0.02)


def test_lora_ga_takes_the_next_triplets_for_lora_b():
    _, _, change, linear, _ = linear_and_relu()
    lora_A, lora_B = lora_ga_init(linear, 2, 4.0)
    for i, gradient in enumerate(linear.gradient(torch.zeros_like(change))):
        U, _, Vt = np.linalg.svd(gradient.numpy())
        size = 5**0.25 / 2
        np.testing.assert_allclose(
            np.abs(lora_A[i].numpy() @ Vt[:2].T), size * np.eye(2), atol=1e-12
        )
        np.testing.assert_allclose(
            np.abs(U[:, 2:4].T @ lora_B[i].numpy()), size * np.eye(2), atol=1e-12
        )


def test_lora_sb_stays_between_its_spaces():
    _, _, change, linear, _ = linear_and_relu()
    gradient = linear.gradient(torch.zeros_like(change))[:1]
    one = LinearProblem(change[:1], linear.second_moment[:1])
    U, S, Vt = np.linalg.svd(gradient[0].numpy())
    way = list(descend_core(one, 2, 0.1, 400))
    np.testing.assert_allclose(way[0][0], -(U[:, :2] * S[:2]) @ Vt[:2], atol=1e-12)
    for update in (way[1], way[-1]):
        np.testing.assert_allclose(U[:, 2:].T @ update[0].numpy(), 0, atol=1e-12)
        np.testing.assert_allclose(update[0].numpy() @ Vt[2:].T, 0, atol=1e-12)
    # What it comes to is the best that there is between them.
    left = U[:, :2].T @ one.gradient(way[-1])[0].numpy() @ Vt[:2].T
    np.testing.assert_allclose(left, 0, atol=1e-8)


def test_misalignment_is_the_sine_of_the_largest_principal_angle():
    draws = rng(0)
    for turn in (1.0, 1e-3, 1e-9):
        space = np.linalg.qr(draws.standard_normal((9, 3)))[0]
        matrix = np.zeros((9, 5))
        matrix[:, :3] = (space + turn * draws.standard_normal((9, 3))) * (5, 4, 3)
        matrix[:, 3:] = 1e-12 * draws.standard_normal((9, 2))
        [found] = misalignment(*tensors(space[None], matrix[None]))
        leading = np.linalg.svd(matrix)[0][:, :3]
        wanted = math.sin(subspace_angles(space, leading).max())
        assert float(found) == pytest.approx(wanted, rel=1e-5)
