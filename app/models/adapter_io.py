"""Save and load adapters, in PEFT's layout, and whole models in transformers'."""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from peft import (
    AdaLoraConfig,
    LoraConfig,
    PeftConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
)
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from app.models.adapter_format import factor_of, fold_scaling, layer_names
from app.models.experts import split_columns, split_rows, stack_columns, stack_rows
from app.models.lora import (
    ADAPTER,
    UNMATCHED_PATTERNS,
    LoraPair,
    adapted_layers,
    pairs_by_module,
)
from app.models.lora_linear import use_lora_product
from app.models.quantization import check_dora
from app.utils.errors import InputError

WEIGHTS_FILE = "adapter_model.safetensors"


def save_adapter(
    model: PeftModel,
    folder: Path,
    base_name: str,
    subtracted_factors: Mapping[str, tuple[Tensor, Tensor]] | None = None,
    revision: str | None = None,
) -> None:
    """Write the adapter in PEFT's layout, as one that every tool can load onto the untouched base.

        W - s B_0 A_0 + s B A  =  W + s [B, -B_0] [A; A_0]

    so that, if initial factors (B_0, A_0) were subtracted from the base, the adapter written has rank 2r. Its
    lora_alpha is s times its rank, without rsLoRA: some tools know no other scaling.

    Args:
        model: The trained PEFT model.
        folder: Target directory; made if absent.
        base_name: Written as `base_model_name_or_path`.
        subtracted_factors: lora_A (r, n) and lora_B (m, r) that were subtracted from the base, by layer;
            None if none were.
        revision: Of the base model on the Hub.
    """
    # Asking whether the vocabulary was resized would contact the hub; embeddings are never trained whole.
    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    layers = [name for name, _ in adapted_layers(model)]
    config: Any = fold_scaling(cast(LoraConfig, model.peft_config[ADAPTER]), layers)
    config.base_model_name_or_path, config.revision = base_name, revision
    config.inference_mode = True
    if subtracted_factors:
        state = _with_subtracted(state, subtracted_factors, pairs_by_module(model))
        config.r *= 2
        config.lora_alpha *= 2
        config.rank_pattern = {name: 2 * r for name, r in config.rank_pattern.items()}
        config.alpha_pattern = {name: 2 * alpha for name, alpha in config.alpha_pattern.items()}
    write_adapter(config, state, folder)


def write_adapter(config: LoraConfig, state: Mapping[str, Tensor], folder: Path) -> None:
    """Write an adapter's configuration and tensors, making the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {key: value.detach().cpu().contiguous() for key, value in state.items()}
    save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    config.save_pretrained(str(folder))


def read_adapter(folder: Path) -> tuple[LoraConfig, dict[str, Tensor]]:
    """Read an adapter's configuration and tensors, with rsLoRA's scaling, which earlier versions wrote, folded.

    Raises:
        InputError: If the folder holds no PEFT adapter.
    """
    with _reading(folder):
        config, state = PeftConfig.from_pretrained(str(folder)), load_file(folder / WEIGHTS_FILE)
        return fold_scaling(cast(LoraConfig, config), layer_names(state)), state


def _with_subtracted(
    state: Mapping[str, Tensor],
    factors: Mapping[str, tuple[Tensor, Tensor]],
    layers: Mapping[str, LoraPair],
) -> dict[str, Tensor]:
    """Return [A; A_0] and [B, -B_0] for the factors of each layer, with zeros where none were subtracted.

    Of stacked experts each has its own; `layers` says which they are, by the layer's name in the state.
    """
    wide = dict(state)
    for key, value in state.items():
        if (factor := factor_of(key)) is None:
            continue
        name, side = factor
        names = layers[name].expert_names if name in layers else [name]
        split, index = (split_rows, 0) if side == "A" else (split_columns, 1)
        parts = split(value.cpu(), len(names))
        others = [factors[n][index].cpu() if n in factors else None for n in names]
        joined = []
        for part, other in zip(parts, others, strict=True):
            other = torch.zeros_like(part) if other is None else other
            joined.append(torch.cat([part, -other if index else other], dim=index))
        wide[key] = stack_rows(joined) if side == "A" else stack_columns(joined)
    return wide


def check_adapter_folder(folder: Path) -> None:
    """Raise InputError unless the folder holds an adapter in PEFT's layout whose files are whole."""
    if not (folder / "adapter_config.json").is_file():
        raise InputError(
            f"model.adapter_path is {str(folder)!r}, which holds no adapter_config.json: expected a "
            "folder in PEFT's layout, such as runs/NAME/version_0/adapter"
        )
    with _reading(folder):
        PeftConfig.from_pretrained(str(folder))
        if (folder / WEIGHTS_FILE).exists():
            with safe_open(folder / WEIGHTS_FILE, "pt"):
                pass


def load_adapter(model: PreTrainedModel, folder: Path, trainable: bool) -> PeftModel:
    """Put a saved adapter on its base model.

    Raises:
        InputError: If the folder holds no PEFT adapter, or it does not fit the model.
    """
    check_adapter_folder(folder)
    with _reading(folder), warnings.catch_warnings():
        # Of torch, on the meta device: its numbers have nowhere to go.
        warnings.filterwarnings("ignore", message=".*copying from a non-meta parameter")
        warnings.filterwarnings("ignore", message=UNMATCHED_PATTERNS)
        config = PeftConfig.from_pretrained(str(folder))
        if model.device.type == "meta" and isinstance(config, AdaLoraConfig):
            # PEFT selects the triplets that are left by a mask, which needs numbers: here all are there.
            config.rank_pattern, config.inference_mode = None, not trainable
            return get_peft_model(model, config)
        check_dora(model, getattr(config, "use_dora", False))
        adapted = PeftModel.from_pretrained(model, str(folder), is_trainable=trainable)
        use_lora_product(adapted)
        return adapted


@contextmanager
def _reading(folder: Path) -> Iterator[None]:
    """Turn PEFT's complaints about an adapter into an InputError."""
    try:
        yield
    except InputError:
        raise
    except (RuntimeError, ValueError, TypeError, LookupError, OSError, SafetensorError) as error:
        raise InputError(
            f"the adapter in {str(folder)!r} is damaged or does not fit the model: "
            f"{type(error).__name__}: {str(error).partition(chr(10))[0]}. "
            "Check model.adapter_path and model.name"
        ) from error


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write a whole model as safetensors, with its tokenizer, as transformers loads them."""
    model.save_pretrained(str(folder), safe_serialization=True)
    tokenizer.save_pretrained(str(folder))
