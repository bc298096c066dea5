"""Build what is trained: the base model with its adapter."""

import logging
from dataclasses import replace
from pathlib import Path

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import nn
from transformers import PreTrainedModel

from app.distributed.collectives import from_first_process
from app.distributed.fsdp import Fsdp2Strategy
from app.distributed.processes import global_rank
from app.models.adapter_io import load_adapter
from app.models.loading import empty_model, load_float32, load_model, model_fingerprint
from app.models.lora import add_lora, fsdp_incompatible_settings
from app.models.merging import merge_adapter
from app.models.modalities import modules_beside_text
from app.models.quantization import number_of_weights
from app.tracking.record import ModelRecord
from app.training.checks import check_sharding
from app.training.protocols import ModelSettings


def build_model(
    settings: ModelSettings,
    sharding: Fsdp2Strategy | None,
    trainable: bool,
    device: torch.device,
) -> tuple[nn.Module, ModelRecord]:
    """Load the base model, add the adapter and shard the frozen weights.

    Args:
        settings: What to build.
        sharding: Shards frozen weights; None leaves them whole.
        trainable: Whether the weights require gradients where there is no adapter.
        device: Of this process, where quantised weights are loaded to.

    Returns:
        The model in training mode, and its entry in the run's record.

    Raises:
        InputError: The model cannot be loaded, or the adapter fits neither it nor the sharding.
    """
    # A sharded model is read by the first process alone, which hands out the shards.
    empty = sharding is not None and global_rank() > 0
    dtype, attention = getattr(torch, settings.dtype_name), settings.attn_implementation
    # Merged weights are plain numbers.
    source = replace(settings.source, quantization=None) if settings.merged else settings.source
    if empty:
        base = empty_model(source, dtype, attention)
    else:
        base = load_model(source, dtype, attention, device)
    parameters, quantized = number_of_weights(base)
    if quantized:
        rank_zero_info(f"{quantized:,} weights of {settings.source.name} are quantised")
    before = logging.root.manager.disable
    logging.disable(logging.INFO)  # the blueprint has said the same
    try:
        model = adapt(base, settings, trainable)
    finally:
        logging.disable(before)
    if sharding is not None:
        check_sharding(fsdp_incompatible_settings(model))
        sharding.shard(model)
    if global_rank() > 0:
        # The adapter was drawn alike everywhere; dropout is each process's own.
        torch.manual_seed(torch.initial_seed() + global_rank())
    record = ModelRecord(
        name=settings.source.name,
        # Reads every byte of a local model, which one process does for all.
        fingerprint=from_first_process(lambda: model_fingerprint(settings.source)),
        parameters=parameters,
        trainable_parameters=sum(p.numel() for p in model.parameters() if p.requires_grad),
    )
    # Checkpoints load in evaluation mode and Lightning leaves modes alone: dropout belongs to training.
    return model.train(), record


def empty_adapted(settings: ModelSettings) -> nn.Module:
    """Build what will be trained on the meta device: shapes, types and names without the weights.

    Raises:
        InputError: The adapter does not fit the model.
    """
    dtype = getattr(torch, settings.dtype_name)
    with torch.device("meta"):
        return adapt(empty_model(settings.source, dtype, settings.attn_implementation), settings)


def adapt(base: PreTrainedModel, settings: ModelSettings, trainable: bool = True) -> nn.Module:
    """Add the adapter and activation checkpointing to a base model, also on the meta device.

    Args:
        base: From `load_model` or `empty_model`.
        settings: Of the adapter; a saved one comes before a new one.
        trainable: Whether the weights require gradients where there is no adapter.

    Returns:
        The PEFT model, or `base` itself without an adapter or with one merged into its weights.

    Raises:
        InputError: The adapter does not fit the model.
    """
    if settings.gradient_checkpointing:
        base.gradient_checkpointing_enable({"use_reentrant": False})
    model: nn.Module
    if settings.adapter_path is not None and settings.merged:
        model = _with_merged_weights(base, settings, Path(settings.adapter_path))
    elif settings.adapter_path is not None:
        model = load_adapter(base, Path(settings.adapter_path), trainable=True)
    elif settings.adapter is not None:
        model = add_lora(base, settings.adapter)
    else:
        model = base.requires_grad_(trainable)
        for name in modules_beside_text(
            base
        ):  # DDP waits for the gradient of every weight that wants one
            base.get_submodule(name).requires_grad_(False)
    if settings.gradient_checkpointing:
        # Without re-entry a block is recomputed only if its input is in the graph.
        base.enable_input_require_grads()
    return model


def _with_merged_weights(
    base: PreTrainedModel, settings: ModelSettings, adapter: Path
) -> PreTrainedModel:
    """Return `base` with the weights that `export --merge` writes in its dtype."""
    whole = load_float32(settings.source, settings.attn_implementation)
    trained = load_adapter(whole, adapter, trainable=False)
    merged, _ = merge_adapter(trained, getattr(torch, settings.dtype_name))
    if hasattr(
        base, "hf_quantizer"
    ):  # the checkpoint's own codes, in which other weights do not fit
        return merged
    base.load_state_dict(merged.state_dict())
    return base
