"""LoRA-Pro: the mathematics against least squares, the optimizer against a plain float64 loop."""

import numpy as np
import pytest
import scipy.linalg
import torch
import yaml
from torch import nn

from app.models.adapter_config import LoraSettings
from app.optim.lora_pro import Adjusted, LoraProAdamW, adjusted_gradients, solve_sylvester
from app.tracking.config_files import CONFIGS
from app.training.module import LoraModule
from app.training.optimization import parameter_groups
from tests.support.configured import configured
from tests.support.small_regression import M, N, R, Regression, S, group, numpy_adam, random_pairs

TINY = 1e-14


def raw(A, B, G, s=S):
    return s * B.mT @ G, s * G @ A.mT


def adjusted(A, B, G, s=S, damping=TINY):
    scaling = torch.full((len(A),), s, dtype=torch.float64)
    return adjusted_gradients(A, B, *raw(A, B, G, s), scaling, damping)


def equivalent(A, B, adjustment, s=S):
    return s * (B @ adjustment.lora_A + adjustment.lora_B @ A)


def test_the_step_in_weight_space_is_the_least_squares_one():
    """min |s (B a + b A) - G| over all a and b, as one dense problem for each pair of a stack."""
    stack = random_pairs(3)
    adjustment = adjusted(*stack)
    steps = equivalent(*stack[:2], adjustment)
    for A, B, G, step in zip(*stack, steps, strict=True):
        to_a = torch.kron(B.contiguous(), torch.eye(N, dtype=torch.float64))  # vec by rows
        to_b = torch.kron(torch.eye(M, dtype=torch.float64), A.T.contiguous())
        matrix = S * torch.cat([to_a, to_b], dim=1)
        solution = torch.linalg.lstsq(matrix, G.flatten()[:, None], driver="gelsd").solution
        best = (matrix @ solution).reshape(M, N)
        assert torch.allclose(step, best, atol=1e-9)
        # The raw gradients' step is not.
        grad_A, grad_B = raw(A, B, G)
        assert (S * (B @ grad_A + grad_B @ A) - G).norm() > (best - G).norm() + 1


def test_of_all_best_steps_it_is_the_closest_to_the_raw_gradients():
    A, B, G = random_pairs()
    adjustment = adjusted(A, B, G)
    grad_A, grad_B = raw(A, B, G)

    def distance(X):
        return ((adjustment.lora_A + X @ A - grad_A) ** 2).sum() + (
            (adjustment.lora_B - B @ X - grad_B) ** 2
        ).sum()

    X = torch.zeros(1, R, R, dtype=torch.float64, requires_grad=True)
    distance(X).backward()
    assert X.grad.abs().max() < 1e-8
    for seed in range(20):
        other = torch.randn(1, R, R, generator=torch.Generator().manual_seed(seed)).double()
        assert distance(other) > distance(torch.zeros_like(other))
        # Any X makes the same step in weight space.
        moved = adjustment._replace(
            lora_A=adjustment.lora_A + other @ A, lora_B=adjustment.lora_B - B @ other
        )
        assert torch.allclose(equivalent(A, B, moved), equivalent(A, B, adjustment), atol=1e-9)


def test_the_sylvester_equation_is_scipys():
    generator = torch.Generator().manual_seed(3)
    left, right, target = (torch.randn(5, R, R, generator=generator).double() for _ in range(3))
    left, right = left @ left.mT, right @ right.mT
    adjustment = solve_sylvester(left, right, target)
    for i in range(5):
        wanted = scipy.linalg.solve_sylvester(left[i].numpy(), right[i].numpy(), target[i].numpy())
        assert adjustment[i].numpy() == pytest.approx(wanted, rel=1e-7, abs=1e-9)
    nothing = torch.zeros_like(left)
    assert torch.equal(solve_sylvester(nothing, nothing, nothing), nothing)


def test_the_loss_falls_as_the_theorem_says():
    """dL = -eta (<grad_A, s^-2 (B^T B)^-1 grad_A> + <grad_B, s^-2 (I - P_B) grad_B (A A^T)^-1>), at most 0."""
    A, B, G = random_pairs()
    adjustment = adjusted(A, B, G)
    change = (G * equivalent(A, B, adjustment)).sum()
    grad_A, grad_B = raw(A, B, G)
    P = B @ torch.linalg.inv(B.mT @ B) @ B.mT
    first = (grad_A * (torch.linalg.inv(B.mT @ B) @ grad_A)).sum() / S**2
    second = (grad_B * ((grad_B - P @ grad_B) @ torch.linalg.inv(A @ A.mT))).sum() / S**2
    assert float(change) == pytest.approx(float(first + second), rel=1e-9)
    assert change > 0


