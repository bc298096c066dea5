"""AdamW with a larger learning rate for lora_B."""

from collections.abc import Iterable
from typing import Any

import torch

from app.optim.lora_pairs import check_pairs


class LoraPlusAdamW(torch.optim.AdamW):
    """AdamW whose lora_B learn `lr_ratio` times as fast as lora_A.

    A parameter group with `lora_pairs: True`, which lists lora_A_0, lora_B_0, lora_A_1, ..., becomes two: every
    lora_A at lr, and every lora_B at lr_ratio * lr. Schedulers scale both, so that the ratio stays.
    In other groups vectors (biases, DoRA's magnitudes) have lr_ratio * lr and no weight decay, the rest lr.

    Args:
        params: Parameters or groups, as torch's optimizers take them.
        lr: Step size of lora_A; also per group.
        lr_ratio: Learning rate of lora_B over that of lora_A, > 0.
        betas: Decay rates of the first and second moment; also per group.
        eps: Added to the root of the second moment; also per group.
        weight_decay: Decoupled weight decay, per unit of lr; also per group.

    Raises:
        ValueError: A `lora_pairs` group is not made of matching pairs, or lr_ratio is not positive.

    Source: arXiv:2402.12354; repository nikhil-ghosh-berkeley/loraplus for the vectors. Differs: embeddings,
        which the reference gives a rate of their own, are never adapted here; lr_ratio 16 is the default of
        the comparisons, the reference has none.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        lr_ratio: float = 16.0,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        if not lr_ratio > 0:
            raise ValueError(f"lr_ratio must be > 0, got {lr_ratio}")
        self.lr_ratio = lr_ratio
        super().__init__(params, lr, betas, eps, weight_decay)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as in torch, as one group for each learning rate."""
        params = param_group["params"]
        params = [params] if isinstance(params, torch.Tensor) else list(params)
        rest = {key: value for key, value in param_group.items() if key != "params"}
        if param_group.get("lora_pairs"):
            check_pairs(params)
            slow, fast = params[::2], params[1::2]
        else:
            slow = [p for p in params if p.ndim > 1]
            fast = [p for p in params if p.ndim <= 1]
        lr = rest.get("lr", self.defaults["lr"])
        if slow:
            super().add_param_group({**rest, "params": slow})
        if fast:
            faster = {**rest, "params": fast, "lr": lr * self.lr_ratio}
            if not param_group.get("lora_pairs"):
                faster["weight_decay"] = 0.0
            super().add_param_group(faster)
