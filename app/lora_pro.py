"""LoRA-Pro's adjusted gradients: those whose step in weight space is closest to the full gradient's.

Batched over P pairs of equal shape: lora_A (P, r, n), lora_B (P, m, r), their gradients alike, G (P, m, n) the
gradient of the weight, which nobody needs to know: grad_A = s lora_B^T G and grad_B = s G lora_A^T, with s
the scaling, hold all of it that matters.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from app.precondition import damped_inverse


class Adjusted(NamedTuple):
    """Adjusted gradients of lora_A (P, r, n) and lora_B (P, m, r), in the factors' dtype."""

    lora_A: Tensor
    lora_B: Tensor


def adjusted_gradients(
    lora_A: Tensor,
    lora_B: Tensor,
    grad_A: Tensor,
    grad_B: Tensor,
    scaling: Tensor,
    damping: float,
) -> Adjusted:
    """Adjust raw gradients so that the weight's step is the closest to the full gradient.

        adj_A = s^-2 (B^T B)^-1 grad_A + X A
        adj_B = s^-2 (I - B (B^T B)^-1 B^T) grad_B (A A^T)^-1 - B X

    minimise |s (lora_B adj_A + adj_B lora_A) - G|_F for any X (r, r); the X taken is that which keeps
    both closest to the raw gradients, the solution of the Sylvester equation

        B^T B X + X A A^T = -s^-2 (B^T B)^-1 grad_A A^T

    by the eigenvectors of both Gram matrices. Where lora_B is 0, as at LoRA's start, adj_A is 0.

    Args:
        lora_A: (P, r, n).
        lora_B: (P, m, r).
        grad_A: Like lora_A.
        grad_B: Like lora_B.
        scaling: (P,) factor of lora_B @ lora_A in the forward pass.
        damping: Number added to the diagonals of the Gram matrices that are inverted, > 0.

    Returns:
        Adjusted. All is done in float64: where lora_B is nearly of lower rank, the inverse of its Gram matrix
        multiplies the rounding of every product by the condition number, and float32 loses all digits.

    Source: arXiv:2407.18242, Theorems 2.1 and 2.3; repository mrflogs/LoRA-Pro for the damping. Differs: the
        reference treats the first step of lora_B = 0 apart, with the same result.
    """
    A, B, g_A, g_B = (tensor.double() for tensor in (lora_A, lora_B, grad_A, grad_B))
    gram_A, gram_B = A @ A.mT, B.mT @ B
    inverse_A, inverse_B = (damped_inverse(gram, damping)[0] for gram in (gram_A, gram_B))
    shrink = scaling.double().square().reciprocal()[:, None, None]
    least_A = shrink * (inverse_B @ g_A)
    outside = g_B - B @ (inverse_B @ (B.mT @ g_B))
    X = solve_sylvester(gram_B, gram_A, -least_A @ A.mT)
    adj_A = least_A + X @ A
    adj_B = shrink * (outside @ inverse_A) - B @ X
    return Adjusted(adj_A.to(lora_A.dtype), adj_B.to(lora_B.dtype))


def solve_sylvester(left: Tensor, right: Tensor, target: Tensor) -> Tensor:
    """Solve left X + X right = target for symmetric positive semi-definite left and right.

        left = Q D Q^T, right = R E R^T:    X = Q ((Q^T target R) / (D_i + E_j)) R^T

    Args:
        left: (P, r, r).
        right: (P, r, r).
        target: (P, r, r).

    Returns:
        X (P, r, r); 0 along pairs of eigenvectors for which both eigenvalues are 0.
    """
    D, Q = torch.linalg.eigh(left)
    E, R = torch.linalg.eigh(right)
    sums = D.clamp(min=0)[:, :, None] + E.clamp(min=0)[:, None, :]
    rotated = Q.mT @ target @ R
    return Q @ torch.where(sums > 0, rotated / sums, 0) @ R.mT
