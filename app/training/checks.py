"""Refuse settings that cannot work together, before anything is loaded."""

from collections.abc import Sequence

from torch import nn

from app.evaluation.benchmark import PreparedBenchmark
from app.models.adalora import check_schedule
from app.models.adapter_config import LoraSettings, fsdp_incompatible_options
from app.models.lora import tied_target_layers
from app.utils.errors import InputError


def check_sharding(settings: Sequence[str]) -> None:
    """Raise InputError if an adapter has any settings that need whole weights, where these are sharded."""
    if settings:
        raise InputError(
            f"the adapter has {settings[0]}, which does not work with the sharded weights of this "
            f"strategy: set model.adapter without {settings[0]} (or another model.adapter_path), or use "
            "--config strategies/ddp.yaml"
        )


def check_sharded(adapter: LoraSettings | None) -> None:
    """Raise InputError if training with a new adapter does not work where the base weights are sharded."""
    if adapter is None:
        raise InputError(
            "model.adapter is null, but this strategy shards frozen weights only: set model.adapter, "
            "or train every weight with --config strategies/ddp.yaml"
        )
    check_sharding(fsdp_incompatible_options(adapter.peft_config()))


def check_optimizer(optimizer: str | None, pairs: bool) -> None:
    """Raise InputError if the optimizer works on LoRA pairs, but the model has none.

    Args:
        optimizer: Name of an optimizer of pairs; None for any other optimizer.
        pairs: Whether the model has pairs.
    """
    if optimizer is not None and not pairs:
        raise InputError(
            f"model.optimizer is {optimizer}, which works on LoRA pairs, but the model has none "
            "(model.adapter is null, or has adalora): set model.optimizer to torch.optim.AdamW, as "
            "methods/full.yaml and methods/adalora.yaml do, or model.adapter to LoRA"
        )


def check_span(
    optimizer: str | None, init: bool, adapter: LoraSettings | None, adapter_path: str | None
) -> None:
    """Raise InputError if the optimizer keeps to the span that lora_B begins with, but that is PEFT's 0.

    Args:
        optimizer: Name of an optimizer of pairs; None for any other optimizer.
        init: Whether there is an initialization.
        adapter: The new adapter.
        adapter_path: Of a saved one.
    """
    new = adapter_path is None and adapter is not None and adapter.adalora is None
    if optimizer == "LoraSbAdamW" and new and not init:
        raise InputError(
            "model.optimizer is LoraSbAdamW, which keeps to the span that lora_B begins with, but init is "
            "null, so that lora_B is 0: set init to LoraSbInit, as methods/lora_sb.yaml does, or "
            "model.optimizer to torch.optim.AdamW"
        )


def check_length(
    adapter: LoraSettings | None, max_steps: int | None, max_epochs: int | None
) -> None:
    """Raise InputError if training has no end, or is too short for a new adapter's pruning.

    Args:
        adapter: The adapter that is made; None where none is, or a saved one is loaded.
        max_steps: Of the trainer, which may leave the length to the epochs.
        max_epochs: Of the trainer.
    """
    if max_steps == -1 and max_epochs == -1:
        raise InputError(
            "trainer.max_steps and trainer.max_epochs are both -1, so the learning rate's schedule "
            "has no end: set one of them"
        )
    budget = None if adapter is None else adapter.adalora
    if budget is not None and max_steps is not None and max_steps > 0:
        check_schedule(budget.tinit, budget.tfinal, max_steps)


def check_new_adapter(init: str, adapter: LoraSettings | None, adapter_path: str | None) -> None:
    """Raise InputError unless there is a new LoRA adapter for an initialization of that class to fill."""
    if adapter_path is not None:
        raise InputError(
            f"init is {init}, which would overwrite the adapter in model.adapter_path {adapter_path!r}: set "
            "init to null to train it further"
        )
    if adapter is None:
        raise InputError(
            f"init is {init}, but the model has no LoRA adapter: set model.adapter, or init to null for full "
            "fine-tuning"
        )
    if adapter.adalora is not None:
        raise InputError(
            f"init is {init}, which fills lora_A and lora_B, but model.adapter.adalora is set, whose triplets "
            "are initialized by themselves: set init or model.adapter.adalora to null"
        )


