"""The PEFT boundary: wrap a model, list its LoRA pairs, install factors, subtract them from the base.

Legend, here and everywhere: W (m, n) is a weight with m = out_features and n = in_features; r is the
rank; lora_A (r, n), lora_B (m, r); Delta W = scaling * lora_B @ lora_A. The LoRA-One paper writes W as
input x output, so its A is lora_A^T, its B is lora_B^T, and left and right singular spaces change places.
"""

import difflib
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from peft import AdaLoraConfig, LoraConfig, PeftModel, TaskType, get_peft_model
from peft.tuners.adalora import AdaLoraModel
from peft.tuners.adalora.layer import AdaLoraLayer
from peft.tuners.lora import LoraLayer
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from app.models.adapter_config import LoraSettings
from app.utils.errors import InputError

ADAPTER = "default"
"""PEFT's name of the adapter that is trained."""
UNKNOWN_STEPS = 10**9
"""Stands for the length of training, which AdaLoRA wants to know before there is a trainer."""


@dataclass(frozen=True)
class LoraPair:
    """One adapted layer.

    Attributes:
        name: The layer's name in the base model.
        layer: PEFT's wrapper, a map from (..., n) to (..., m).
        lora_A: Trainable (r, n).
        lora_B: Trainable (m, r).
        scaling: Factor of lora_B @ lora_A in the forward pass.
    """

    name: str
    layer: nn.Module
    lora_A: nn.Parameter
    lora_B: nn.Parameter
    scaling: float


def add_lora(model: PreTrainedModel, settings: LoraSettings) -> PeftModel:
    """Freeze a model and wrap its target layers with LoRA (lora_B = 0, lora_A random).

    Args:
        model: A causal or sequence-to-sequence language model.
        settings: The adapter.

    Returns:
        The PEFT model; adapters are float32 even where the base is not.

    Raises:
        InputError: If no module matches the targets, or r (AdaLoRA's init_r) exceeds a target's smaller side.
    """
    targets = settings.target_modules
    conv1d = any(isinstance(module, Conv1D) for module in model.modules())
    encodes = model.config.is_encoder_decoder
    options: dict[str, Any] = {
        "lora_alpha": settings.lora_alpha,
        "lora_dropout": settings.lora_dropout,
        "target_modules": targets,
        "fan_in_fan_out": conv1d,
        "task_type": TaskType.SEQ_2_SEQ_LM if encodes else TaskType.CAUSAL_LM,
    }
    config: LoraConfig
    if settings.adalora is None:
        own: dict[str, Any] = {
            "r": settings.r,
            "use_rslora": settings.use_rslora,
            "use_dora": settings.use_dora,
        }
        config = LoraConfig(**options, **own)
    else:
        budget = asdict(settings.adalora)
        config = AdaLoraConfig(**options, **budget, target_r=settings.r, total_step=UNKNOWN_STEPS)
    try:
        wrapped = get_peft_model(model, config)
    except ValueError as error:
        raise InputError(_no_target(model, targets, str(error))) from error
    setting, rank = "r", settings.r
    if settings.adalora is not None:
        setting, rank = "adalora.init_r", settings.adalora.init_r
    for name, module in wrapped.named_modules():
        if not isinstance(module, LoraLayer) or ADAPTER not in module.lora_A:
            continue
        shape: Any = module.out_features, module.in_features
        if rank > min(shape):
            raise InputError(
                f"model.adapter.{setting} is {rank}, but {name.removeprefix('base_model.model.')} has shape "
                f"{shape}: set model.adapter.{setting} to at most {min(shape)}, or leave the layer out of "
                "model.adapter.target_modules"
            )
    return wrapped


def _no_target(model: nn.Module, targets: str | list[str], reason: str) -> str:
    kinds = Counter(
        name.rpartition(".")[2]
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D))
    )
    wanted = [targets] if isinstance(targets, str) else targets
    close = {c for w in wanted for c in difflib.get_close_matches(w, kinds, n=2, cutoff=0.4)}
    hint = f"; did you mean {', '.join(sorted(close))}?" if close else ""
    listed = ", ".join(f"{kind} ({count})" for kind, count in sorted(kinds.items()))
    return (
        f"model.adapter.target_modules is {targets!r}, which fits no layer of this model{hint} "
        f"Its linear layers end in: {listed}. Set model.adapter.target_modules to some of these or to "
        f"all-linear. (PEFT: {reason.splitlines()[0]})"
    )


