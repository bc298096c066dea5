"""How far subspaces are from each other."""

import torch
from torch import Tensor


def leading_left(matrix: Tensor, k: int) -> Tensor:
    """Return the k leading left singular vectors (P, m, k) of matrices (P, m, n)."""
    return torch.linalg.svd(matrix, full_matrices=False)[0][..., :k]


def outside(space: Tensor, matrix: Tensor) -> Tensor:
    """Return the part of a matrix (P, m, k) outside of the span of orthonormal columns (P, m, j)."""
    return matrix - space @ (space.mT @ matrix)


def misalignment(space: Tensor, matrix: Tensor) -> Tensor:
    """Return the sine of the largest angle (P,) from a matrix's leading left space to a space.

        |U_perp(space)^T U_k(matrix)|_op,     k = min(columns of space, columns of matrix)

    Args:
        space: Orthonormal columns, shape (P, m, j).
        matrix: Shape (P, m, r): lora_B for the output side, lora_A^T for the input side.

    Source: arXiv:2502.01235, eqs. 6-7. Small angles keep their digits: nothing is subtracted from 1.
    """
    k = min(space.shape[-1], matrix.shape[-1])
    return spectral_norm(outside(space, leading_left(matrix, k)))


def spectral_norm(matrix: Tensor) -> Tensor:
    """Return the largest singular value (P,)."""
    return torch.linalg.matrix_norm(matrix, ord=2)


def frobenius(matrix: Tensor) -> Tensor:
    """Return the Frobenius norm (P,)."""
    return torch.linalg.matrix_norm(matrix)