def check_init_alone(
    init: str | None, elsewhere: str, adapter: LoraSettings | None, adapter_path: str | None
) -> None:
    """Raise InputError unless other tools can train what `python train.py init` would write.

    Args:
        init: Class of the initialization; None for PEFT's own.
        elsewhere: What of it no other tool does as `fit` does; empty if one does all.
        adapter: The new adapter.
        adapter_path: Of a saved one.
    """
    if adapter_path is not None:
        raise InputError(
            f"model.adapter_path is {adapter_path!r}, an adapter that is there already: leave it out to "
            "initialize a new one"
        )
    if adapter is None:
        raise InputError(
            "model.adapter is null, so there is no adapter to initialize: set model.adapter, or train every "
            "weight with `python train.py fit`"
        )
    if adapter.adalora is not None:
        raise InputError(
            "model.adapter.adalora is set, whose triplets are initialized at random and pruned by the training "
            "loop: train it with `python train.py fit`, or let the other tool make PEFT's AdaLoraConfig"
        )
    if elsewhere:
        raise InputError(
            f"init is {init}, which {elsewhere}: "
            "train with `python train.py fit`, let the other tool initialize (PEFT's init_lora_weights: "
            "pissa, olora, lora_ga), or use --config methods/lora_one.yaml, which leaves the base as it is"
        )


def check_subtraction(init: str, name: str, quantized: str | None, sharded: bool) -> None:
    """Raise InputError if an initialization of that class cannot subtract its factors from the base weights.

    Args:
        init: Its class.
        name: `model.name`.
        quantized: From `quantized_by`.
        sharded: Whether the strategy shards the weights.
    """
    if sharded:
        raise InputError(
            f"init is {init}, which changes the base weights that this strategy shards: use "
            "--config strategies/ddp.yaml, or methods/lora_one.yaml, which leaves them as they are"
        )
    if quantized is not None:
        raise InputError(
            f"init is {init}, which subtracts its factors from the base weights, but those of model.name "
            f"{name!r} are quantised ({quantized}), codes that hold no difference: use weights that are not, "
            "or --config methods/lora_one.yaml, which leaves them as they are"
        )


def check_trainable(name: str, quantized: str | None) -> None:
    """Raise InputError if every weight would be trained of a model whose weights are quantised.

    Args:
        name: `model.name`.
        quantized: From `quantized_by`.
    """
    if quantized is not None:
        raise InputError(
            f"model.adapter is null, which trains every weight, but those of model.name {name!r} are quantised "
            f"({quantized}), codes that have no gradient: use weights that are not, or an adapter beside them, "
            "--config methods/lora_one.yaml"
        )


def check_unmerged(merged: bool) -> None:
    """Raise InputError if a model with a merged adapter would be trained."""
    if merged:
        raise InputError(
            "model.merged is set, but a merged model has no adapter to train: leave it null, and give "
            "--merged to test or validate"
        )


def check_shardable(merged: bool, quantized: str | None) -> None:
    """Raise InputError if a strategy would shard weights that have to be whole.

    Args:
        merged: Whether an adapter is merged into them.
        quantized: From `quantized_by`.
    """
    if merged:
        raise InputError(
            "model.merged is set (--merged), but this strategy shards the weights that the adapter is "
            "merged into: use one process, or --config strategies/ddp.yaml"
        )
    if quantized is not None:
        raise InputError(
            f"the base weights are quantised ({quantized}), but this strategy shards them, and their scales "
            "are no parameters, which it could shard or hand out: use --config strategies/ddp.yaml, in which "
            "each process has the whole quantised model, or weights that are not quantised"
        )


def check_sharded_benchmarks(benchmarks: Sequence[PreparedBenchmark]) -> None:
    """Raise InputError for a benchmark that runs the model itself, where the base weights are sharded."""
    for prepared in benchmarks:
        if prepared.benchmark.runs_model:
            raise InputError(
                f"{prepared.benchmark.name} in --data.evals runs the model on each process's own batches, but "
                "this strategy shards its weights: use --config strategies/ddp.yaml, or one process"
            )


def check_untied(init: str, model: nn.Module) -> None:
    """Raise InputError if an initialization would subtract from weights that other modules have too."""
    for layer, other in tied_target_layers(model).items():
        raise InputError(
            f"init is {init}, which changes the weight of {layer}, but that is the weight of {other} too "
            f"(tie_word_embeddings): leave {layer} out of model.adapter.target_modules, or use --config "
            "methods/lora_one.yaml, which leaves the base weights as they are"
        )