def base_model(model: nn.Module) -> PreTrainedModel:
    """Return the transformers model inside a PEFT model, or the model itself."""
    return model.get_base_model() if isinstance(model, PeftModel) else model  # type: ignore


def is_adapted(model: nn.Module) -> bool:
    """Return whether a model has an adapter of any kind."""
    return isinstance(model, PeftModel)


def adalora_tuner(model: nn.Module) -> Any:
    """Return PEFT's AdaLoRA around a model, with its allocator of ranks; None where there is none."""
    tuner = model.base_model if isinstance(model, PeftModel) else None
    return tuner if isinstance(tuner, AdaLoraModel) else None


def fsdp_incompatible_settings(model: nn.Module) -> list[str]:
    """Name the settings of a model's adapter that do not work where the base weights are sharded."""
    config = model.peft_config[ADAPTER] if isinstance(model, PeftModel) else None
    settings = {
        "use_dora": getattr(config, "use_dora", False),
        "adalora": isinstance(config, AdaLoraConfig),
    }
    return [name for name, on in settings.items() if on]


def lora_pairs(model: nn.Module) -> list[LoraPair]:
    """List the LoRA layers of a PEFT model in module order; empty for any other model, and for AdaLoRA."""
    pairs = []
    for name, module in model.named_modules():
        if isinstance(module, AdaLoraLayer):
            continue  # has triplets, not pairs
        if isinstance(module, LoraLayer) and ADAPTER in module.lora_A:
            pairs.append(
                LoraPair(
                    name=name.removeprefix("base_model.model."),
                    layer=module,  # type: ignore[arg-type]
                    lora_A=module.lora_A[ADAPTER].weight,  # type: ignore[arg-type]
                    lora_B=module.lora_B[ADAPTER].weight,  # type: ignore[arg-type]
                    scaling=module.scaling[ADAPTER],
                )
            )
    return pairs


@contextmanager
def without_adapters(model: nn.Module) -> Iterator[None]:
    """Run a PEFT model as its base model.

    PEFT toggles the adapters' `requires_grad` on the way; hold the flags with `gradient_hooks.frozen`.
    """
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


@torch.no_grad()
def install(pair: LoraPair, lora_A: Tensor, lora_B: Tensor) -> None:
    """Copy factors into a pair in place, so that optimizers and wrappers keep their parameters.

    DoRA's magnitudes become the row norms of W + scaling * lora_B @ lora_A, so that the layer computes
    just that, as it would without DoRA.
    """
    pair.lora_A.copy_(lora_A)
    pair.lora_B.copy_(lora_B)
    layer: Any = pair.layer
    if ADAPTER in getattr(layer, "lora_magnitude_vector", {}):
        dora = layer.lora_magnitude_vector[ADAPTER]
        weight = dequantize_module_weight(layer.get_base_layer())
        dora.weight.copy_(dora.get_weight_norm(weight, pair.lora_B @ pair.lora_A, pair.scaling))


def tied_target_layers(model: nn.Module) -> dict[str, str]:
    """Name the adapted layers whose frozen weight is another module's too, such as a tied LM head.

    Args:
        model: A PEFT model.

    Returns:
        The other module's name by the layer's, both as in the base model.
    """
    holders: dict[int, list[str]] = defaultdict(list)
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            holders[id(parameter)].append(name.removeprefix("base_model.model."))
    found = {}
    for names in holders.values():
        for name in names:
            others = [other for other in names if other != name]
            if name.endswith(".base_layer") and others:
                found[name.removesuffix(".base_layer")] = others[0].removesuffix(".base_layer")
    return found


def base_weight(pair: LoraPair) -> Tensor:
    """Return the frozen weight W (m, n) of a pair's layer, a view of it also where it is stored transposed."""
    layer: Any = pair.layer
    weight: Tensor = layer.get_base_layer().weight.detach()
    return weight.T if layer.fan_in_fan_out else weight


@torch.no_grad()
def subtract_from_base(pair: LoraPair, lora_A: Tensor, lora_B: Tensor) -> None:
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
