"""Truncated SVDs of gradients, and the factors that LoRA-One and LoRA-GA make of them."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

_DIRECT_SVD_BELOW = 192  # a matrix whose smaller side is below this takes milliseconds
_ROUNDS = 24  # of subspace iteration at most


class SVD(NamedTuple):
    """The leading singular triplets of a matrix: U (m, k), S (k,) descending, V (n, k)."""

    U: Tensor
    S: Tensor
    V: Tensor


def fix_signs(svd: SVD) -> SVD:
    """Flip singular pairs so that the largest entry of each column of U is positive.

    Singular vectors are unique only up to a common sign; with this rule equal gradients give equal
    factors on every process, device and library.
    """
    rows = svd.U.abs().argmax(dim=0, keepdim=True)
    signs = torch.where(svd.U.gather(0, rows) < 0, -1.0, 1.0).to(svd.U.dtype)
    return SVD(svd.U * signs, svd.S, svd.V * signs)


@contextmanager
def full_float32() -> Iterator[None]:
    """Multiply float32 matrices in float32, also where the run lets them be rounded to TF32 or bfloat16."""
    backends = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    held = [backend.fp32_precision for backend in backends]
    for backend in backends:
        backend.fp32_precision = "ieee"
    try:
        yield
    finally:
        for backend, precision in zip(backends, held, strict=True):
            backend.fp32_precision = precision


@full_float32()
def truncated_svd(matrix: Tensor, rank: int) -> SVD:
    """Compute the leading `rank` singular triplets of a dense matrix.

        matrix ~ U diag(S) V^T, the best rank-`rank` approximation

    Matrices whose smaller side is at most 192 or 4 rank are decomposed directly in float64. Larger ones go
    through subspace iteration with oversampling, which stops when the residuals |matrix v_i - s_i u_i| of the
    kept triplets fall to float32 rounding (1e-6 of s_1), or after 24 rounds. Where the spectrum is flat, the
    triplets are then those of a matrix that differs from the given one by the residuals; the other half,
    matrix^T u_i = s_i v_i, holds always. That residuals rise is no reason to stop: while the leading vectors
    emerge from a flat rest, whose vectors are singular ones too, they do.

    Args:
        matrix: Shape (m, n), any float dtype and device. Not modified.
        rank: Number of triplets kept; 1 <= rank <= min(m, n).

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
        return fix_signs(_subspace_iteration(matrix.float(), rank, width))
    U, S, Vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    return fix_signs(SVD(U[:, :rank].to(dtype), S[:rank].to(dtype), Vh[:rank].T.to(dtype)))


def _subspace_iteration(matrix: Tensor, rank: int, width: int) -> SVD:
    generator = torch.Generator(matrix.device).manual_seed(0)
    basis = torch.randn(
        matrix.shape[1], width, generator=generator, device=matrix.device, dtype=matrix.dtype
    )
    for _ in range(_ROUNDS):
        left = torch.linalg.qr(matrix @ torch.linalg.qr(basis)[0])[0]
        basis = matrix.T @ left
        svd = low_rank_svd(left, basis, rank)
        # matrix^T u_i = s_i v_i holds by construction; the other half says whether u_i has settled.
        residuals = (matrix @ svd.V - svd.U * svd.S).norm(dim=0)
        if bool((residuals <= 1e-6 * svd.S[0] + torch.finfo(matrix.dtype).tiny).all()):
            break
    return svd


def low_rank_svd(left: Tensor, right: Tensor, rank: int) -> SVD:
    """Compute the leading singular triplets of left (m, k) @ right^T (k, n), without forming the product.

    All is float32; only the k x k core is decomposed in float64. 1 <= rank <= k.
    """
    Q_left, R_left = torch.linalg.qr(left)
    Q_right, R_right = torch.linalg.qr(right)
    U, S, Vh = torch.linalg.svd(R_left.double() @ R_right.double().T)
    return SVD(Q_left @ U[:, :rank].float(), S[:rank].float(), Q_right @ Vh[:rank].T.float())


class LoraFactors(NamedTuple):
    """lora_A (r, n) and lora_B (m, r) of a new adapter, float32 (float64 from a float64 gradient)."""

    lora_A: Tensor
    lora_B: Tensor


