"""RefLoRA: the balance against scipy and its defining equation, the optimizer against a plain float64 loop."""

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import nn

from app.optim.reflora import RefLoraAdamW, balance
from tests.support.small_regression import M, N, R, Regression, group, numpy_adam, random_pairs


def authors_balance(A, B):
    """Return S and its inverse in the form of the authors' code, for a pair in numpy."""
    squares, V_A = np.linalg.eigh(A @ A.T)
    sigma_A = np.sqrt(squares)
    right = B @ V_A @ np.diag(sigma_A)
    squares, V_M = np.linalg.eigh(right.T @ right)
    sigma_M = np.sqrt(squares)
    left = V_A @ np.diag(1 / sigma_A) @ V_M
    other = V_A @ np.diag(sigma_A) @ V_M
    return left @ np.diag(sigma_M) @ left.T, other @ np.diag(1 / sigma_M) @ other.T


def test_the_balance_is_the_geometric_mean_of_the_gram_matrices():
    A, B, _ = random_pairs(3)
    S, inverse = balance(A, B)
    for a, b, s, i in zip(A, B, S, inverse, strict=True):
        root = scipy.linalg.sqrtm((a @ a.T).numpy())
        middle = scipy.linalg.sqrtm(root @ (b.T @ b).numpy() @ root)
        wanted = np.linalg.inv(root) @ middle @ np.linalg.inv(root)
        assert s.numpy() == pytest.approx(wanted, rel=1e-5)
        theirs, their_inverse = authors_balance(a.numpy(), b.numpy())
        assert s.numpy() == pytest.approx(theirs, rel=1e-5)
        assert i.numpy() == pytest.approx(their_inverse, rel=1e-5)
        # S^-1 and S weigh the gradients of the two factors so that these factors have equal Gram matrices.
        P = torch.linalg.cholesky(s)
        balanced_A, balanced_B = P.T @ a, b @ torch.linalg.inv(P).T
        assert torch.allclose(balanced_B @ balanced_A, b @ a)
        assert torch.allclose(balanced_A @ balanced_A.T, balanced_B.T @ balanced_B, rtol=1e-5)


def test_the_step_of_the_product_does_not_depend_on_the_factorization():
    A, B, G = random_pairs()
    T = torch.randn(R, R, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    other_A, other_B = torch.linalg.inv(T) @ A, B @ T

    def step(a, b):
        S, inverse = balance(a, b)
        return b @ (inverse @ (b.mT @ G)) + ((G @ a.mT) @ S) @ a

    assert torch.allclose(step(A, B), step(other_A, other_B), rtol=1e-4)
    raw = [b @ b.mT @ G + G @ a.mT @ a for a, b in ((A, B), (other_A, other_B))]
    assert not torch.allclose(*raw, rtol=0.1)


def test_a_product_of_zero_has_no_balance():
    A, B, _ = random_pairs(2)
    B[1] = 0
    S, inverse = balance(A, B)
    eye = torch.eye(R, dtype=torch.float64)
    assert torch.equal(S[1], eye)
    assert torch.equal(inverse[1], eye)
    assert not torch.allclose(S[0], eye, atol=0.1)


def test_factors_of_lower_rank_do_not_blow_up():
    """Float32, lora_B of rank one but for rounding: the step is that of float64 factors."""
    generator = torch.Generator().manual_seed(0)
    column = torch.randn(1, 64, 1, generator=generator)
    B = 1e-3 * (column.sign() + 1e-6 * torch.randn(1, 64, 8, generator=generator))
    A = torch.randn(1, 8, 48, generator=generator) / 48**0.5
    G = torch.randn(1, 64, 48, generator=generator)
    S, inverse = balance(A, B)
    assert S.isfinite().all()
    assert inverse.isfinite().all()
    a, b, g = A[0].double(), B[0].double(), G[0].double()
    step = b @ (inverse[0] @ (b.T @ g)) + (g @ a.T) @ S[0] @ a
    # The leading direction alone, from the singular value decomposition of the product.
    U, sigma, Vh = torch.linalg.svd(b @ a)
    wanted = sigma[0] * (U[:, :1] @ U[:, :1].T @ g + g @ Vh[:1].T @ Vh[:1])
    assert float((step - wanted).norm() / wanted.norm()) < 1e-2


def numpy_steps(A, B, gradients, warmup, steps, lr, betas, eps, weight_decay):
    """AdamW on balanced gradients, written plainly; `gradients(A, B)` returns the raw ones."""
    adam = numpy_adam(betas, eps)
    for t in range(1, steps + 1):
        g_A, g_B = gradients(A, B)
        if t > warmup:
            S, inverse = authors_balance(A, B)
            g_A, g_B = inverse @ g_A, g_B @ S
        keep = 1 - lr * weight_decay
        A, B = keep * A - lr * adam("A", g_A, t), keep * B - lr * adam("B", g_B, t)
    return A, B


@pytest.mark.parametrize(("start", "warmup"), [("lora", 4), ("other", 0)])
def test_ten_steps_are_those_of_numpy(start, warmup):
    A, B, _ = (x[0] for x in random_pairs())
    if start == "lora":
        B = torch.zeros_like(B)
    options = {"lr": 0.01, "betas": (0.8, 0.9), "eps": 1e-6, "weight_decay": 0.1}
    task = Regression()
    ours = [nn.Parameter(x.clone()) for x in (A, B)]
    optimizer = RefLoraAdamW([group(ours)], warmup_steps=warmup, **options)
    for _ in range(10):
        optimizer.zero_grad()
        optimizer.step(lambda: task.loss(*ours).backward())
    wanted = numpy_steps(A.numpy(), B.numpy(), task.gradients, warmup, 10, **options)
    for got, want in zip(ours, wanted, strict=True):
        assert got.detach().numpy() == pytest.approx(want, rel=1e-4, abs=1e-6)
    plain = numpy_steps(A.numpy(), B.numpy(), task.gradients, 10, 10, **options)
    assert ours[1].detach().numpy() != pytest.approx(plain[1], rel=1e-2)
    assert task.loss(*ours) < task.loss(A, B)


def test_missing_gradients_and_other_groups_are_plain_adamws():
    torch.manual_seed(0)
    shapes = [(R, N), (M, R), (R, N), (M, R), (2, 5), (6, 2)]
    params = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    other = nn.Parameter(torch.randn(4))
    twins = [nn.Parameter(p.detach().clone()) for p in (*params, other)]
    options = {"lr": 0.01, "weight_decay": 0.1}
    optimizer = RefLoraAdamW([group(params), {"params": [other]}], warmup_steps=0, **options)
    plain = torch.optim.AdamW(twins, **options)
    for _ in range(3):
        for p, twin in zip((*params, other), twins, strict=True):
            p.grad = torch.randn_like(p)
            twin.grad = p.grad.clone()
        params[2].grad = twins[2].grad = None
        grads = [p.grad for p in params]
        optimizer.step()
        plain.step()
        assert all(p.grad is g for p, g in zip(params, grads, strict=True))
    alike = [torch.equal(p, twin) for p, twin in zip((*params, other), twins, strict=True)]
    assert alike == [False, False, True, True, False, False, True]


def test_a_negative_warmup_is_an_error():
    with pytest.raises(ValueError, match="warmup_steps must be >= 0, got -1"):
        RefLoraAdamW([nn.Parameter(torch.ones(R, N))], warmup_steps=-1)
