"""Which adapters, starts, optimizers and strategies go together, and the errors where they do not."""

from collections.abc import Sequence

from torch import nn
from transformers import PreTrainedConfig

from app.adalora import check_schedule
from app.adapter_settings import LoraSettings
from app.adapters import weights_of_two_modules
from app.errors import InputError


def check_sharding(settings: Sequence[str]) -> None:
    """Raise InputError if an adapter has settings that do not work where the base weights are sharded.

    Args:
        settings: Those that need whole weights.
    """
    if settings:
        raise InputError(
            f"the adapter has {settings[0]}, which does not work with the sharded weights of this "
            f"strategy: set model.adapter without {settings[0]} (or another model.adapter_path), or use "
            "--config strategies/ddp.yaml"
        )


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


def check_length(
    adapter: LoraSettings | None, max_steps: int | None, max_epochs: int | None
) -> None:
    """Raise InputError if training has no end, or is too short for a new adapter's pruning.

    Args:
        adapter: The adapter that is made; None where none is, or a saved one is loaded.
        max_steps: The trainer's setting, which may leave the length to the epochs.
        max_epochs: The trainer's setting.
    """
    if max_steps == -1 and max_epochs == -1:
        raise InputError(
            "trainer.max_steps and trainer.max_epochs are both -1, so the learning rate's schedule "
            "has no end: set one of them"
        )
    budget = None if adapter is None else adapter.adalora
    if budget is not None and max_steps is not None and max_steps > 0:
        check_schedule(budget.tinit, budget.tfinal, max_steps)


def check_offset(start: str, name: str, config: PreTrainedConfig, sharded: bool) -> None:
    """Raise InputError if the base weights cannot be changed by a start.

    Args:
        start: Its name.
        name: The model's name.
        config: The model's configuration.
        sharded: Whether the strategy shards the base weights.
    """
    if sharded:
        raise InputError(
            f"init is {start}, which changes the base weights that this strategy shards: use "
            "--config strategies/ddp.yaml, or methods/lora_one.yaml, which leaves them as they are"
        )
    if getattr(config, "quantization_config", None) is not None:
        raise InputError(
            f"init is {start}, which takes its start off the base weights, but those of model.name "
            f"{name!r} are quantised (quantization_config) and cannot hold it: use a model whose "
            "weights are not, or --config methods/lora_one.yaml, which leaves them as they are"
        )


def check_own_weights(start: str, model: nn.Module) -> None:
    """Raise InputError if a start of that name would change weights that other modules have too."""
    for layer, other in weights_of_two_modules(model).items():
        raise InputError(
            f"init is {start}, which changes the weight of {layer}, but that is the weight of {other} too "
            f"(tie_word_embeddings): leave {layer} out of model.adapter.target_modules, or use --config "
            "methods/lora_one.yaml, which leaves the base weights as they are"
        )