def common_unit(gradients: Iterable[SVD]) -> float:
    """Return the largest singular value of several layers, the `unit` of `spectral_factors` that they share."""
    return max((float(gradient.S[0]) for gradient in gradients), default=1.0)


def unit_of(gradients: Iterable[SVD], scale: str) -> float | None:
    """Return the `unit` of `spectral_factors` for a scale: that of all layers if `global`, else None."""
    return common_unit(gradients) if scale == "global" else None


def spectral_factors(gradient: SVD, gamma: float, unit: float | None = None) -> LoraFactors:
    """Compute LoRA-One's factors from the leading triplets of a gradient.

        U S V^T = SVD(-G)
        lora_B = gamma^(-1/2) U diag(S / S_1)^(1/2)
        lora_A = gamma^(-1/2) diag(S / S_1)^(1/2) V^T

    so that lora_B @ lora_A is the best rank-r approximation of -G, scaled to spectral norm 1 / gamma;
    or, with a `unit` in the place of S_1, that approximation divided by gamma * unit.

    Args:
        gradient: Leading r triplets of +G, S_1 > 0. U (m, r), S (r,), V (n, r).
        gamma: Divisor of lora_B @ lora_A, dimensionless, > 0; larger means a smaller first step.
        unit: Divides S. None is the layer's own S_1, as in Algorithm 1; `common_unit` makes the factors of all
            layers one gradient step with one step size; 1 keeps the gradient's own size: the initialization of
            the paper's theorems, with gamma 1 (linear model) or 1/2 (ReLU).

    Returns:
        LoraFactors in the gradient's dtype.

    Raises:
        ValueError: If gamma or unit <= 0, or S_1 is zero or not finite.

    Source: arXiv:2502.01235, Algorithm 1, and eq. 8 for a unit of 1. The paper's gamma is 1 / gamma
    here; ours is the authors' `stable_gamma`. The paper writes W as input x output, so its A is lora_A^T
    and its B is lora_B^T.
    """
    if not gamma > 0:
        raise ValueError(f"gamma must be > 0, got {gamma}")
    if unit is not None and not unit > 0:
        raise ValueError(f"unit must be > 0, got {unit}")
    top = float(gradient.S[0])
    if not 0 < top < float("inf"):
        raise ValueError(
            f"the gradient's largest singular value must be positive and finite, got {top}"
        )
    root = (gradient.S.double() / (top if unit is None else unit) / gamma).sqrt()
    lora_B = -gradient.U.double() * root
    lora_A = root[:, None] * gradient.V.double().T
    return LoraFactors(lora_A.to(gradient.S.dtype), lora_B.to(gradient.S.dtype))


def lora_ga_factors(gradient: SVD, rank: int, gamma: float) -> tuple[Tensor, Tensor]:
    """Compute LoRA-GA's lora_A (r, n) and lora_B (m, r) from the leading triplets of a gradient.

    Args:
        gradient: Leading 2r triplets or more: U (m, k), S (k,), V (n, k).
        rank: r.
        gamma: Divisor of lora_B @ lora_A.
    """
    scale = gradient.U.shape[0] ** 0.25 / gamma**0.5
    return scale * gradient.V[:, :rank].T, scale * gradient.U[:, rank : 2 * rank]


def lora_sb_factors(signs: SVD, rate: float, scaling: float) -> LoraFactors:
    """Compute LoRA-SB's factors from the leading triplets of the signs of a gradient.

        U S V^T = SVD(-rate sign(G)),    scaling * lora_B = U diag(S),    lora_A = V^T

    the best rank-r approximation of the first AdamW step of full fine-tuning.

    Args:
        signs: Leading r triplets of sign(G): U (m, r), S (r,), V (n, r).
        rate: Learning rate of that step, > 0.
        scaling: Factor of lora_B @ lora_A in the forward pass.

    Source: arXiv:2411.19557; repository CERT-Lab/lora-sb (`find_and_initialize_grad`, with R = diag(S)).
    """
    return LoraFactors(signs.V.T, -rate / scaling * signs.U * signs.S)
