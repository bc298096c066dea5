"""The only file that knows PEFT: wrap a model, find its LoRA pairs, install factors, save, load, merge.

Legend, here and everywhere: W (m, n) is a weight with m = out_features and n = in_features; r is the
rank; lora_A (r, n), lora_B (m, r); Delta W = scaling * lora_B @ lora_A. The LoRA-One paper writes W as
input x output, so its A is lora_A^T, its B is lora_B^T, and left and right singular spaces change places.
"""

import copy
import difflib
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from peft import (
    AdaLoraConfig,
    LoraConfig,
    PeftModel,
    TaskType,
    get_peft_model,
    get_peft_model_state_dict,
)
from peft.tuners.adalora import AdaLoraModel
from peft.tuners.adalora.layer import AdaLoraLayer
from peft.tuners.lora import LoraLayer
from peft.utils.integrations import dequantize_module_weight
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from app.adapter_settings import LoraSettings
from app.errors import InputError

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


def settings_that_need_whole_weights(model: nn.Module) -> list[str]:
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

    PEFT toggles the adapters' `requires_grad` on the way; hold the flags with `app.observer.frozen`.
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


def save_adapter(
    model: PeftModel,
    folder: Path,
    base_name: str,
    starts: Mapping[str, tuple[Tensor, Tensor]] | None = None,
) -> None:
    """Write the adapter in PEFT's layout, as one that every tool can load onto the untouched base.

        W - s B_0 A_0 + s B A  =  W + s [B, -B_0] [A; A_0]

    so that, if the base was offset by a start (B_0, A_0), the adapter written has rank 2r, and lora_alpha such
    that the scaling s is the same.

    Args:
        model: The trained PEFT model.
        folder: Target directory; made if absent.
        base_name: Written as `base_model_name_or_path`.
        starts: lora_A (r, n) and lora_B (m, r) that were subtracted from the base, by layer; None if none were.
    """
    config = model.peft_config[ADAPTER]
    config.base_model_name_or_path = base_name
    if not starts:
        # Asking whether the vocabulary was resized would contact the hub; embeddings are never trained.
        model.save_pretrained(str(folder), save_embedding_layers=False)
        return
    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    for pair in lora_pairs(model):
        A_0, B_0 = starts.get(
            pair.name, (torch.zeros_like(pair.lora_A), torch.zeros_like(pair.lora_B))
        )
        names = [f"base_model.model.{pair.name}.{factor}.weight" for factor in ("lora_A", "lora_B")]
        A, B = (state[name].detach().cpu() for name in names)
        state[names[0]] = torch.cat([A, A_0.cpu()]).contiguous()
        state[names[1]] = torch.cat([B, -B_0.cpu()], dim=1).contiguous()
    wide: Any = copy.deepcopy(config)
    wide.lora_alpha *= 2**0.5 if wide.use_rslora else 2
    wide.r *= 2
    wide.inference_mode = True
    folder.mkdir(parents=True, exist_ok=True)
    save_file(state, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    wide.save_pretrained(str(folder))


def check_adapter_folder(folder: Path) -> None:
    """Raise InputError unless the folder holds an adapter in PEFT's layout."""
    if not (folder / "adapter_config.json").is_file():
        raise InputError(
            f"model.adapter_path is {str(folder)!r}, which holds no adapter_config.json: expected a "
            "folder in PEFT's layout, such as runs/NAME/version_0/adapter"
        )


def load_adapter(model: PreTrainedModel, folder: Path, trainable: bool) -> PeftModel:
    """Put a saved adapter on its base model.

    Raises:
        InputError: If the folder holds no PEFT adapter, or it does not fit the model.
    """
    check_adapter_folder(folder)
    try:
        with (
            warnings.catch_warnings()
        ):  # of torch, on the meta device: its numbers have nowhere to go
            warnings.filterwarnings("ignore", message=".*copying from a non-meta parameter")
            return PeftModel.from_pretrained(model, str(folder), is_trainable=trainable)
    except (RuntimeError, ValueError) as error:
        raise InputError(
            f"the adapter in {str(folder)!r} does not fit the model: {str(error).splitlines()[0]} "
            "Check model.adapter_path and model.name"
        ) from error


def weights_of_two_modules(model: nn.Module) -> dict[str, str]:
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


def merge_adapter(model: PeftModel) -> PreTrainedModel:
    """Add scaling * lora_B @ lora_A to every weight and return the plain model.

    Raises:
        InputError: If a weight is another module's too, which the merge would change with it.
    """
    for layer, other in weights_of_two_modules(model).items():
        raise InputError(
            f"merging would change the weight of {layer}, which is that of {other} too "
            "(tie_word_embeddings): export the adapter without --merge, or train with "
            f"{layer} left out of model.adapter.target_modules"
        )
    return model.merge_and_unload(safe_merge=True)


def save_merged(
    model: PeftModel, tokenizer: PreTrainedTokenizerBase, folder: Path
) -> PreTrainedModel:
    """Merge the adapter and write safetensors that plain transformers loads; return the merged model."""
    merged = merge_adapter(model)
    save_model(merged, tokenizer, folder)
    return merged


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write a whole model as safetensors, with its tokenizer, as transformers loads them."""
    model.save_pretrained(str(folder), safe_serialization=True)
    tokenizer.save_pretrained(str(folder))
