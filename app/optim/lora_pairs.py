"""Base of the optimizers of LoRA pairs: AdamW on gradients that are replaced for the length of a step."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def check_pairs(params: Sequence[Tensor]) -> None:
    """Raise ValueError unless parameters are lora_A_0 (r, n), lora_B_0 (m, r), lora_A_1, ... in turn."""
    if len(params) % 2:
        raise ValueError(f"lora_pairs needs lora_A, lora_B in turn, got {len(params)} parameters")
    for i, (a, b) in enumerate(zip(params[::2], params[1::2], strict=True)):
        if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1]:
            raise ValueError(
                f"lora_pairs, pair {i}: expected lora_A (r, n) and lora_B (m, r), "
                f"got {tuple(a.shape)} and {tuple(b.shape)}"
            )


class LoraPairAdamW(torch.optim.AdamW):
    """AdamW that sees other gradients than the raw ones in groups with `lora_pairs: True`.

    `.grad` holds the raw gradient before and after a step.
    """

    def replace_gradients(self, index: int, group: dict[str, Any]) -> None:
        """Replace `.grad` of the parameters of a `lora_pairs` group; AdamW leaves those with None alone.

        `index` is the group's place in `param_groups`.
        """
        raise NotImplementedError

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Evaluate the closure once, replace the gradients it leaves, update the parameters.

        Returns what the closure returned. The raw gradients are back also after an error.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        raw = [(p, p.grad) for group in self.param_groups for p in group["params"]]
        try:
            for index, group in enumerate(self.param_groups):
                if group["lora_pairs"]:
                    self.replace_gradients(index, group)
            _adamw_step()(self)
        finally:
            for param, grad in raw:
                param.grad = grad
        return loss


def _adamw_step() -> Callable[[torch.optim.Optimizer], Any]:
    """Return AdamW's step without step hooks, which run around the step of the subclass already.

    torch wraps `step` of each class of which an optimizer is made in a function that runs the hooks
    (`Optimizer._patch_step_function`), AdamW's too once there is a plain AdamW. That function is known by its
    private mark `hooked`; a public step without hooks would replace this.
    """
    return inspect.unwrap(torch.optim.AdamW.step, stop=lambda f: not getattr(f, "hooked", False))
