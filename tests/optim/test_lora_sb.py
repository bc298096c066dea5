"""LoRA-SB's optimizer against a plain float64 loop over U R V^T, with R alone trained."""

import numpy as np
import pytest
import torch
from torch import nn

from app.initialization.factors import SVD, lora_sb_factors
from app.optim.lora_sb import LoraSbAdamW
from tests.support.small_regression import M, N, R, Regression, S, group, numpy_adam, random_pairs

OPTIONS = {"lr": 0.01, "betas": (0.8, 0.9), "eps": 1e-6, "weight_decay": 0.1}


def start(rate=0.05, seed=0):
    """Return triplets of the signs of a matrix, and LoRA-SB's factors of them."""
    _, _, G = (x[0] for x in random_pairs(seed=seed))
    U, sigma, Vh = torch.linalg.svd(G.sign())
    signs = SVD(U[:, :R], sigma[:R], Vh[:R].T)
    return signs, rate, lora_sb_factors(signs, rate, S)


def numpy_loop(signs, rate, gradient, lr, betas, eps, weight_decay):
    """Ten steps of AdamW on R in W = U R V^T, from R = -rate diag(S); `gradient(W)` is the weight's."""
    U, V, adam = signs.U.numpy(), signs.V.numpy(), numpy_adam(betas, eps)
    R_ = np.diag(-rate * signs.S.numpy())
    for t in range(1, 11):
        g = U.T @ gradient(U @ R_ @ V.T) @ V
        R_ = (1 - lr * weight_decay) * R_ - lr * adam("R", g, t)
    return U @ R_ @ V.T


@pytest.mark.parametrize("scaling", [S, 1.0])
def test_ten_steps_are_those_of_numpy_whatever_the_scaling(scaling):
    signs, rate, _ = start()
    lora_A, lora_B = (nn.Parameter(x) for x in lora_sb_factors(signs, rate, scaling))
    before = lora_A.detach().clone()
    task = Regression()

    def gradient(W):
        return 2 * ((W @ task.X.numpy() - task.Y.numpy()) @ task.X.numpy().T) / (M * 20)

    pairs = {**group([lora_A, lora_B]), "scaling": [scaling]}
    optimizer = LoraSbAdamW([pairs], **OPTIONS)
    for _ in range(10):
        optimizer.zero_grad()
        loss = ((scaling * lora_B @ lora_A @ task.X - task.Y) ** 2).mean()
        optimizer.step(loss.backward)
    wanted = numpy_loop(signs, rate, gradient, **OPTIONS)
    product = (scaling * lora_B @ lora_A).detach().numpy()
    assert product == pytest.approx(wanted, rel=1e-8, abs=1e-10)
    assert torch.equal(lora_A, before)
    shapes = {name: tuple(value.shape) for name, value in optimizer.state[lora_B].items()}
    assert shapes == {"step": (), "exp_avg": (R, R), "exp_avg_sq": (R, R), "basis": (M, R)}


def test_the_start_is_the_best_approximation_of_adamws_first_step():
    """Of full fine-tuning, by torch's AdamW from a zero state; its epsilon is the only difference."""
    _, _, G = (x[0] for x in random_pairs())
    signs, rate, (lora_A, lora_B) = start()
    W = nn.Parameter(torch.zeros(M, N, dtype=torch.float64))
    W.grad = G.clone()
    torch.optim.AdamW([W], lr=rate, weight_decay=0.0).step()
    U, sigma, Vh = torch.linalg.svd(W.detach())
    assert torch.allclose(S * lora_B @ lora_A, (U[:, :R] * sigma[:R]) @ Vh[:R], atol=1e-6)
    assert torch.allclose(lora_A @ lora_A.T, torch.eye(R, dtype=torch.float64))
    assert torch.allclose(lora_A, signs.V.T)


def test_a_pair_without_a_span_and_a_pair_without_a_gradient_stay_as_they_are():
    torch.manual_seed(0)
    shapes = [(R, N), (M, R)] * 3
    params = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    other = nn.Parameter(torch.randn(4))
    twin = nn.Parameter(other.detach().clone())
    with torch.no_grad():
        params[3].zero_()
    before = [p.detach().clone() for p in params]
    optimizer = LoraSbAdamW([group(params), {"params": [other]}], lr=0.01)
    plain = torch.optim.AdamW([twin], lr=0.01, weight_decay=0.0)
    for _ in range(3):
        for p in (*params, other):
            p.grad = torch.randn_like(p)
        params[5].grad = None
        twin.grad = other.grad.clone()
        grads = [p.grad for p in params]
        optimizer.step()
        plain.step()
        assert all(p.grad is g for p, g in zip(params, grads, strict=True))
    moved = [not torch.equal(p, b) for p, b in zip(params, before, strict=True)]
    assert moved == [False, True, False, False, False, False]
    assert torch.equal(other, twin)
    # In its own span.
    U = torch.linalg.qr(before[1]).Q
    assert torch.allclose(U @ (U.T @ params[1]), params[1], atol=1e-6)


def test_a_group_without_scalings_is_an_error():
    A, B = nn.Parameter(torch.ones(R, N)), nn.Parameter(torch.ones(M, R))
    with pytest.raises(ValueError, match="scaling must have a number for each pair, got None"):
        LoraSbAdamW([{"params": [A, B], "lora_pairs": True}])
