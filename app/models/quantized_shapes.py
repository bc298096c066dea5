"""The codes of a quantised model without content: on the meta device, and in torch's FakeTensorMode."""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from app.models.quantization import quantized_layers


def empty_codes(model: PreTrainedModel) -> None:
    """Give bitsandbytes' layers of a model on the meta device codes and scales in their final shapes."""
    layers = [module for _, module in quantized_layers(model)]
    if not layers:  # the codes are another library's
        return
    import bitsandbytes as bnb

    with torch.device("cpu"):
        # The first call makes the table of values that all others use, which must not be an empty one.
        bnb.functional.quantize_blockwise(torch.zeros(1))
    for module in layers:
        codes, state = _quantized_empty(module, "meta")
        if isinstance(module, bnb.nn.Linear4bit):
            old: Any = module.weight
            if state.nested:
                state.offset = torch.zeros((), device="cpu")  # a state_dict looks at the number
            module.weight = bnb.nn.Params4bit(
                codes,
                quant_state=state,
                compress_statistics=old.compress_statistics,
                quant_type=old.quant_type,
                bnb_quantized=True,
                module=module,
            )
            module.quant_state = state
        else:
            module.weight = bnb.nn.Int8Params(codes, requires_grad=False, CB=codes, SCB=state)


def fake_codes(model: nn.Module) -> None:
    """Give bitsandbytes' layers codes and scales without content, in torch's FakeTensorMode.

    Its parameters are subclasses of tensors, which fake tensors cannot be.
    """
    for _, module in quantized_layers(model):
        codes, state = _quantized_empty(module, "cpu")
        weight: Any = nn.Parameter(codes, requires_grad=False)
        if hasattr(module, "quant_state"):
            from bitsandbytes.functional import dequantize_4bit

            weight.quant_state = state
            # PEFT's DoRA goes by the class of the parameter, or by these two.
            module.W_q, module.dequantize = None, partial(dequantize_4bit, codes, state)
        else:
            weight.CB = None
            module.state.CB, module.state.SCB = codes, state
            module.state.threshold = 0.0  # outliers are found by looking at numbers
        module.weight = weight


def _quantized_empty(module: Any, device: str) -> tuple[Tensor, Any]:
    """Quantise a layer's weight without content: codes, and their quantisation state or one scale a row."""
    from bitsandbytes import functional

    shape = (module.out_features, module.in_features)
    if hasattr(module, "quant_state"):
        weight = torch.empty(shape, dtype=torch.float32, device=device)
        state = module.quant_state  # None at first
        return functional.quantize_4bit(
            weight,
            blocksize=state.blocksize if state else module.weight.blocksize,
            compress_statistics=state.nested if state else module.weight.compress_statistics,
            quant_type=state.quant_type if state else module.weight.quant_type,
            quant_storage=module.quant_storage,
        )
    weight = torch.empty(shape, dtype=torch.float16, device=device)
    codes, rows, _ = functional.int8_vectorwise_quant(weight)
    return codes, rows
