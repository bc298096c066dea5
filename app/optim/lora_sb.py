"""LoRA-SB: AdamW on the r x r matrix between the factors that a LoRA pair begins with."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from app.optim.lora_pairs import (
    Expert,
    LoraPairAdamW,
    set_gradients,
    split_experts,
    with_scaling,
)


class LoraSbAdamW(LoraPairAdamW):
    """AdamW on R in scaling * lora_B @ lora_A = U R lora_A, where lora_A and the basis U stay what they were.

        U: orthonormal basis (m, r) of lora_B's columns before the first step
        grad_R = U^T grad_B / scaling,    R <- AdamW(R, grad_R),    lora_B <- U R / scaling

    R (r, r) is held as lora_B, so that the adapter is LoRA's everywhere else; its moments are r x r, and U is
    the one large state. The factors must be LoraSbInit's, or such ones: lora_A with orthonormal rows, and
    lora_B not 0. A pair whose lora_B is 0 before the first step has no span and stays as it is.
    A parameter group with `lora_pairs: True` lists lora_A_0, lora_B_0, lora_A_1, ..., under `scaling` the
    scaling of each pair, and under `experts` the number of experts that are stacked in it, which are pairs of
    their own (`split_experts`). Any other group is plain AdamW. `.grad` holds the raw gradient before and after
    a step.

    Args:
        params: Parameters or groups, as torch's optimizers take them.
        lr: Step size; also per group.
        betas: Decay rates of the first and second moment; also per group.
        eps: Added to the root of the second moment; also per group.
        weight_decay: Decoupled weight decay, per unit of lr; also per group.

    Raises:
        ValueError: A `lora_pairs` group is not made of matching pairs or has no `scaling`.

    Source: arXiv:2411.19557; repository CERT-Lab/lora-sb. Differs: the reference puts R between the layers
        lora_A and lora_B as a module of its own, whose adapter is no plain LoRA, and sets lora_alpha to r; here
        R's step does not depend on the scaling and is that of the reference's scaling 1.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, lr, betas, eps, weight_decay)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as in torch; raise ValueError if its pairs or their scalings do not fit."""
        super().add_param_group(with_scaling(param_group))

    def replace_gradients(self, index: int, group: dict[str, Any]) -> None:
        """Take the whole step of a group's pairs, and leave AdamW none."""
        experts = split_experts(group)
        lr, keep = group["lr"], 1 - group["lr"] * group["weight_decay"]
        for pair in experts:
            if pair.grad_B is not None:
                U, scaling = self._basis(pair, group), group["scaling"][pair.pair]
                update = self.normalised(pair, U.T @ pair.grad_B / scaling, group)
                pair.lora_B.mul_(keep).sub_(U @ update, alpha=lr / scaling)
        nothing: list[Tensor | None] = [None] * len(experts)
        set_gradients(group, nothing, nothing)

    def _basis(self, pair: Expert, group: dict[str, Any]) -> Tensor:
        """Return U (m, r) of a pair: a state of the parameter lora_B, of stacked experts (experts, m, r)."""
        param = group["params"][2 * pair.pair + 1]
        state, (m, r) = self.state[param], pair.lora_B.shape
        if "basis" not in state:
            stacked = param.view(m, r, -1).movedim(-1, 0)
            basis = torch.linalg.qr(stacked).Q * stacked.any(dim=(1, 2))[:, None, None]
            state["basis"] = basis[0] if len(basis) == 1 else basis
        return state["basis"] if param.shape[1] == r else state["basis"][pair.number]
