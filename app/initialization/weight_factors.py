"""The factors that an initialization makes of a layer's own weight: PiSSA's, OLoRA's, LoRAM's."""

import math

import torch
from torch import Tensor

from app.initialization.factors import LoraFactors


def pissa_factors(
    W: Tensor, rank: int, scaling: float, niter: int | None = None
) -> tuple[Tensor, Tensor]:
    """Compute PiSSA's lora_A (r, n) and lora_B (m, r) of a weight W (m, n), float32.

    `niter` counts the power iterations of a randomised SVD, with a seed of its own; None takes the exact one.
    """
    if niter is None:
        U, S, Vh = torch.linalg.svd(W, full_matrices=False)
        U, S, V = U[:, :rank], S[:rank], Vh[:rank].T
    else:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            U, S, V = torch.svd_lowrank(W, rank, niter=niter)
    root = (S / scaling).sqrt()
    return root[:, None] * V.T, U * root


def olora_factors(W: Tensor, rank: int) -> LoraFactors:
    """Compute OLoRA's factors of a weight.

        Q R = W,    lora_B = Q_:,1..r,    lora_A = R_1..r,:

    Args:
        W: (m, n).
        rank: r, at most min(m, n).

    Returns:
        LoraFactors in W's dtype: lora_B has orthonormal columns, the first r rows of R are those of lora_A.

    Source: arXiv:2406.01775; PEFT's `init_lora_weights="olora"`.
    """
    Q, R = torch.linalg.qr(W)
    return LoraFactors(R[:rank], Q[:, :rank])


def sine_basis(size: int, rank: int) -> Tensor:
    """Return the first `rank` columns of the orthogonal matrix of the discrete sine transform.

        Phi[i, j] = (2 / (size + 1))^(1/2) sin((i + 1) (j + 1) pi / (size + 1))

    Args:
        size: Rows, 1 <= rank <= size.
        rank: Columns.

    Returns:
        (size, rank), float64, with orthonormal columns.

    Source: arXiv:2507.06558, eq. 12.
    """
    rows, columns = (torch.arange(1, k + 1, dtype=torch.float64) for k in (size, rank))
    angles = torch.outer(rows, columns) * (math.pi / (size + 1))
    return math.sqrt(2 / (size + 1)) * angles.sin()


def loram_magnitude(W: Tensor, rank: int) -> float:
    """Return the size of LoRAM's product: the common value of its r singular values.

        (log_min(m, n)(r) / r)^(1/2) |W|_F

    so that the product has log_min(m, n)(r) of the mean square of W's entries; the logarithm stands for the
    share that the leading r singular values have. It is 0 at rank 1.

    Args:
        W: (m, n).
        rank: r, at most min(m, n).

    Source: arXiv:2507.06558, eq. 11 (beta^2) and Algorithm 1, with the mean square r / (m n) of
        Phi_m Phi_n^T, whose r singular values are 1.
    """
    gain = math.log(rank) / math.log(min(W.shape)) if rank > 1 else 0.0
    return math.sqrt(gain / rank) * float(torch.linalg.vector_norm(W, dtype=torch.float64))


def loram_factors(m: int, n: int, rank: int, magnitude: float) -> LoraFactors:
    """Compute LoRAM's factors of a size.

        lora_B = magnitude^(1/2) Phi_m,    lora_A = magnitude^(1/2) Phi_n^T

    with the bases of `sine_basis`, so that all r singular values of lora_B @ lora_A are `magnitude`.

    Args:
        m: Rows of the weight.
        n: Its columns.
        rank: r, at most min(m, n).
        magnitude: From `loram_magnitude`, or any size.

    Returns:
        LoraFactors in float32.

    Source: arXiv:2507.06558, eq. 11.
    """
    root = math.sqrt(magnitude)
    lora_A, lora_B = root * sine_basis(n, rank).T, root * sine_basis(m, rank)
    return LoraFactors(lora_A.float(), lora_B.float())
