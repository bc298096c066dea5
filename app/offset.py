"""The frozen weight under an adapter, and a start taken off it."""

from typing import Any

import torch
from torch import Tensor

from app.adapters import LoraPair
from app.errors import InputError


def base_weight(pair: LoraPair) -> Tensor:
    """Return the frozen weight W (m, n) of a pair's layer, a view of it also where it is stored transposed."""
    layer: Any = pair.layer
    weight: Tensor = layer.get_base_layer().weight.detach()
    return weight.T if layer.fan_in_fan_out else weight


@torch.no_grad()
def offset_base(pair: LoraPair, lora_A: Tensor, lora_B: Tensor) -> None:
    """Subtract scaling * lora_B @ lora_A from the frozen weight, in place and in its dtype.

    Raises:
        InputError: If the weight is quantised: its codes are no numbers to subtract from.
    """
    weight = base_weight(pair)
    # Eight bits are codes that a scale belongs to, whatever torch calls their type.
    if not weight.is_floating_point() or weight.element_size() < 2:
        raise InputError(
            f"init takes a start off the weight of {pair.name}, but that is quantised ({weight.dtype}): use a "
            "model.name with weights that are not, or --config methods/lora_one.yaml, which keeps them"
        )
    # Always the same sums, rounded once: a resumed run subtracts before its model is moved to a GPU, and its
    # base has to be that of the interrupted run bit for bit.
    product = pair.scaling * lora_B.cpu().double() @ lora_A.cpu().double()
    weight.copy_((weight.cpu().double() - product).to(weight.dtype))
