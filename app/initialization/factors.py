"""The factors that each initialization gives a LoRA pair."""

from typing import NamedTuple

import torch
from torch import Tensor

from app.initialization.svd import SVD


class LoraFactors(NamedTuple):
    """A LoRA start: lora_A (r, n) and lora_B (m, r), float32 (float64 from a float64 gradient)."""

    lora_A: Tensor
    lora_B: Tensor


def spectral_factors(gradient: SVD, gamma: float, normalized: bool = True) -> LoraFactors:
    """Turn the leading triplets of a gradient into LoRA-One's start.

        U S V^T = SVD(-G)
        lora_B = gamma^(-1/2) U diag(S / S_1)^(1/2)
        lora_A = gamma^(-1/2) diag(S / S_1)^(1/2) V^T

    so that lora_B @ lora_A is the best rank-r approximation of -G, scaled to spectral norm 1 / gamma;
    or, with S in the place of S / S_1, divided by gamma.

    Args:
        gradient: Leading r triplets of +G, S_1 > 0. U (m, r), S (r,), V (n, r).
        gamma: Divisor of the start, dimensionless, > 0; larger means a smaller first step.
        normalized: Divide S by S_1, as Algorithm 1 does. False keeps the gradient's own size: the
            start of the paper's theorems, with gamma 1 (linear model) or 1/2 (ReLU).

    Returns:
        LoraFactors in the gradient's dtype.

    Raises:
        ValueError: If gamma <= 0, or S_1 is zero or not finite.

    Source: arXiv:2502.01235, Algorithm 1, and eq. 8 for `normalized=False`. The paper's gamma is 1 / gamma
    here; ours is the authors' `stable_gamma`. The paper writes W as input x output, so its A is lora_A^T
    and its B is lora_B^T.
    """
    if not gamma > 0:
        raise ValueError(f"gamma must be > 0, got {gamma}")
    top = float(gradient.S[0])
    if not 0 < top < float("inf"):
        raise ValueError(
            f"the gradient's largest singular value must be positive and finite, got {top}"
        )
    root = (gradient.S.double() / (top if normalized else 1.0) / gamma).sqrt()
    lora_B = -gradient.U.double() * root
    lora_A = root[:, None] * gradient.V.double().T
    return LoraFactors(lora_A.to(gradient.S.dtype), lora_B.to(gradient.S.dtype))


def lora_ga_factors(gradient: SVD, rank: int, gamma: float) -> tuple[Tensor, Tensor]:
    """Return LoRA-GA's lora_A (r, n) and lora_B (m, r).

    Args:
        gradient: Leading 2r triplets or more: U (m, k), S (k,), V (n, k).
        rank: r.
        gamma: Divisor of the start.
    """
    scale = gradient.U.shape[0] ** 0.25 / gamma**0.5
    return scale * gradient.V[:, :rank].T, scale * gradient.U[:, rank : 2 * rank]


def pissa_factors(
    W: Tensor, rank: int, scaling: float, niter: int | None = None
) -> tuple[Tensor, Tensor]:
    """Return PiSSA's lora_A (r, n) and lora_B (m, r) of a weight W (m, n), float32.

    Args:
        W: (m, n).
        rank: r.
        scaling: Factor of lora_B @ lora_A in the forward pass.
        niter: Power iterations of a randomised SVD, with a seed of its own; None takes the exact one.
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
