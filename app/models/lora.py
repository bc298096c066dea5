"""The PEFT boundary: wrap a model, list its LoRA pairs, install factors, subtract them from the base.

Legend, here and everywhere: W (m, n) is a weight with m = out_features and n = in_features; r is the
rank; lora_A (r, n), lora_B (m, r); Delta W = scaling * lora_B @ lora_A. The LoRA-One paper writes W as
input x output, so its A is lora_A^T, its B is lora_B^T, and left and right singular spaces change places.

The experts of a mixture are pairs of their own, with a W each, also where the model holds them in one parameter
and PEFT has their factors stacked (`app.models.experts`).
"""

import warnings
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeGuard

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from peft import LoraConfig, NoMatchingPeftModuleError, PeftModel, TaskType, get_peft_model
from peft.tuners.adalora import AdaLoraModel
from peft.tuners.adalora.layer import AdaLoraLayer
from peft.tuners.lora import LoraLayer
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from app.models.adapter_config import LoraSettings, fsdp_incompatible_options
from app.models.experts import fused_parameter, number_of_experts, split_columns, split_rows
from app.models.lora_linear import use_lora_product
from app.models.modalities import excluding, modules_beside_text
from app.models.quantization import check_dora
from app.models.target_checks import check_targets, no_target, unfit
from app.utils.errors import InputError

ADAPTER = "default"
"""PEFT's name of the adapter that is trained."""
UNMATCHED_PATTERNS = ".*pattern keys did not match any"
"""A warning of PEFT's, which looks for the names of modules only; `check_targets` knows those of parameters."""


@dataclass(frozen=True)
class LoraPair:
    """The factors of one adapted weight: a layer's, or one expert's of a fused parameter."""

    name: (
        str  # the layer's in the base model; of a fused parameter its own, and the expert's number
    )
    layer: nn.Module  # PEFT's wrapper: of a linear layer a map from (..., n) to (..., m)
    lora_A: Tensor  # (r, n)
    lora_B: Tensor  # (m, r)
    scaling: float  # factor of lora_B @ lora_A in the forward pass
    experts: int = 1  # that share the layer's parameters
    expert: int | None = (
        None  # which of them; None where both factors are the layer's whole parameters
    )

    @property
    def rank(self) -> int:
        """Rank r of the pair, which a rank pattern may set for each layer."""
        return self.lora_A.shape[0]

    @property
    def expert_names(self) -> list[str]:
        """Names of the pairs of the experts that are stacked in this one; its own where there is one."""
        return (
            [f"{self.name}.{e}" for e in range(self.experts)] if self.experts > 1 else [self.name]
        )

    @property
    def is_expert(self) -> bool:
        """Whether tokens are routed past the weight, so that some batches do not reach it."""
        return self.experts > 1 or "experts" in self.name.split(".")


def add_lora(model: PreTrainedModel, settings: LoraSettings) -> PeftModel:
    """Freeze a language model and wrap its target layers with LoRA (lora_B = 0, lora_A random).

    Returns:
        The PEFT model; adapters are float32 even where the base is not.

    Raises:
        InputError: If no module matches the targets, a pattern matches no target, or a layer's rank (AdaLoRA's
            init_r) exceeds its smaller side.
    """
    check_dora(model, settings.use_dora)
    encodes = model.config.is_encoder_decoder
    config = settings.peft_config(
        task_type=TaskType.SEQ_2_SEQ_LM if encodes else TaskType.CAUSAL_LM,
        # A quantised layer keeps what it was; the adapter serves the original base, too.
        fan_in_fan_out=any(
            Conv1D in (type(module), getattr(module, "source_cls", None))
            for module in model.modules()
        ),
    )
    _leave_out_other_modalities(model, config)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=UNMATCHED_PATTERNS)
            wrapped = get_peft_model(model, config)
    except NoMatchingPeftModuleError as error:
        raise InputError(no_target(model, settings.target_modules, str(error))) from error
    except ValueError as error:
        raise InputError(unfit(str(error))) from error
    check_targets(_lora_layers(wrapped), settings)
    use_lora_product(wrapped)
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


def adapted_layers(model: nn.Module) -> Iterator[tuple[str, LoraLayer]]:
    """Yield all adapted layers, also embeddings and parameters, by the names that PEFT's patterns match."""
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer) and ADAPTER in module.scaling:
            # PEFT nests the wrappers of several parameters of a module.
            name = name.removeprefix("base_model.model.").replace(".base_layer", "")
            fused = fused_parameter(module)
            yield f"{name}.{fused.name}" if fused else name, module


def _lora_layers(model: nn.Module) -> list[tuple[str, LoraLayer]]:
    """List the adapted layers but for embeddings, in module order."""
    return [(name, layer) for name, layer in adapted_layers(model) if ADAPTER in layer.lora_A]


def stacked_pairs(model: nn.Module) -> list[LoraPair]:
    """List each adapted layer's own parameters, in which a fused parameter's experts are stacked.

    As `lora_pairs` otherwise: what an optimizer is given.
    """
    return [
        LoraPair(
            name=name,
            layer=layer,  # type: ignore[arg-type]
            lora_A=layer.lora_A[ADAPTER].weight,  # type: ignore[arg-type]
            lora_B=layer.lora_B[ADAPTER].weight,  # type: ignore[arg-type]
            scaling=layer.scaling[ADAPTER],
            experts=number_of_experts(layer),
        )
        for name, layer in _lora_layers(model)
        if not isinstance(layer, AdaLoraLayer)  # has triplets, not pairs
    ]


def lora_pairs(model: nn.Module) -> list[LoraPair]:
    """List the LoRA pairs of a PEFT model in module order, each expert as its own, with views of its factors.

    Empty for any other model, and for AdaLoRA.
    """
    return [pair for stacked in stacked_pairs(model) for pair in _split(stacked)]


def _split(stacked: LoraPair) -> list[LoraPair]:
    if stacked.experts == 1:
        return [stacked]
    lora_A = split_rows(stacked.lora_A.detach(), stacked.experts)
    lora_B = split_columns(stacked.lora_B.detach(), stacked.experts)
    return [
        replace(stacked, name=name, lora_A=lora_A[e], lora_B=lora_B[e], expert=e)
        for e, name in enumerate(stacked.expert_names)
    ]


def pairs_by_module(model: nn.Module) -> dict[str, LoraPair]:
    """Return `stacked_pairs` by the names of PEFT's modules, under which their factors are saved."""
    names = {module: name for name, module in model.named_modules()}
    return {
        names[pair.layer].removeprefix("base_model.model."): pair for pair in stacked_pairs(model)
    }


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
    """Return the frozen weight W (m, n) of a pair, a view of it also where it is stored transposed or fused."""
    layer: Any = pair.layer
    if (fused := fused_parameter(pair.layer)) is not None:
        return fused.matrices(layer.get_param().detach())[pair.expert or 0]
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
