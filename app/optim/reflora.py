"""RefLoRA: AdamW on the gradients of the balanced factorization of each LoRA product.

Batched over P pairs of equal shape: lora_A (P, r, n), lora_B (P, m, r).
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from app.optim.lora_pairs import LoraPairAdamW, alike, set_gradients, split_experts

_EPSILON = torch.finfo(torch.float32).eps
"""Added, as in the authors' code, to roots of eigenvalues that are divided by."""


class Balance(NamedTuple):
    """S and its inverse of P pairs, both (P, r, r) and float64."""

    S: Tensor
    inverse: Tensor


def balance(lora_A: Tensor, lora_B: Tensor) -> Balance:
    """Find the symmetric S that balances pairs: the geometric mean of (A A^T)^-1 and B^T B.

        S = K^-1 (K B^T B K)^(1/2) K^-1,    K = (A A^T)^(1/2),    so that S A A^T S = B^T B

    With any P for which P P^T = S, the factors P^T A and B P^-T have the same product and equal Gram matrices.
    A gradient step on those is, in the weight, a step on A with S^-1 grad_A and on B with grad_B S.

    Args:
        lora_A: (P, r, n).
        lora_B: (P, m, r).

    Returns:
        Balance. Where lora_B is 0 there is no product to factorize, and both are the identity.

    Source: arXiv:2505.18877, Theorem 3; repository zhangyilang/RefLoRA (`Refactorer.dummy_step`), which has the
        same S by the same two eigendecompositions. Differs: float64 in place of float32, in which an eigenvalue
        of a Gram matrix is lost below 1e-7 of the largest, or is negative and has no root; the identity where
        lora_B is 0, where the reference makes every gradient 0.
    """
    A, B = lora_A.double(), lora_B.double()
    root, inverse_root = _roots(A @ A.mT)
    middle, inverse_middle = _roots(root @ (B.mT @ B) @ root)
    eye = torch.eye(A.shape[-2], dtype=A.dtype, device=A.device)
    zero = (B == 0).all(dim=(-2, -1))[:, None, None]
    S = torch.where(zero, eye, inverse_root @ middle @ inverse_root)
    inverse = torch.where(zero, eye, root @ inverse_middle @ root)
    return Balance(S, inverse)


def _roots(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Return the root of positive semi-definite matrices (P, r, r), and the inverse of the root."""
    eigenvalues, Q = torch.linalg.eigh(gram)
    root = eigenvalues.clamp(min=0).sqrt()[:, None, :]
    return (Q * root) @ Q.mT, (Q / (root + _EPSILON)) @ Q.mT


class RefLoraAdamW(LoraPairAdamW):
    """AdamW whose moments see the gradients of balanced LoRA factors, in the place of those of the factors.

        P_A = S^-1 grad_A,    P_B = grad_B S            S from `balance`; then AdamW on P_A and P_B

    A gradient step with these changes the product alike however it is factorized. The first `warmup_steps`
    steps of a pair are plain AdamW: LoRA's lora_B = 0 has to grow first. A parameter group with
    `lora_pairs: True` lists lora_A_0, lora_B_0, lora_A_1, ..., and under `experts` the number of experts that
    are stacked in each pair, which are pairs of their own (`split_experts`); any other group is plain AdamW.
    `.grad` holds the raw gradient before and after a step. A pair with one gradient has it raw.

    Args:
        params: Parameters or groups, as torch's optimizers take them.
        lr: Step size; also per group.
        betas: Decay rates of the first and second moment; also per group.
        eps: Added to the root of the second moment; also per group.
        weight_decay: Decoupled weight decay, per unit of lr; also per group.
        warmup_steps: Steps of each pair that are plain AdamW's, >= 0.

    Raises:
        ValueError: A `lora_pairs` group is not made of matching pairs, or warmup_steps is negative.

    Source: arXiv:2505.18877, Theorem 6; repository zhangyilang/RefLoRA, which does this in a hook before
        AdamW's step, with `warmup_steps=100` in its commands. Differs: see `balance`.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        warmup_steps: int = 100,
    ) -> None:
        if not warmup_steps >= 0:
            raise ValueError(f"warmup_steps must be >= 0, got {warmup_steps}")
        self.warmup_steps = warmup_steps
        super().__init__(params, lr, betas, eps, weight_decay)

    def replace_gradients(self, index: int, group: dict[str, Any]) -> None:
        """Balance the gradients of the pairs of a group that are past their warm-up."""
        experts = split_experts(group)
        grad_A, grad_B = [e.grad_A for e in experts], [e.grad_B for e in experts]
        for places in alike(experts):
            warm = [i for i in places if self._steps(group, experts[i].pair) >= self.warmup_steps]
            if not warm:
                continue
            S, inverse = balance(
                torch.stack([experts[i].lora_A for i in warm]),
                torch.stack([experts[i].lora_B for i in warm]),
            )
            for i, S_i, inverse_i in zip(warm, S, inverse, strict=True):
                g_A, g_B = grad_A[i], grad_B[i]
                assert g_A is not None  # by `alike`
                assert g_B is not None
                grad_A[i] = (inverse_i @ g_A.double()).to(g_A.dtype)
                grad_B[i] = (g_B.double() @ S_i).to(g_B.dtype)
        set_gradients(group, grad_A, grad_B)

    def _steps(self, group: dict[str, Any], pair: int) -> int:
        """Return how many steps AdamW has made with a pair of a group."""
        state = self.state.get(group["params"][2 * pair + 1], {})
        return int(state.get("step", 0))
