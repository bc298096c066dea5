"""Spectral initialisation: from a layer's gradient to its LoRA factors. Pure mathematics."""

from typing import NamedTuple

import torch
from torch import Tensor

_DIRECT_SVD_BELOW = 192
"""A matrix whose smaller side is below this is decomposed directly; it costs milliseconds."""


class SVD(NamedTuple):
    """The leading singular triplets of a matrix: U (m, k), S (k,) descending, V (n, k)."""

    U: Tensor
    S: Tensor
    V: Tensor


def fix_signs(svd: SVD) -> SVD:
    """Flip singular pairs so that the largest entry of each column of U is positive.

    Singular vectors are unique only up to a common sign; with this rule equal gradients give equal
    factors on every rank, device and library.
    """
    rows = svd.U.abs().argmax(dim=0, keepdim=True)
    signs = torch.where(svd.U.gather(0, rows) < 0, -1.0, 1.0).to(svd.U.dtype)
    return SVD(svd.U * signs, svd.S, svd.V * signs)


def truncated_svd(matrix: Tensor, rank: int, generator: torch.Generator | None = None) -> SVD:
    """Compute the leading `rank` singular triplets of a dense matrix.

        matrix ~ U diag(S) V^T, the best rank-`rank` approximation

    Small matrices are decomposed directly in float64. Larger ones go through subspace iteration with
    oversampling, which stops when the residuals |matrix^T u_i - s_i v_i| of the kept triplets fall to
    float32 rounding (1e-6 of s_1), and through the direct decomposition when they do not within 24 rounds.

    Args:
        matrix: Shape (m, n), any float dtype and device. Not modified.
        rank: Number of triplets kept; 1 <= rank <= min(m, n).
        generator: Source of the random start, on the matrix's device. None: a generator seeded with 0.

    Returns:
        SVD in float32 with `fix_signs` applied; in float64 for a float64 matrix, which is decomposed
        directly whatever its size.

    Raises:
        ValueError: If rank is out of range.
    """
    smaller = min(matrix.shape)
    if not 1 <= rank <= smaller:
        raise ValueError(
            f"rank must lie in 1..{smaller} for a matrix {tuple(matrix.shape)}, got {rank}"
        )
    width = rank + max(8, rank)
    dtype = torch.promote_types(matrix.dtype, torch.float32)
    if dtype == torch.float32 and smaller > _DIRECT_SVD_BELOW and 2 * width < smaller:
        found = _subspace_iteration(matrix.float(), rank, width, generator)
        if found is not None:
            return fix_signs(found)
    U, S, Vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    return fix_signs(SVD(U[:, :rank].to(dtype), S[:rank].to(dtype), Vh[:rank].T.to(dtype)))


def _subspace_iteration(
    matrix: Tensor, rank: int, width: int, generator: torch.Generator | None
) -> SVD | None:
    if generator is None:
        generator = torch.Generator(matrix.device).manual_seed(0)
    basis = torch.randn(
        matrix.shape[1], width, generator=generator, device=matrix.device, dtype=matrix.dtype
    )
    for _ in range(24):
        left = torch.linalg.qr(matrix @ torch.linalg.qr(basis)[0])[0]
        basis = matrix.T @ left
        svd = low_rank_svd(left, basis, rank)
        # matrix^T u_i = s_i v_i holds by construction; the other half says whether u_i has settled.
        residual = (matrix @ svd.V - svd.U * svd.S).norm(dim=0)
        if bool((residual <= 1e-6 * svd.S[0] + torch.finfo(matrix.dtype).tiny).all()):
            return svd
    return None


def low_rank_svd(left: Tensor, right: Tensor, rank: int) -> SVD:
    """Compute the leading singular triplets of left @ right^T without forming the product.

    Args:
        left: Shape (m, k), float32.
        right: Shape (n, k), float32.
        rank: Number of triplets kept; 1 <= rank <= k.

    Returns:
        SVD in float32. The k x k core is decomposed in float64.
    """
    Q_left, R_left = torch.linalg.qr(left)
    Q_right, R_right = torch.linalg.qr(right)
    U, S, Vh = torch.linalg.svd(R_left.double() @ R_right.double().T)
    return SVD(Q_left @ U[:, :rank].float(), S[:rank].float(), Q_right @ Vh[:rank].T.float())
