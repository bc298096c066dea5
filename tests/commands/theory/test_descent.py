"""Initializations and descents against numpy and autograd."""

import numpy as np
import pytest
import torch

from app.commands.theory.descent import descend, descend_core, random_init, spectral_init
from app.commands.theory.problems import USUAL, LinearProblem, column, linear_instances, normal
from tests.support.small_problems import doubles, linear_and_relu, rng


@pytest.mark.parametrize(("kind", "paper_gamma"), [("linear", 1), ("relu", 2)])
def test_spectral_initialization_is_the_paper_s(kind, paper_gamma):
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
    initial = spectral_init(problem, 3)
    offset = normal(rng(5), 3, 5, 6)
    lr = doubles(0.1, 0.2, 0.3)
    first, second = descend(problem, initial, column(lr), 1, damping, offset)
    assert first is initial
    lora_A, lora_B = (factor.clone().requires_grad_() for factor in initial)
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
    initial = random_init(rng(1), problem, 4, 0.1)
    with pytest.raises(RuntimeError, match=r"lora_B\^T lora_B is singular"):
        list(descend(problem, initial, 0.1, 1, damping=0.0))


def test_random_initialization_is_lora_s():
    problem = linear_instances(rng(), 200, USUAL, 4, 0.5).problem
    lora_A, lora_B = random_init(rng(1), problem, 5, 0.3)
    assert (lora_A.shape, lora_B.shape) == ((200, 5, 24), (200, 16, 5))
    assert not lora_B.any()
    assert float(lora_A.std()) == pytest.approx(0.3, rel=0.02)


def test_lora_sb_stays_between_its_spaces():
    _, _, change, linear, _ = linear_and_relu()
    gradient = linear.gradient(torch.zeros_like(change))[:1]
    one = LinearProblem(change[:1], linear.second_moment[:1])
    U, S, Vt = np.linalg.svd(gradient[0].numpy())
    path = list(descend_core(one, 2, 0.1, 400))
    np.testing.assert_allclose(path[0][0], -(U[:, :2] * S[:2]) @ Vt[:2], atol=1e-12)
    for update in (path[1], path[-1]):
        np.testing.assert_allclose(U[:, 2:].T @ update[0].numpy(), 0, atol=1e-12)
        np.testing.assert_allclose(update[0].numpy() @ Vt[2:].T, 0, atol=1e-12)
    # What it comes to is the best that there is between them.
    left = U[:, :2].T @ one.gradient(path[-1])[0].numpy() @ Vt[:2].T
    np.testing.assert_allclose(left, 0, atol=1e-8)