def test_at_loras_initialization_only_lora_b_moves():
    A, _, G = random_pairs(2)
    B = torch.zeros(2, M, R, dtype=torch.float64)
    adjustment = adjusted(A, B, G, damping=1e-8)
    assert torch.equal(adjustment.lora_A, torch.zeros_like(A))
    wanted = raw(A, B, G)[1] @ torch.linalg.inv(A @ A.mT) / S**2
    assert torch.allclose(adjustment.lora_B, wanted, rtol=1e-6)


@pytest.mark.parametrize("tail", [0, 1e-5, 1e-3, 1])
@pytest.mark.parametrize("size", [1e-4, 1e-2, 1])
def test_factors_of_lower_rank_do_not_blow_the_step_up(size, tail):
    """Float32 factors at the sizes of a real layer: lora_B of rank one, but for a tail."""
    generator = torch.Generator().manual_seed(0)
    m, n, r, s = 1024, 768, 8, 5.66
    noise = torch.randn(1, m, r, generator=generator)
    B = size * (noise[..., :1].sign() + tail * noise)
    A = (torch.rand(1, r, n, generator=generator) * 2 - 1) / n**0.5
    G = 1e-3 * torch.randn(1, m, n, generator=generator)
    adjustment = adjusted(A, B, G, s, damping=1e-8)
    step = equivalent(A.double(), B.double(), Adjusted(*(part.double() for part in adjustment)), s)
    # The projection of G onto the directions that the factors can move in, from an SVD of each.
    a, b, g = A[0].double(), B[0].double(), G[0].double()
    U, S, _ = torch.linalg.svd(b, full_matrices=False)
    damped = S**2 / (S**2 + 1e-8)  # of each direction of lora_B
    P_B = (U * damped) @ U.T
    P_A = torch.linalg.pinv(a) @ a
    wanted = P_B @ g + (g - P_B @ g) @ P_A
    assert (step[0] - wanted).norm() < 3e-2 * wanted.norm()  # the factors' own rounding


@pytest.mark.parametrize("mode", ["full", "efficient"])
def test_float32_factors_train_as_float64_ones(mode):
    """The target is of rank one, and so is lora_B: what rounding adds to it must not grow.

    Computed in float32 throughout, the losses would be 20 % and more apart.
    """
    m, n, r, s = 256, 192, 8, 5.66
    losses = {}
    for dtype in (torch.float32, torch.float64):
        generator = torch.Generator().manual_seed(6)
        u, v = torch.randn(m, 1, generator=generator), torch.randn(n, 1, generator=generator)
        target = (u @ v.T / u.norm() / v.norm()).to(dtype)
        start = (torch.rand(r, n, generator=generator) * 2 - 1) / n**0.5
        A, B = nn.Parameter(start.to(dtype)), nn.Parameter(torch.zeros(m, r, dtype=dtype))
        params = {"params": [A, B], "lora_pairs": True, "scaling": [s]}
        optimizer = LoraProAdamW([params], lr=5e-3, mode=mode)
        trace = losses.setdefault(dtype, [])
        for _ in range(12):
            X = torch.randn(n, 64, generator=generator).to(dtype)
            loss = ((s * B @ A - target) @ X).square().mean() * m / 2
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            trace.append(float(loss.detach()))
    assert losses[torch.float32] == pytest.approx(losses[torch.float64], rel=2e-2)


# The optimizer


def numpy_adjusted(A, B, gA, gB, s=S, damping=1e-8):
    """The formulas once more, in numpy and with scipy's Sylvester solver."""
    eye = damping * np.eye(len(A))
    iA, iB = np.linalg.inv(A @ A.T + eye), np.linalg.inv(B.T @ B + eye)
    X = scipy.linalg.solve_sylvester(B.T @ B, A @ A.T, -(iB @ gA @ A.T) / s**2)
    first = iB @ gA / s**2 + X @ A
    second = (np.eye(len(B)) - B @ iB @ B.T) @ gB @ iA / s**2 - B @ X
    return first, second


