"""Quantised base weights: made by bitsandbytes while a model is loaded, or found in a checkpoint.

bitsandbytes is optional, and imported only where a model has weights of its kinds.
"""

import importlib.metadata
import inspect
import logging
from collections.abc import Iterator
from typing import Any

import torch
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers import AutoHfQuantizer, HfQuantizer

from app.models.source import ModelSource
from app.utils.errors import InputError

OLDEST_BITSANDBYTES = (0, 50)
"""Before, the 4-bit kernels do not run on every CPU."""


def quantized_by(source: ModelSource, config: PreTrainedConfig) -> str | None:
    """Return the setting that makes a model's weights quantised ones; None where they are plain numbers."""
    if source.quantization is not None:
        return f"model.quantization {source.quantization}"
    given = getattr(config, "quantization_config", None)
    return None if given is None else f"quantization_config {_method(given)}"


def make_quantizer(
    source: ModelSource, config: PreTrainedConfig, dtype: torch.dtype
) -> HfQuantizer | None:
    """Make transformers' quantizer of a model, before any weights are read; None where they are plain numbers.

    Args:
        source: Of the model, whose checkpoint's weights may be quantised already.
        config: Of the checkpoint.
        dtype: Of the weights that are not quantised; layers of four bits compute in it.

    Raises:
        InputError: The weights are quantised already, or the installed libraries or devices lack the method.
    """
    name, given = source.quantization, getattr(config, "quantization_config", None)
    if name is not None and given is not None:
        raise InputError(
            f"model.quantization is {name}, but the weights of model.name {source.name!r} are quantised "
            f"already (quantization_config {_method(given)}): set model.quantization to null, which takes them "
            "as they are"
        )
    setting = quantized_by(source, config)
    if setting is None:
        return None
    if name is not None or "bitsandbytes" in setting:
        _check_bitsandbytes(setting)
    try:
        made = BitsAndBytesConfig(**bitsandbytes_arguments(name, str(dtype)[6:])) if name else None
        quantizer = AutoHfQuantizer.from_config(
            made or dict(given or {}), pre_quantized=made is None
        )
        quantizer.validate_environment()
    except (ImportError, RuntimeError, ValueError, TypeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise InputError(
            f"{setting} of model.name {source.name!r} does not work on this machine ({type(error).__name__}: "
            f"{reason}): install what it needs, use a machine that has it, or set model.name to a model whose "
            "weights are plain numbers, which --config models/nf4.yaml quantises while it is loaded"
        ) from error
    return quantizer


def _check_bitsandbytes(setting: str) -> None:
    try:
        version = importlib.metadata.version("bitsandbytes")
    except importlib.metadata.PackageNotFoundError:
        version = "not installed"
    numbers = tuple(int(part) for part in version.split(".")[:2] if part.isdecimal())
    if numbers < OLDEST_BITSANDBYTES:
        raise InputError(
            f"{setting} needs bitsandbytes {'.'.join(map(str, OLDEST_BITSANDBYTES))} or later, which is "
            f"{version}: pip install -r requirements-quantized.txt, or take weights that are plain numbers"
        )


def bitsandbytes_arguments(name: str, dtype: str) -> dict[str, Any]:
    """Return the arguments of transformers' BitsAndBytesConfig; the scales of NF4 are quantised once more.

    Args:
        name: "nf4" or "int8".
        dtype: In which layers of four bits compute.
    """
    if name == "int8":
        return {"load_in_8bit": True}
    return {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": name,
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": dtype,
    }


def check_dora(model: nn.Module, use_dora: bool) -> None:
    """Raise InputError for DoRA on weights of 8 bits, whose scales PEFT's DoRA loses on a CPU."""
    if use_dora and any(
        not hasattr(module, "quant_state") for _, module in quantized_layers(model)
    ):
        raise InputError(
            "model.adapter.use_dora does not work on weights of 8 bits, whose scales PEFT's DoRA loses: use "
            "--config models/nf4.yaml, or LoRA with model.adapter.use_dora false"
        )


def check_casts(model: nn.Module, name: str) -> None:
    """Raise InputError if a model casts the input of a 4-bit layer to the type of its codes, as Switch does.

    Args:
        model: Also on the meta device.
        name: `model.name`.
    """
    seen = set()
    for place, module in quantized_layers(model):
        parent, _, child = place.rpartition(".")
        owner = type(model.get_submodule(parent))
        if not hasattr(module, "quant_state") or (owner, child) in seen:
            continue
        seen.add((owner, child))
        if f".to(self.{child}.weight.dtype)" in inspect.getsource(owner.forward):
            raise InputError(
                f"4-bit weights of model.name {name!r} do not work: {owner.__name__} of transformers casts the "
                f"input of {place} to the type of its weight, which are codes. Use --config models/int8.yaml, "
                "or model.quantization null"
            )


def check_kernel(model: PreTrainedModel, name: str, device: torch.device) -> None:
    """Raise InputError if bitsandbytes gives rows of a model's lengths the scales of other rows.

    As it does on some CPUs where blocks of 64 numbers go across rows. A block of equal numbers is exact in four
    bits, so that a weight of such blocks has to come back as it was.

    Args:
        model: Also on the meta device.
        name: `model.name`.
        device: Where it is to be.
    """
    layers = {
        m.in_features: place for place, m in quantized_layers(model) if hasattr(m, "quant_state")
    }
    for n, place in layers.items():
        from bitsandbytes import functional

        W = torch.arange(n, device=device).repeat_interleave(64).view(64, n) + 1.0
        codes, state = functional.quantize_4bit(W, blocksize=64, quant_type="nf4")
        if not torch.allclose(functional.dequantize_4bit(codes, state), W):
            raise InputError(
                f"4-bit weights of model.name {name!r} do not work on this {device.type}: {place} has "
                f"rows of {n} numbers: bitsandbytes takes the scales of other rows where {n} is no multiple of "
                "64. Use --config models/int8.yaml, a GPU, or model.quantization null"
            )


def settle(model: PreTrainedModel) -> None:
    """Keep the layers of bitsandbytes from changing their weights, and from saying so at every call.

    In evaluation on a CPU with AVX512-BF16, a layer of four bits would repack its codes and compute in bfloat16
    from then on, without a gradient.
    """
    for _, module in quantized_layers(model):
        module.support_avx512bf16_for_cpu = False
    # The rounding of activations to float16 is told anew in each layer of each pass.
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)


