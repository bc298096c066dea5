"""The PEFT boundary: wrap a model, list its LoRA pairs, install factors, subtract them from the base.

Legend, here and everywhere: W (m, n) is a weight with m = out_features and n = in_features; r is the
rank; lora_A (r, n), lora_B (m, r); Delta W = scaling * lora_B @ lora_A. The LoRA-One paper writes W as
input x output, so its A is lora_A^T, its B is lora_B^T, and left and right singular spaces change places.
"""

from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from peft.tuners.adalora import AdaLoraModel
from peft.tuners.adalora.layer import AdaLoraLayer
from peft.tuners.lora import LoraLayer
from peft.utils.integrations import dequantize_module_weight
from peft.utils.other import get_pattern_key
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from app.models.adapter_config import LoraSettings, fsdp_incompatible_options
from app.models.modalities import excluding, modules_beside_text
from app.utils.errors import InputError
from app.utils.text import did_you_mean

ADAPTER = "default"
"""PEFT's name of the adapter that is trained."""


@dataclass(frozen=True)
class LoraPair:
    """One adapted layer."""

    name: str  # the layer's in the base model
    layer: nn.Module  # PEFT's wrapper, a map from (..., n) to (..., m)
    lora_A: nn.Parameter  # (r, n)
    lora_B: nn.Parameter  # (m, r)
    scaling: float  # factor of lora_B @ lora_A in the forward pass

    @property
    def rank(self) -> int:
        """Rank r of the pair, which a rank pattern may set for each layer."""
        return self.lora_A.shape[0]


def add_lora(model: PreTrainedModel, settings: LoraSettings) -> PeftModel:
    """Freeze a language model and wrap its target layers with LoRA (lora_B = 0, lora_A random).

    Returns:
        The PEFT model; adapters are float32 even where the base is not.

    Raises:
        InputError: If no module matches the targets, a pattern matches no target, or a layer's rank (AdaLoRA's
            init_r) exceeds its smaller side.
    """
    encodes = model.config.is_encoder_decoder
    config = settings.peft_config(
        task_type=TaskType.SEQ_2_SEQ_LM if encodes else TaskType.CAUSAL_LM,
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),
    )
    _leave_out_other_modalities(model, config)
    try:
        wrapped = get_peft_model(model, config)
    except ValueError as error:
        raise InputError(_no_target(model, settings.target_modules, str(error))) from error
    _check_patterns(wrapped, settings)
    _check_ranks(wrapped, settings)
    return wrapped


def _leave_out_other_modalities(model: PreTrainedModel, config: LoraConfig) -> None:
    """Exclude the targets that a text does not reach, unless a regular expression has named them."""
    targets = config.target_modules
    whole = isinstance(targets, str) and targets.lower() == "all-linear"
    if isinstance(targets, str) and not whole:
        return
    beside = modules_beside_text(model)
    left_out = [
        name
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D))
        and name.startswith(tuple(f"{other}." for other in beside))
        and (whole or f".{name}".endswith(tuple(f".{target}" for target in targets or ())))
    ]
    if left_out:
        config.exclude_modules = excluding(config.exclude_modules, beside)
        rank_zero_info(
            f"{len(left_out)} linear layers that text does not reach get no adapter (in {', '.join(beside)}); "
            "a regular expression in model.adapter.target_modules adapts them"
        )


def _check_ranks(model: PeftModel, settings: LoraSettings) -> None:
    name_of_rank = "r" if settings.adalora is None else "adalora.init_r"
    for name, layer in _lora_layers(model):
        rank, shape = layer.r[ADAPTER], (int(layer.out_features or 0), int(layer.in_features or 0))
        if rank > min(shape):
            setting = name_of_rank if rank not in settings.rank_pattern.values() else "rank_pattern"
            raise InputError(
                f"model.adapter.{setting} is {rank}, but {name} has shape {shape}: set "
                f"model.adapter.{setting} to at most {min(shape)}, or leave the layer out of "
                "model.adapter.target_modules"
            )


def _check_patterns(model: PeftModel, settings: LoraSettings) -> None:
    """Raise InputError for a pattern that no adapted layer fits; PEFT would ignore it."""
    names = [name for name, _ in _lora_layers(model)]
    for setting in ("rank_pattern", "alpha_pattern"):
        for pattern in getattr(settings, setting):
            if not any(get_pattern_key([pattern], name) == pattern for name in names):
                raise InputError(
                    f"model.adapter.{setting} names {pattern!r}, which fits no adapted layer: expected the "
                    f"end of a name or a regular expression, such as {names[0]}"
                )


