"""Problems and their draws against autograd, samples and their laws."""

import math

import numpy as np
import pytest
import torch
from scipy.linalg import subspace_angles

from app.commands.theory.problems import (
    USUAL,
    ReluProblem,
    Shape,
    linear_instances,
    misalignment,
    normal,
    sample_second_moment,
    second_moment_of,
)
from app.initialization.gradient_estimators import ExactGradient
from tests.support.small_problems import linear_and_relu, rng


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


def test_gradient_is_what_the_initialization_of_a_real_run_accumulates():
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


def test_linear_risk_is_the_squared_error():
    problem = linear_instances(rng(), 5, USUAL, 4, 0.5).problem
    update = normal(rng(1), 5, 16, 24)
    x = normal(rng(2), 400_000, 24)
    for i in range(5):
        sampled = (x @ (update - problem.change)[i].T).square().sum(-1).mean()
        assert float(problem.risk(update)[i]) == pytest.approx(float(sampled), rel=0.01)


def test_misalignment_is_the_sine_of_the_largest_principal_angle():
    draws = rng(0)
    for turn in (1.0, 1e-3, 1e-9):
        space = np.linalg.qr(draws.standard_normal((9, 3)))[0]
        matrix = np.zeros((9, 5))
        matrix[:, :3] = (space + turn * draws.standard_normal((9, 3))) * (5, 4, 3)
        matrix[:, 3:] = 1e-12 * draws.standard_normal((9, 2))
        [measured] = misalignment(*map(torch.from_numpy, (space[None], matrix[None])))
        leading = np.linalg.svd(matrix)[0][:, :3]
        wanted = math.sin(subspace_angles(space, leading).max())
        assert float(measured) == pytest.approx(wanted, rel=1e-5)
