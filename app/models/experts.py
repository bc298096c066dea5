"""PEFT's layout of what it adapts without a linear layer: fused experts of a mixture, and routers.

transformers holds the experts of a layer in one parameter, (experts, m, n) or, where the module says
`is_transposed`, (experts, n, m); a router is (m, n). PEFT's `ParamWrapper` stacks the experts' factors: lora_A
(experts * r, n) has its rows expert by expert, lora_B (m, r * experts) its columns in turn.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from peft.tuners.lora import ParamWrapper
from torch import Tensor, nn


class FusedParameter(NamedTuple):
    """A parameter that PEFT adapts, as `module.name`."""

    module: nn.Module
    name: str

    def matrices(self, fused: Tensor) -> Tensor:
        """View the parameter, or its gradient, as each expert's W: (experts, m, n), a router's (1, m, n)."""
        if fused.ndim == 2:
            return fused[None]
        return fused.mT if getattr(self.module, "is_transposed", False) else fused


def fused_parameter(layer: object) -> FusedParameter | None:
    """Return what a layer of PEFT's adapts if that is a parameter; None for a layer around a module."""
    if not isinstance(layer, ParamWrapper):
        return None
    return FusedParameter(layer.get_base_layer(), layer.parameter_name)


def number_of_experts(layer: object) -> int:
    """Return how many experts' factors a layer of PEFT's has."""
    return layer.num_experts if isinstance(layer, ParamWrapper) else 1


def split_rows(lora_A: Tensor, experts: int) -> Sequence[Tensor]:
    """View a stacked lora_A (experts * r, n) as each expert's (r, n)."""
    return lora_A.unflatten(0, (experts, -1)).unbind()


def split_columns(lora_B: Tensor, experts: int) -> Sequence[Tensor]:
    """View a stacked lora_B (m, r * experts) as each expert's (m, r)."""
    return lora_B.unflatten(1, (-1, experts)).unbind(-1)


def stack_rows(lora_A: Sequence[Tensor]) -> Tensor:
    """Undo `split_rows`."""
    return torch.cat(list(lora_A))


def stack_columns(lora_B: Sequence[Tensor]) -> Tensor:
    """Undo `split_columns`."""
    return torch.stack(list(lora_B), dim=-1).flatten(1)
