"""Factors made of a weight against scipy and the papers' formulas."""

import numpy as np
import pytest
import scipy.fft
import torch

from app.initialization.weight_factors import (
    loram_factors,
    loram_magnitude,
    olora_factors,
    pissa_factors,
    sine_basis,
)


def random_weight(m=40, n=30, dtype=torch.float32):
    return torch.randn(m, n, generator=torch.Generator().manual_seed(0), dtype=dtype)


def test_the_randomised_pissa_is_nearly_the_best_of_its_rank():
    W = random_weight()
    best = torch.linalg.svdvals(W)[4:].norm()
    A, B = pissa_factors(W, 4, 2.0, niter=16)
    again = pissa_factors(W, 4, 2.0, niter=16)
    assert torch.equal(A, again[0])
    assert torch.equal(B, again[1])
    assert float((W - 2 * B @ A).norm()) == pytest.approx(float(best), rel=1e-3)


@pytest.mark.parametrize(("m", "n"), [(40, 30), (30, 40), (30, 30)])
def test_olora_is_the_beginning_of_a_gram_schmidt_orthogonalization(m, n):
    W = random_weight(m, n, torch.float64)
    A, B = olora_factors(W, 4)
    assert (A.shape, B.shape) == ((4, n), (m, 4))
    assert torch.allclose(B.T @ B, torch.eye(4, dtype=torch.float64))
    # The first columns of W are in the span of lora_B, with lora_A for coordinates.
    assert torch.allclose(B @ A[:, :4], W[:, :4])
    assert torch.allclose(A, B.T @ W)


@pytest.mark.parametrize("size", [5, 24])
def test_the_sine_basis_is_scipys_orthonormal_transform(size):
    wanted = scipy.fft.dst(np.eye(size), type=1, norm="ortho", axis=0)
    assert sine_basis(size, size).numpy() == pytest.approx(wanted, abs=1e-12)
    assert torch.equal(sine_basis(size, 3), sine_basis(size, size)[:, :3])
    # Written as the paper writes it, with indices from zero.
    entry = np.sqrt(2 / (size + 1)) * np.sin((2 + 1) * (1 + 1) * np.pi / (size + 1))
    assert float(sine_basis(size, 3)[2, 1]) == pytest.approx(entry)


@pytest.mark.parametrize(("m", "n", "rank"), [(40, 30, 4), (16, 50, 8), (30, 30, 2)])
def test_loram_has_the_papers_beta(m, n, rank):
    """beta = (log_min(m, n)(r) nu[W] / nu[Phi_m Phi_n^T])^(1/4), nu the mean square of the entries."""
    W = random_weight(m, n, torch.float64)

    def nu(matrix):
        return float((matrix**2).mean())

    bases = sine_basis(m, rank), sine_basis(n, rank)
    gain = np.log(rank) / np.log(min(m, n))
    beta = (gain * nu(W) / nu(bases[0] @ bases[1].T)) ** 0.25
    magnitude = loram_magnitude(W, rank)
    assert magnitude == pytest.approx(beta**2)
    A, B = loram_factors(m, n, rank, magnitude)
    assert torch.allclose(B.double(), beta * bases[0], atol=1e-6)
    assert torch.allclose(A.double(), beta * bases[1].T, atol=1e-6)
    product = B.double() @ A.double()
    assert nu(product) == pytest.approx(gain * nu(W), rel=1e-5)
    assert torch.linalg.svdvals(product)[:rank].numpy() == pytest.approx(magnitude, rel=1e-5)


def test_loram_is_about_as_large_as_pissa_on_a_spectrum_that_falls():
    """The paper's reason for the logarithm: it grows with r as the leading singular values' share does."""
    generator = torch.Generator().manual_seed(0)
    U, V = (torch.linalg.qr(torch.randn(64, 64, generator=generator).double()).Q for _ in range(2))
    W = U * torch.arange(1, 65).double() ** -0.5 @ V.T
    shares = []
    for rank in (2, 8, 32):
        A, B = pissa_factors(W, rank, 1.0)
        A_m, B_m = loram_factors(64, 64, rank, loram_magnitude(W, rank))
        shares.append(float((B_m @ A_m).norm() / (B @ A).norm()))
    assert shares == pytest.approx([1, 1, 1], abs=0.5)


def test_loram_is_nothing_at_rank_one():
    assert loram_magnitude(random_weight(), 1) == 0
