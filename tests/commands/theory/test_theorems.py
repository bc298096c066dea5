"""The theory lab's mathematics: every theorem on 100 random instances, each part against an oracle."""

import numpy as np
import pytest
import torch
from torch.linalg import matrix_norm

from app.commands.theory.alignment import hitting_times
from app.commands.theory.descent import descend, spectral_init
from app.commands.theory.problems import (
    USUAL,
    LinearProblem,
    Shape,
    linear_instances,
    log_uniform,
    low_rank_change,
    relu_problem,
    sample_second_moment,
    spaced,
)
from app.commands.theory.theorems import (
    THEOREMS,
    Check,
    exact_alignment,
    linear_convergence,
    spectral_initialization,
)
from tests.support.small_problems import doubles, rng

EVERY = [
    pytest.param(kind, name, marks=pytest.mark.slow if kind == "relu" else ())
    for kind, theorems in THEOREMS.items()
    for name in theorems
]


def slope(x, y):
    """Fit the exponent of y ~ x^slope."""
    return float(np.polyfit(np.log(np.asarray(x)), np.log(np.asarray(y)), 1)[0])


# The inequalities


@pytest.mark.parametrize(("kind", "name"), EVERY)
def test_inequality(kind, name):
    checks = THEOREMS[kind][name](rng(7), 100)
    assert checks
    for check in checks:
        assert len(check.measured) == 100
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
    assert {(len(check.measured), check.holds) for check in checks} == {(100, True)}


def test_a_check_fails_where_one_number_is_above_its_bound_or_none():
    bound = torch.ones(3, 2)
    assert Check("", "", bound.clone(), bound).holds
    for wrong in (1.001, float("nan"), float("inf")):
        measured = bound.clone()
        measured[1, 1] = wrong
        assert not Check("", "", measured, bound).holds


# Equalities


@pytest.mark.parametrize("rank", [4, 6])
def test_spectral_error_is_delta_times_the_deviation_of_the_data(rank):
    problem = linear_instances(rng(), 100, USUAL, 10, 0.5).problem
    lora_A, lora_B = spectral_init(problem, rank)
    wanted = problem.change @ (problem.second_moment - torch.eye(24).double())
    error = matrix_norm(lora_B @ lora_A - problem.change - wanted) / matrix_norm(problem.change)
    assert float(error.max()) < 1e-13


def test_spectral_initialization_below_the_true_rank_misses_little_more_than_it_must():
    """No theorem: Weyl's and Eckart-Young's inequalities for P_r(Delta Sigma)."""
    problem, _, top, deviation = linear_instances(rng(), 100, USUAL, 4, 0.5)
    lora_A, lora_B = spectral_init(problem, 2)
    error = matrix_norm(lora_B @ lora_A - problem.change, 2)
    third = torch.linalg.svdvals(problem.change)[:, 2]
    assert bool((error >= third * (1 - 1e-12)).all())
    assert bool((error <= third + 2 * deviation * top).all())


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
    expected, measured = zip(*(hitting_times(3, *place, 8) for place in places), strict=True)
    assert low < slope(np.mean(expected, 1), np.mean(measured, 1)) < high
    ratio = np.divide(measured, expected)
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


@pytest.mark.parametrize(
    ("kappa", "damping", "steps", "rate"),
    [
        *(
            (kappa, None, round(20 * kappa), 0.3 / kappa)
            for kappa in (3.0, 10.0, 30.0, 100.0, 300.0)
        ),
        *((kappa, 0.0, 25, 0.3) for kappa in (1.0, 10.0, 100.0, 1000.0)),
    ],
)
def test_the_rate_near_the_answer(kappa, damping, steps, rate):
    """1 - |E_t+1| / |E_t| is lr s_r*(Delta) = lr / kappa in the slowest direction; lr with preconditioning."""
    change = low_rank_change(rng(), spaced(4, doubles(kappa)), 16, 24)
    problem = LinearProblem(change, sample_second_moment(rng(1), 1, 24, 10**9))
    errors = [
        float(matrix_norm(lora_B @ lora_A - change))
        for lora_A, lora_B in descend(problem, spectral_init(problem, 4), 0.3, steps, damping)
    ]
    assert 1 - errors[-1] / errors[-2] == pytest.approx(rate, rel=0.02 if damping is None else 1e-3)


def test_relu_initialization_is_off_by_the_turn_of_the_rows():
    """E[dL/dW] = -Delta / 2 + a remainder that shrinks with |Delta_i| / |w_i| (Assumption 4.1)."""
    change = low_rank_change(rng(), spaced(2, doubles(*[2.0] * 20)), 8, 10)
    signals, rest = [2.0, 20.0, 200.0, 2000.0], []
    for signal in signals:
        problem = relu_problem(rng(1), change, 1, signal)
        gradient = problem.expected_gradient(torch.zeros_like(change))
        rest.append(float((matrix_norm(gradient + change / 2) / matrix_norm(change)).mean()))
    assert slope(signals, rest) == pytest.approx(-1, abs=0.03)
    assert rest[0] < 0.25


@pytest.mark.parametrize("preconditioned", [False, True])
def test_the_rates_of_the_convergence_theorems(preconditioned):
    """The bound falls by the factor of docs/theory.md in each step."""
    [check] = linear_convergence(rng(3), 20, preconditioned)
    factors = (check.bound[:, 1:40] / check.bound[:, :39]).amax(1)
    draws = rng(3)
    measured = linear_instances(draws, 20, USUAL, 1000 if preconditioned else 30, 1 / 16)
    # lr times |Delta| in the first case, as lr is drawn in units of 1 / |Delta|.
    lr = log_uniform(draws, *((0.05, 0.5) if preconditioned else (0.025, 0.25)), 20)
    expected = 1 - lr / 2 if preconditioned else 1 - lr / measured.kappa / 2
    assert factors.tolist() == pytest.approx(expected.tolist(), rel=1e-6)