def numpy_steps(A, B, gradients, mode, lr, betas, eps, weight_decay):
    """Ten steps of either mode, written plainly; `gradients(A, B)` returns the raw ones."""
    adam = numpy_adam(betas, eps)
    for t in range(1, 11):
        gA, gB = gradients(A, B)
        aA, aB = numpy_adjusted(A, B, gA, gB)
        if mode == "full":
            u = adam("G", S * (B @ aA + aB @ A), t)
            dA, dB = numpy_adjusted(A, B, S * B.T @ u, S * u @ A.T)
            keep = np.sqrt(1 - lr * weight_decay)
        else:
            dA, dB = adam("A", aA, t), adam("B", aB, t)
            keep = 1 - lr * weight_decay
        A, B = keep * A - lr * dA, keep * B - lr * dB
    return A, B


@pytest.mark.parametrize("start", ["lora", "spectral"])
@pytest.mark.parametrize("mode", ["full", "efficient"])
def test_ten_steps_are_those_of_numpy(mode, start):
    A, B, _ = (x[0] for x in random_pairs())
    if start == "lora":
        B = torch.zeros_like(B)
    options = {"lr": 0.01, "betas": (0.8, 0.9), "eps": 1e-6, "weight_decay": 0.1}
    task = Regression()
    ours = [nn.Parameter(x.clone()) for x in (A, B)]
    optimizer = LoraProAdamW([group(ours)], mode=mode, damping=1e-8, **options)
    for _ in range(10):
        optimizer.zero_grad()
        optimizer.step(lambda: task.loss(*ours).backward())
    wanted = numpy_steps(A.numpy(), B.numpy(), task.gradients, mode, **options)
    for got, want in zip(ours, wanted, strict=True):
        assert got.detach().numpy() == pytest.approx(want, rel=1e-6, abs=1e-9)
    assert task.loss(*ours) < task.loss(A, B)
    shapes = {tuple(v.shape) for s in optimizer.state.values() for v in s.values()}
    assert ((M, N) in shapes) == (mode == "full")


@pytest.mark.parametrize(
    ("method", "mode"), [("lora_pro", "full"), ("lora_pro_efficient", "efficient")]
)
def test_a_run_has_the_adapters_own_scaling(method, mode, run_models):
    """The scaling is lora_alpha / sqrt(r); gradients of each pair are divided by it."""
    overlay = yaml.safe_load((CONFIGS / "methods" / f"{method}.yaml").read_text())
    options = overlay["model"]["optimizer"]["init_args"]
    assert options["mode"] == mode
    module = LoraModule(str(run_models / "llama"), adapter=LoraSettings(r=4, lora_alpha=6))
    configured(module)
    groups = parameter_groups(module.model)
    [pairs] = LoraProAdamW(groups, **options).param_groups
    assert pairs["scaling"] == pytest.approx([6 / 4**0.5] * 14)
    factors = [p for pair in module.lora_pairs() for p in (pair.lora_A, pair.lora_B)]
    assert all(a is b for a, b in zip(pairs["params"], factors, strict=True))


@pytest.mark.parametrize("mode", ["full", "efficient"])
def test_many_shapes_missing_gradients_and_other_groups(mode):
    torch.manual_seed(0)
    shapes = [(R, N), (M, R), (R, N), (M, R), (2, 5), (6, 2), (2, 5), (6, 2)]
    params = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    other = nn.Parameter(torch.randn(4))
    twin = nn.Parameter(other.detach().clone())
    optimizer = LoraProAdamW([group(params), {"params": [other]}], lr=0.01, mode=mode)
    plain = torch.optim.AdamW([twin], lr=0.01, weight_decay=0.0)
    before = [p.detach().clone() for p in params]
    for _ in range(3):
        for p in params:
            p.grad = torch.randn_like(p)
        params[2].grad = None  # its partner waits, too
        other.grad = torch.randn_like(other)
        twin.grad = other.grad.clone()
        grads = [p.grad for p in params]
        optimizer.step()
        plain.step()
        assert all(p.grad is g for p, g in zip(params, grads, strict=True))
    moved = [not torch.equal(p, b) for p, b in zip(params, before, strict=True)]
    assert moved == [True, True, False, False, True, True, True, True]
    assert torch.equal(other, twin)


def test_wrong_settings_are_errors():
    A, B = nn.Parameter(torch.ones(R, N)), nn.Parameter(torch.ones(M, R))
    with pytest.raises(ValueError, match="damping must be > 0"):
        LoraProAdamW([A], damping=0)
    with pytest.raises(ValueError, match="mode must be full or efficient, got 'fast'"):
        LoraProAdamW([A], mode="fast")
    with pytest.raises(ValueError, match="scaling must have a number for each pair, got None"):
        LoraProAdamW([{"params": [A, B], "lora_pairs": True}])
