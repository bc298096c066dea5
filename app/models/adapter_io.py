"""Save, load and merge adapters, in PEFT's layout."""

import copy
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from app.models.lora import ADAPTER, lora_pairs, tied_target_layers
from app.utils.errors import InputError


def save_adapter(
    model: PeftModel,
    folder: Path,
    base_name: str,
    subtracted_factors: Mapping[str, tuple[Tensor, Tensor]] | None = None,
) -> None:
    """Write the adapter in PEFT's layout, as one that every tool can load onto the untouched base.

        W - s B_0 A_0 + s B A  =  W + s [B, -B_0] [A; A_0]

    so that, if initial factors (B_0, A_0) were subtracted from the base, the adapter written has rank 2r, and
    lora_alpha such that the scaling s is the same.

    Args:
        model: The trained PEFT model.
        folder: Target directory; made if absent.
        base_name: Written as `base_model_name_or_path`.
        subtracted_factors: lora_A (r, n) and lora_B (m, r) that were subtracted from the base, by layer;
            None if none were.
    """
    config: Any = model.peft_config[ADAPTER]
    config.base_model_name_or_path = base_name
    if not subtracted_factors:
        # Asking whether the vocabulary was resized would contact the hub; embeddings are never trained.
        model.save_pretrained(str(folder), save_embedding_layers=False)
        return
    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    for pair in lora_pairs(model):
        A_0, B_0 = subtracted_factors.get(
            pair.name, (torch.zeros_like(pair.lora_A), torch.zeros_like(pair.lora_B))
        )
        names = [f"base_model.model.{pair.name}.{factor}.weight" for factor in ("lora_A", "lora_B")]
        A, B = (state[name].detach().cpu() for name in names)
        state[names[0]] = torch.cat([A, A_0.cpu()]).contiguous()
        state[names[1]] = torch.cat([B, -B_0.cpu()], dim=1).contiguous()
    folder.mkdir(parents=True, exist_ok=True)
    save_file(state, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    _of_twice_the_rank(config).save_pretrained(str(folder))


def _of_twice_the_rank(config: Any) -> LoraConfig:
    """Return the configuration of an adapter with twice the rank and the same scaling, in every layer."""
    factor = 2**0.5 if config.use_rslora else 2
    wide = copy.deepcopy(config)
    wide.r *= 2
    wide.lora_alpha *= factor
    wide.rank_pattern = {name: 2 * r for name, r in config.rank_pattern.items()}
    wide.alpha_pattern = {name: factor * a for name, a in config.alpha_pattern.items()}
    wide.inference_mode = True
    return wide


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
        with warnings.catch_warnings():
            # Of torch, on the meta device: its numbers have nowhere to go.
            warnings.filterwarnings("ignore", message=".*copying from a non-meta parameter")
            return PeftModel.from_pretrained(model, str(folder), is_trainable=trainable)
    except (RuntimeError, ValueError) as error:
        raise InputError(
            f"the adapter in {str(folder)!r} does not fit the model: {str(error).splitlines()[0]} "
            "Check model.adapter_path and model.name"
        ) from error


def merge_adapter(model: PeftModel) -> PreTrainedModel:
    """Add scaling * lora_B @ lora_A to every weight and return the plain model.

    Raises:
        InputError: If a weight is another module's too, which the merge would change with it.
    """
    for layer, other in tied_target_layers(model).items():
        raise InputError(
            f"merging would change the weight of {layer}, which is that of {other} too "
            "(tie_word_embeddings): export the adapter without --merge, or train with "
            f"{layer} left out of model.adapter.target_modules"
        )
    return model.merge_and_unload(safe_merge=True)


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write a whole model as safetensors, with its tokenizer, as transformers loads them."""
    model.save_pretrained(str(folder), safe_serialization=True)
    tokenizer.save_pretrained(str(folder))
