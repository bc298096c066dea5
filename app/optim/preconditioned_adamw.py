"""AdamW on preconditioned LoRA gradients."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from app.optim.lora_pairs import LoraPairAdamW, check_pairs, set_gradients, split_experts
from app.optim.preconditioner import Cache, precondition_pairs


class PreconditionedAdamW(LoraPairAdamW):
    """AdamW whose moments see the preconditioned gradients of LoRA pairs.

        P_A = (lora_B^T lora_B + lambda I)^-1 grad_A
        P_B = grad_B (lora_A lora_A^T + lambda I)^-1           then AdamW on P_A and P_B
        lambda = damping + relative_damping * mean eigenvalue of the Gram matrix beside it

    A parameter group with `lora_pairs: True` lists its parameters as lora_A_0, lora_B_0, lora_A_1,
    lora_B_1, ..., and under `experts` the number of experts that are stacked in each pair, which are pairs of
    their own (`split_experts`); any other group is plain AdamW, bit for bit. `.grad` holds the raw gradient
    before and after a step. A factor without a gradient (frozen, or unused in this step) is left
    alone and still preconditions its partner.

    Args:
        params: Parameters or groups, as torch's optimizers take them.
        lr: Step size; also per group.
        betas: Decay rates of the first and second moment; also per group.
        eps: Added to the root of the second moment; also per group.
        weight_decay: Decoupled weight decay, per unit of lr; also per group.
        damping: Number added to the diagonal of each r x r Gram matrix, >= 0; also per group. Its
            unit is that of squared factor entries summed over n (or m), so the best value depends
            on the task. Where it is far above the Gram matrix, the step is plain AdamW's. Note
            that Lightning's `gradient_clip_val` clips the raw gradients: it works inside the
            closure, before the preconditioning.
        relative_damping: Multiple of each Gram matrix's own mean eigenvalue, its trace / r, that is added
            to its diagonal beside damping, >= 0; also per group; null adds none. Without a unit: 0.01 damps
            directions whose eigenvalue is below a hundredth of the mean, whatever the size of the factors. A
            Gram matrix that is zero (LoRA's lora_B at first, whose grad_A is zero too) has only damping,
            which must be > 0.
        foreach: As in torch.
        fused: As in torch; by default a group on CPU or CUDA uses the fused kernel unless
            `foreach` is given. Under float16 scaling, `fused=True` leaves the unscaling to the
            kernel (the preconditioning is linear, so the scale passes through), and Lightning then
            refuses to clip; the default lets the scaler divide first, so that clipping works.

    Raises:
        ValueError: A `lora_pairs` group is not made of matching pairs, damping or relative_damping is
            negative, or relative_damping is given and damping is 0.

    Source: arXiv:2402.02347, arXiv:2502.01235 eq. 9. Differs from the authors' code: torch's bias
    correction (they have none, so their first step is 3.16 lr), both factors preconditioned by the
    old values, weight decay before the update, eps 1e-8 as in LoRA-One, damping in units of the Gram
    matrices.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        damping: float = 1e-6,
        relative_damping: float | None = None,
        *,
        foreach: bool | None = None,
        fused: bool | None = None,
    ) -> None:
        self._damping = {"damping": damping, "relative_damping": relative_damping}
        self._caches: dict[int, tuple[Any, Cache]] = {}
        super().__init__(params, lr, betas, eps, weight_decay, foreach=foreach, fused=fused)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:  # of an earlier version's state
            group.setdefault("relative_damping", None)
        self._caches = {}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as in torch; raise ValueError if the class's conditions do not hold."""
        if "damping" not in self.defaults:  # torch writes the defaults anew in its constructor
            self.defaults.update(lora_pairs=False, **self._damping)
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            _check_damping(group["damping"], group["relative_damping"])
            if group["lora_pairs"]:
                check_pairs(group["params"])
        except ValueError:
            self.param_groups.pop()
            raise
        if group["fused"] is None and group["foreach"] is None:
            # None lets torch choose between foreach and a loop.
            group["fused"] = all(map(_suits_fused, group["params"])) or None

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state, as in torch; raise ValueError if its groups are not the same pairs."""
        saved = [bool(group.get("lora_pairs")) for group in state_dict["param_groups"]]
        expected = [bool(group["lora_pairs"]) for group in self.param_groups]
        if saved != expected:
            raise ValueError(
                f"the optimizer state has lora_pairs {saved} in its groups, expected {expected}: "
                "another optimizer or grouping of the parameters saved it"
            )
        super().load_state_dict(state_dict)

    def replace_gradients(self, index: int, group: dict[str, Any]) -> None:
        """Precondition the gradients of a group.

        Raises:
            RuntimeError: damping is 0 and a Gram matrix is singular; every parameter is as it was.
        """
        _, _, lora_A, lora_B, grad_A, grad_B = map(list, zip(*split_experts(group), strict=True))
        state = [g if g is None else (g.dtype, g.device) for g in grad_A + grad_B]
        if index not in self._caches or self._caches[index][0] != state:
            self._caches[index] = (state, {})
        damping, relative = group["damping"], group["relative_damping"] or 0.0
        set_gradients(
            group,
            *precondition_pairs(
                lora_A, lora_B, grad_A, grad_B, damping, self._caches[index][1], relative
            ),
        )


def _check_damping(damping: float, relative: float | None) -> None:
    for name, value in (("damping", damping), ("relative_damping", relative or 0.0)):
        if not value >= 0:
            raise ValueError(f"{name} must be >= 0, got {value}")
    if relative and damping == 0:
        raise ValueError(
            f"relative_damping is {relative}, but damping is 0: set damping > 0, which is what is left where a "
            "Gram matrix is zero (LoRA's lora_B at first)"
        )


def _suits_fused(p: Tensor) -> bool:
    """Return whether the fused kernel takes a parameter (no subclass such as DTensor)."""
    plain = type(p) in (Tensor, torch.nn.Parameter) and p.is_floating_point()
    return plain and p.device.type in ("cpu", "cuda")
