"""Alignment metrics of LoRA pairs: spectra, principal angles, condition numbers. Pure mathematics."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from app.initialization.factors import SVD


class AlignmentMetrics(NamedTuple):
    """Metrics of P equal-shaped pairs, with Delta W = scaling * lora_B @ lora_A; all float64, on the CPU.

    What is undefined (the span of a factor or gradient that is zero, the condition of a singular matrix) is
    not a number or infinite.
    """

    singular_values: Tensor  # (P, r) of Delta W, descending
    norm: Tensor  # (P,) Frobenius norm of Delta W
    effective_rank: Tensor  # (P,) exp of the entropy of the singular values, 1 to r
    condition_A: Tensor  # (P,) of lora_A lora_A^T, which preconditions lora_B's gradient
    condition_B: Tensor  # (P,) of lora_B^T lora_B, which preconditions lora_A's gradient
    angle_A: Tensor  # (P,) degrees, largest principal angle of the span of lora_A^T and the reference's V
    angle_B: Tensor  # (P,) degrees, the same of the span of lora_B and the reference's U
    captured: Tensor  # (P,) share of the reference's energy in both spans, 0 to 1


def measure_alignment(
    lora_A: Sequence[Tensor], lora_B: Sequence[Tensor], scaling: float, reference: Sequence[SVD]
) -> AlignmentMetrics:
    """Compute the metrics of equal-shaped pairs against the leading triplets of their one-step gradients.

        lora_B = Q_B R_B,  lora_A^T = Q_A R_A        so that Delta W = Q_B (scaling R_B R_A^T) Q_A^T
        effective rank  = exp(-sum p ln p),           p = S / sum(S)
        angle_B         = arccos of the smallest singular value of Q_B^T U   (arcsin of the rest's largest)
        captured        = |Q_B^T U diag(S) V^T Q_A|_F^2 / |S|^2

    Only r x r matrices are decomposed, all pairs at once.

    Args:
        lora_A: P factors (r, n).
        lora_B: P factors (m, r).
        scaling: Factor of lora_B @ lora_A.
        reference: P decompositions with r triplets: U (m, r), S (r,), V (n, r).

    Source: principal angles after Bjoerck and Golub (1973), with the sine for small angles; effective
    rank after Roy and Vetterli (2007). The angles are those of the alignment theorems of
    arXiv:2502.01235 (Theorems 3.1 and 3.2): its B is lora_B^T, so `angle_B` is the one that is exactly zero
    after gradient descent's first step.
    """
    right = torch.stack([factor.detach().double().T for factor in lora_A])
    left = torch.stack([factor.detach().double() for factor in lora_B])
    U, S, V = (
        torch.stack([getattr(svd, name).to(left).double() for svd in reference]) for name in "USV"
    )
    Q_A, R_A = torch.linalg.qr(right)
    Q_B, R_B = torch.linalg.qr(left)
    values = scaling * torch.linalg.svdvals(R_B @ R_A.mT)
    share = values / values.sum(dim=1, keepdim=True)
    entropy = -torch.special.xlogy(share, share).sum(dim=1)
    core = (Q_B.mT @ U) * S[:, None, :] @ (V.mT @ Q_A)
    captured = core.square().sum(dim=(1, 2)) / S.square().sum(dim=1)
    captured[values[:, 0] == 0] = torch.nan
    metrics = AlignmentMetrics(
        values,
        values.norm(dim=1),
        entropy.exp(),
        _condition(R_A),
        _condition(R_B),
        _largest_angle(Q_A, V, R_A, S),
        _largest_angle(Q_B, U, R_B, S),
        captured,
    )
    return AlignmentMetrics(*(tensor.cpu() for tensor in metrics))


def _condition(triangular: Tensor) -> Tensor:
    """Return the condition of R^T R from R (P, r, r)."""
    values = torch.linalg.svdvals(triangular)
    return (values[:, 0] / values[:, -1]).square()


def _largest_angle(basis: Tensor, reference: Tensor, triangular: Tensor, S: Tensor) -> Tensor:
    """Return the largest principal angle in degrees between two orthonormal bases (P, m, r).

    Not a number where the factor (of which `triangular` is the R) or the gradient (S its values) is zero.
    """
    common = basis.mT @ reference
    cosine = torch.linalg.svdvals(common)[:, -1].clamp(max=1)
    # The cosine says nothing of angles below 1e-8; the sine says nothing of those near 90 degrees.
    sine = torch.linalg.matrix_norm(reference - basis @ common, ord=2).clamp(max=1)
    angle = torch.where(cosine < sine, cosine.arccos(), sine.arcsin()).rad2deg()
    angle[(triangular.flatten(1).abs().amax(dim=1) == 0) | (S[:, 0] == 0)] = torch.nan
    return angle