def scales(model: nn.Module) -> list[Tensor]:
    """List the tensors beside the codes: scales of blocks or rows, their own scales, tables of values."""
    found: list[Tensor] = []
    for _, module in quantized_layers(model):
        state = getattr(module.weight, "quant_state", None)
        if state is None:
            rows = getattr(module.weight, "SCB", None)
            found += [module.state.SCB if rows is None else rows]
        else:
            states = [state, *([state.state2] if state.nested else [])]
            found += [s.absmax for s in states] + [s.code for s in states]
            found += [state.offset] if state.nested else []
    return found


def number_of_weights(model: nn.Module) -> tuple[int, int]:
    """Return how many numbers a model's parameters stand for, and how many of them are quantised."""
    layers = [module for _, module in quantized_layers(model)]
    quantized = sum(module.out_features * module.in_features for module in layers)
    codes = {id(module.weight) for module in layers}
    plain = sum(p.numel() for p in model.parameters() if id(p) not in codes)
    return plain + quantized, quantized


def round_parameters(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """Round a model's parameters to a dtype, and leave its buffers, such as rotary frequencies, as they are."""
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    return model


@torch.no_grad()
def dequantize(model: PreTrainedModel) -> PreTrainedModel:
    """Replace the layers of bitsandbytes by plain ones with the float32 values of their weights, in place.

    Returns:
        The same model, float32, as of a checkpoint that was never quantised.
    """
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is None:
        return model
    for place, module in list(quantized_layers(model)):
        transposed = issubclass(getattr(module, "source_cls", nn.Linear), Conv1D)
        m, n = module.out_features, module.in_features
        with torch.device("meta"):
            plain = Conv1D(m, n) if transposed else nn.Linear(n, m, bias=module.bias is not None)
        W = dequantize_module_weight(module).float()
        plain.weight = nn.Parameter(W.T.contiguous() if transposed else W)
        plain.bias = module.bias
        model.set_submodule(place, plain)
    quantizer.remove_quantization_config(model)
    # transformers would undo, in what is saved, how it has read codes.
    conversions: Any = [
        conversion
        for conversion in getattr(model, "_weight_conversions", None) or []
        if not any(
            "bitsandbytes" in type(op).__module__ for op in getattr(conversion, "operations", ())
        )
    ]
    model._weight_conversions = conversions
    for flag in ("is_loaded_in_4bit", "is_loaded_in_8bit"):
        setattr(model, flag, False)
    return model.float()


def quantized_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield the layers that bitsandbytes has quantised, by name."""
    for name, module in model.named_modules():
        # By its name, so that nothing is imported for a model without such layers.
        if type(module).__module__ == "bitsandbytes.nn.modules":
            yield name, module


def _method(given: Any) -> str:
    """Return the name of a checkpoint's method of quantisation."""
    values = given if isinstance(given, dict) else given.to_dict()
    kinds = (bits for bits in ("load_in_4bit", "load_in_8bit") if values.get(bits))
    return " ".join([str(values.get("quant_method", "bitsandbytes")).rpartition(".")[2], *kinds])
