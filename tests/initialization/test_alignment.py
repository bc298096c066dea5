"""The inside of LoRA pairs against numpy and scipy, and known by construction."""

import numpy as np
import pytest
import torch
from scipy.linalg import subspace_angles

from app.initialization.alignment import measure_alignment
from app.initialization.factors import SVD, spectral_factors, truncated_svd

M, N, R, PAIRS, SCALING = 24, 17, 4, 3, 5.6


@pytest.fixture
def pairs():
    generator = torch.Generator().manual_seed(1)
    lora_A = [torch.randn(R, N, generator=generator) for _ in range(PAIRS)]
    lora_B = [torch.randn(M, R, generator=generator) for _ in range(PAIRS)]
    gradients = [torch.randn(M, N, generator=generator) for _ in range(PAIRS)]
    return lora_A, lora_B, [truncated_svd(gradient, R) for gradient in gradients]


def test_every_measure_is_that_of_numpy_and_scipy(pairs):
    lora_A, lora_B, reference = pairs
    metrics = measure_alignment(lora_A, lora_B, SCALING, reference)
    for i in range(PAIRS):
        A, B = (factor.double().numpy() for factor in (lora_A[i], lora_B[i]))
        U, S, V = (part.double().numpy() for part in reference[i])
        update = SCALING * B @ A
        values = np.linalg.svd(update, compute_uv=False)[:R]
        assert metrics.singular_values[i].numpy() == pytest.approx(values, rel=1e-10)
        assert float(metrics.norm[i]) == pytest.approx(np.linalg.norm(update), rel=1e-10)
        share = values / values.sum()
        rank = np.exp(-(share * np.log(share)).sum())
        assert float(metrics.effective_rank[i]) == pytest.approx(rank, rel=1e-10)
        assert float(metrics.condition_A[i]) == pytest.approx(np.linalg.cond(A @ A.T), rel=1e-6)
        assert float(metrics.condition_B[i]) == pytest.approx(np.linalg.cond(B.T @ B), rel=1e-6)
        angle_A = np.rad2deg(subspace_angles(A.T, V).max())
        angle_B = np.rad2deg(subspace_angles(B, U).max())
        assert float(metrics.angle_A[i]) == pytest.approx(angle_A, abs=1e-5)
        assert float(metrics.angle_B[i]) == pytest.approx(angle_B, abs=1e-5)
        into_B, into_A = B @ np.linalg.pinv(B), np.linalg.pinv(A) @ A
        inside = into_B @ (U * S @ V.T) @ into_A
        captured = (inside**2).sum() / (S**2).sum()
        assert float(metrics.captured[i]) == pytest.approx(captured, rel=1e-6)


def test_the_spectral_start_is_aligned_with_its_gradient(pairs):
    _, _, reference = pairs
    factors = [spectral_factors(svd, 128.0) for svd in reference]
    lora_A, lora_B = ([getattr(f, name) for f in factors] for name in ("lora_A", "lora_B"))
    metrics = measure_alignment(lora_A, lora_B, SCALING, reference)
    assert metrics.angle_A.max() < 1e-3
    assert metrics.angle_B.max() < 1e-3
    assert metrics.captured.numpy() == pytest.approx(1.0, abs=1e-6)
    assert metrics.singular_values[:, 0].numpy() == pytest.approx(SCALING / 128, rel=1e-5)
    ratio = torch.stack([svd.S[0] / svd.S[-1] for svd in reference]).double()
    assert torch.allclose(metrics.condition_A, ratio, rtol=1e-4)


def test_small_angles_are_not_lost_in_rounding():
    U, V = (torch.linalg.qr(torch.randn(size, R, dtype=torch.float64))[0] for size in (M, N))
    aside = torch.linalg.qr(torch.cat([U, torch.randn(M, 1, dtype=torch.float64)], 1))[0][:, -1:]
    for angle in (1e-9, 1e-5, 0.1, 1.0, np.pi / 2):
        turned = U.clone()
        turned[:, :1] = np.cos(angle) * U[:, :1] + np.sin(angle) * aside
        reference = SVD(U, torch.ones(R), V)
        metrics = measure_alignment([V.T], [turned], 1.0, [reference])
        assert float(metrics.angle_B[0]) == pytest.approx(np.rad2deg(angle), rel=1e-5)


def test_a_factor_of_zeros_has_no_span(pairs):
    lora_A, _, reference = pairs
    metrics = measure_alignment(lora_A, [torch.zeros(M, R)] * PAIRS, SCALING, reference)
    assert torch.equal(metrics.norm, torch.zeros(PAIRS, dtype=torch.float64))
    for measure in (metrics.angle_B, metrics.captured, metrics.effective_rank):
        assert measure.isnan().all()
    assert metrics.angle_A.isfinite().all()


def test_a_gradient_of_zeros_has_no_span(pairs):
    """Its triplets are those of whatever basis the decomposition came to."""
    lora_A, lora_B, reference = pairs
    reference = [reference[0]._replace(S=torch.zeros(R)), *reference[1:]]
    metrics = measure_alignment(lora_A, lora_B, SCALING, reference)
    for measure in (metrics.angle_A, metrics.angle_B, metrics.captured):
        assert measure.isnan().tolist() == [True, False, False]
    assert metrics.norm.isfinite().all()