def _no_target(model: nn.Module, targets: str | list[str], reason: str) -> str:
    kinds = Counter(
        name.rpartition(".")[2]
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D))
    )
    wanted = [targets] if isinstance(targets, str) else targets
    hint = "".join(did_you_mean(name, kinds, 0.4) for name in wanted if name not in kinds)
    listed = ", ".join(f"{kind} ({count})" for kind, count in sorted(kinds.items()))
    return (
        f"model.adapter.target_modules is {targets!r}, which fits no layer of this model{hint} "
        f"Its linear layers end in: {listed}. Set model.adapter.target_modules to some of these or to "
        f"all-linear. (PEFT: {reason.splitlines()[0]})"
    )


def base_model(model: nn.Module) -> PreTrainedModel:
    """Return the transformers model inside a PEFT model, or the model itself."""
    return model.get_base_model() if isinstance(model, PeftModel) else model  # type: ignore


def is_adapted(model: nn.Module) -> TypeGuard[PeftModel]:
    """Return whether a model has an adapter of any kind."""
    return isinstance(model, PeftModel)


def adalora_tuner(model: nn.Module) -> AdaLoraModel | None:
    """Return PEFT's AdaLoRA around a model, with its allocator of ranks; None where there is none."""
    tuner = model.base_model if isinstance(model, PeftModel) else None
    return tuner if isinstance(tuner, AdaLoraModel) else None


def fsdp_incompatible_settings(model: nn.Module) -> list[str]:
    """Name the settings of a model's adapter that do not work where the base weights are sharded."""
    config = model.peft_config[ADAPTER] if isinstance(model, PeftModel) else None
    return fsdp_incompatible_options(config) if isinstance(config, LoraConfig) else []


def _lora_layers(model: nn.Module) -> Iterator[tuple[str, LoraLayer]]:
    """Yield the adapted layers in module order, by their names in the base model."""
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer) and ADAPTER in module.lora_A:
            yield name.removeprefix("base_model.model."), module


def adapted_layers(model: nn.Module) -> Iterator[tuple[str, LoraLayer]]:
    """Yield all adapted layers, also embeddings and parameters, by the names that PEFT's patterns match."""
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer) and ADAPTER in module.scaling:
            name = name.removeprefix("base_model.model.").replace(".base_layer", "")
            parameter = getattr(module, "parameter_name", None)  # of a ParamWrapper
            yield f"{name}.{parameter}" if parameter else name, module


def lora_pairs(model: nn.Module) -> list[LoraPair]:
    """List the LoRA layers of a PEFT model in module order; empty for any other model, and for AdaLoRA."""
    return [
        LoraPair(
            name=name,
            layer=layer,  # type: ignore[arg-type]
            lora_A=layer.lora_A[ADAPTER].weight,  # type: ignore[arg-type]
            lora_B=layer.lora_B[ADAPTER].weight,  # type: ignore[arg-type]
            scaling=layer.scaling[ADAPTER],
        )
        for name, layer in _lora_layers(model)
        if not isinstance(layer, AdaLoraLayer)  # has triplets, not pairs
    ]


@contextmanager
def without_adapters(model: nn.Module) -> Iterator[None]:
    """Run a PEFT model as its base model.

    PEFT toggles the adapters' `requires_grad` on the way; hold the flags with `gradient_hooks.frozen`.
    """
    assert isinstance(model, PeftModel)
    with model.disable_adapter():
        yield


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

    Returns:
        The other module's name by the layer's, both as in the base model.
    """
    holders: dict[int, list[str]] = defaultdict(list)
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            holders[id(parameter)].append(name.removeprefix("base_model.model."))
    return {
        name.removesuffix(".base_layer"): other.removesuffix(".base_layer")
        for names in holders.values()
        for name in names
        for other in names
        if name.endswith(".base_layer") and other != name
    }


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
            f"init subtracts factors from the weight of {pair.name}, but that is quantised ({weight.dtype}): "
            "use a model.name with weights that are not, or --config methods/lora_one.yaml, which keeps them"
        )
    # Always the same sums, rounded once: a resumed run subtracts before its model is moved to a GPU, and its
    # base has to be that of the interrupted run bit for bit.
    product = pair.scaling * lora_B.cpu().double() @ lora_A.cpu().double()
    weight.copy_((weight.cpu().double() - product).to(weight.dtype))
