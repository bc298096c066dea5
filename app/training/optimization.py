"""What the optimizer is given, and what it must not be given."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers import get_scheduler

from app.models.lora import stacked_pairs
from app.optim.lora_plus import LoraPlusAdamW
from app.optim.lora_pro import LoraProAdamW
from app.optim.lora_sb import LoraSbAdamW
from app.optim.preconditioned_adamw import PreconditionedAdamW
from app.optim.reflora import RefLoraAdamW
from app.utils.errors import DivergedError, InputError

PAIR_OPTIMIZERS = (PreconditionedAdamW, LoraPlusAdamW, LoraProAdamW, RefLoraAdamW, LoraSbAdamW)
"""Optimizers of LoRA pairs, which are plain AdamW on anything else."""

ADVICE = (
    "lower model.optimizer.lr, set trainer.gradient_clip_val, or use a wider precision (model.dtype, "
    "trainer.precision)"
)


def pair_optimizer(make: Callable[[list[nn.Parameter]], Optimizer]) -> str | None:
    """Return the name of an optimizer of LoRA pairs; None for any other.

    Raises:
        InputError: Its settings are wrong.
    """
    try:
        probe = make([nn.Parameter(torch.zeros(1, 1))])
    except (ValueError, TypeError) as error:
        raise InputError(f"model.optimizer cannot be made: {error}") from error
    return type(probe).__name__ if isinstance(probe, PAIR_OPTIMIZERS) else None


def parameter_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Return the optimizer's groups: the LoRA pairs of a model, and whatever else of it is trained.

    The group of pairs has lora_A and lora_B of each layer in turn, the scalings, and the numbers of experts
    whose factors are stacked in them.
    """
    pairs = stacked_pairs(model)
    in_pairs = [p for pair in pairs for p in (pair.lora_A, pair.lora_B)]
    known = {id(p) for p in in_pairs}
    others = [p for p in model.parameters() if p.requires_grad and id(p) not in known]
    groups: list[dict[str, Any]] = []
    if pairs:
        scaling, experts = [pair.scaling for pair in pairs], [pair.experts for pair in pairs]
        groups.append(
            {"params": in_pairs, "lora_pairs": True, "scaling": scaling, "experts": experts}
        )
    if others:
        groups.append({"params": others})
    return groups


def make_optimizer(make: OptimizerCallable, model: nn.Module, steps: int) -> Optimizer:
    """Make the optimizer of a model that is trained for so many steps; warn if these are all its warm-up."""
    optimizer = make(parameter_groups(model))
    if isinstance(optimizer, RefLoraAdamW) and optimizer.warmup_steps >= steps:
        rank_zero_warn(
            f"model.optimizer.warmup_steps is {optimizer.warmup_steps}, but training has {steps} steps, so "
            "that RefLoraAdamW is plain AdamW throughout: set it lower, or train longer"
        )
    return optimizer


def make_schedule(shape: str, optimizer: Optimizer, warmup_steps: float, steps: int) -> LRScheduler:
    """Make the learning rate's schedule over so many optimizer steps.

    Args:
        shape: One of transformers' names.
        optimizer: Whose learning rate it is.
        warmup_steps: Steps of linear warm-up; below 1, a share of all steps.
        steps: Of the whole training.
    """
    warmup = round(warmup_steps if warmup_steps >= 1 else warmup_steps * steps)
    # The polynomial divides by the steps behind the warm-up, of which there may be none.
    return get_scheduler(shape, optimizer, warmup, max(steps, warmup + 1))


def check_loss(whole: Tensor, epoch: int, batch_idx: int, rows: Tensor) -> None:
    """Raise DivergedError if a loss is not finite.

    Args:
        whole: (2,) loss and number of tokens or rows of a batch, summed over the processes.
        epoch: Epoch of the batch.
        batch_idx: Its number.
        rows: (B,) numbers of its training rows on this process.
    """
    if not torch.isfinite(whole[0]):
        raise DivergedError(
            f"the loss is {float(whole[0] / whole[1])} in batch {batch_idx} of epoch {epoch} (training rows "
            f"{rows.tolist()}): {ADVICE}"
        )


def check_gradients(named: Iterable[tuple[str, nn.Parameter]], step: int) -> None:
    """Raise DivergedError if a gradient of an optimizer step is not finite; names the first parameter."""
    gradients = {name: p.grad for name, p in named if p.grad is not None}
    if torch.isfinite(nn.utils.get_total_norm(gradients.values())):
        return
    broken = (name for name, grad in gradients.items() if not torch.isfinite(grad).all())
    bad = next(broken, "all parameters together").removeprefix("model.")
    raise DivergedError(
        f"the gradient of {bad} is not finite before optimizer step {step}: {ADVICE}"
    )
