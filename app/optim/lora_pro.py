"""LoRA-Pro: factor gradients that best imitate the full gradient, and AdamW on them.

Batched over P pairs of equal shape: lora_A (P, r, n), lora_B (P, m, r), their gradients alike, G (P, m, n) the
gradient of the weight, which nobody needs to know: grad_A = s lora_B^T G and grad_B = s G lora_A^T, with s
the scaling, hold all of it that matters.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from app.optim.lora_pairs import (
    Expert,
    LoraPairAdamW,
    alike,
    set_gradients,
    split_experts,
    with_scaling,
)
from app.optim.preconditioner import damped_inverse


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

    by the eigenvectors of both Gram matrices. Where lora_B is 0, as in LoRA's initialization, adj_A is 0.

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
    """Solve left X + X right = target, all (P, r, r), for symmetric positive semi-definite left and right.

        left = Q D Q^T, right = R E R^T:    X = Q ((Q^T target R) / (D_i + E_j)) R^T

    X is 0 along pairs of eigenvectors for which both eigenvalues are 0.
    """
    D, Q = torch.linalg.eigh(left)
    E, R = torch.linalg.eigh(right)
    sums = D.clamp(min=0)[:, :, None] + E.clamp(min=0)[:, None, :]
    rotated = Q.mT @ target @ R
    return Q @ torch.where(sums > 0, rotated / sums, 0) @ R.mT


class _Stack(NamedTuple):
    """Factors and raw gradients of P pairs of equal shape, and their scalings (P,)."""

    lora_A: Tensor
    lora_B: Tensor
    grad_A: Tensor
    grad_B: Tensor
    scaling: Tensor


class LoraProAdamW(LoraPairAdamW):
    """AdamW whose step in weight space is the closest to full fine-tuning's that LoRA factors can make.

    `full` keeps Adam's moments of the equivalent gradient in weight space, two (m, n) states a layer, and
    projects the normalised update back:

        G_eq = s (lora_B adj_A + adj_B lora_A)            m, v: moments of G_eq
        U    = (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps)
        lora_A, lora_B <- sqrt(1 - lr wd) (lora_A, lora_B) - lr adjusted(s lora_B^T U, s U lora_A^T)

    so that weight decay shrinks the product by 1 - lr wd. `efficient` is plain AdamW on adj_A and adj_B.
    A parameter group with `lora_pairs: True` lists lora_A_0, lora_B_0, lora_A_1, ..., under `scaling` the
    scaling of each pair, and under `experts` the number of experts that are stacked in it, which are pairs of
    their own (`split_experts`). Any other group is plain AdamW. `.grad` holds the raw gradient before and after
    a step. A pair of which a factor has no gradient is left alone.

    Args:
        params: Parameters or groups, as torch's optimizers take them.
        lr: Step size; also per group.
        betas: Decay rates of the first and second moment; also per group.
        eps: Added to the root of the second moment; also per group.
        weight_decay: Decoupled weight decay, per unit of lr; also per group.
        damping: Number added to the diagonals of the Gram matrices that are inverted, > 0.
        mode: `full` (the published results) or `efficient`.

    Raises:
        ValueError: A `lora_pairs` group is not made of matching pairs or has no `scaling`; damping is not
            positive; mode is unknown.

    Source: arXiv:2407.18242, Algorithm 1 (full) and its appendix (efficient); repository mrflogs/LoRA-Pro.
        Differs: moments are float32 (the reference keeps them in the weights' bfloat16, in which the second
        moment does not decay), and the scaling is the pair's (the reference has 16/8 written into it).
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        damping: float = 1e-8,
        mode: Literal["full", "efficient"] = "full",
    ) -> None:
        if not damping > 0:
            raise ValueError(f"damping must be > 0, got {damping}")
        if mode not in ("full", "efficient"):
            raise ValueError(f"mode must be full or efficient, got {mode!r}")
        self.damping = damping
        self.mode = mode
        super().__init__(params, lr, betas, eps, weight_decay)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as in torch; raise ValueError if its pairs or their scalings do not fit."""
        super().add_param_group(with_scaling(param_group))

    def replace_gradients(self, index: int, group: dict[str, Any]) -> None:
        """Adjust the gradients of a group; mode `full` takes the whole step and leaves AdamW none."""
        experts = split_experts(group)
        grad_A: list[Tensor | None] = [None] * len(experts)
        grad_B: list[Tensor | None] = [None] * len(experts)
        for places, stack in _stacks(experts, group["scaling"]):
            adjusted = adjusted_gradients(*stack, self.damping)
            if self.mode == "full":
                self._step_in_weight_space([experts[i] for i in places], stack, adjusted, group)
            else:
                for i, adj_A, adj_B in zip(places, *adjusted, strict=True):
                    grad_A[i], grad_B[i] = adj_A, adj_B
        set_gradients(group, grad_A, grad_B)

    def _step_in_weight_space(
        self, experts: list[Expert], stack: _Stack, adjusted: Adjusted, group: dict[str, Any]
    ) -> None:
        onto_A, onto_B = [], []
        for pair, adj_A, adj_B in zip(experts, *adjusted, strict=True):  # (m, n) matrices are large
            scaling = group["scaling"][pair.pair]
            equivalent = torch.cat([pair.lora_B, adj_B], dim=1) @ torch.cat([adj_A, pair.lora_A])
            update = self.normalised(pair, equivalent.mul_(scaling), group)
            onto_A.append(scaling * (pair.lora_B.T @ update))
            onto_B.append(scaling * (update @ pair.lora_A.T))
        projected = stack._replace(grad_A=torch.stack(onto_A), grad_B=torch.stack(onto_B))
        keep = (1 - group["lr"] * group["weight_decay"]) ** 0.5
        back = adjusted_gradients(*projected, self.damping)
        for pair, adj_A, adj_B in zip(experts, *back, strict=True):
            pair.lora_A.mul_(keep).add_(adj_A, alpha=-group["lr"])
            pair.lora_B.mul_(keep).add_(adj_B, alpha=-group["lr"])


def _stacks(
    experts: Sequence[Expert], scaling: Sequence[float]
) -> Iterator[tuple[list[int], _Stack]]:
    """Stack the pairs of `alike`; yield their places, too."""
    for places in alike(experts):
        pairs = [experts[i] for i in places]
        stack = _Stack(
            torch.stack([pair.lora_A for pair in pairs]),
            torch.stack([pair.lora_B for pair in pairs]),
            torch.stack([g for pair in pairs if (g := pair.grad_A) is not None]),
            torch.stack([g for pair in pairs if (g := pair.grad_B) is not None]),
            torch.tensor([scaling[pair.pair] for pair in pairs], device=pairs[0].lora_A.device),
        )
        yield places, stack
