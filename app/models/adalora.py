"""Run AdaLoRA in a training loop: its orthogonality term, its schedule, its state in a checkpoint."""

from typing import Any

import torch
from peft import AdaLoraConfig
from peft.tuners.adalora import AdaLoraModel
from torch import Tensor

from app.utils.errors import InputError

AVERAGES = ("ipt", "exp_avg_ipt", "exp_avg_unc")
"""PEFT's names of its allocator's averages of each weight's sensitivity."""


def check_schedule(tinit: int, tfinal: int, steps: int) -> None:
    """Raise InputError unless a training of so many optimizer steps leaves some for pruning.

    The last pruning, `tfinal` steps before the end, goes by the gradients of the steps before it.
    """
    if steps - tfinal < 2 or tinit >= steps - tfinal:
        raise InputError(
            f"AdaLoRA prunes between step model.adapter.adalora.tinit={tinit} and tfinal={tfinal} steps before "
            f"the end, which must be step 2 at least, but training has {steps} steps: lower tinit and tfinal, "
            "or train longer"
        )


def _config(tuner: AdaLoraModel) -> AdaLoraConfig:
    config = tuner.peft_config[tuner.trainable_adapter_name]
    assert isinstance(config, AdaLoraConfig)
    return config


def set_total_steps(tuner: AdaLoraModel, steps: int) -> None:
    """Set the number of optimizer steps that the pruning schedule is laid out for; see `check_schedule`."""
    config = _config(tuner)
    check_schedule(config.tinit, config.tfinal, steps)
    tuner.rankallocator.set_total_step(steps)


def add_orthogonality(tuner: AdaLoraModel) -> Tensor:
    """Add the gradient of AdaLoRA's regulariser to the factors' gradients; return its value, unweighted.

        R = mean over all lora_A and lora_B of |A A^T - I|_F and |B^T B - I|_F,     grad += orth_reg_weight dR

    It does not depend on the data: so it is added once a step, after the batches of all processes.
    """
    adapter = tuner.trainable_adapter_name
    factors = [
        (name, p)
        for name, p in tuner.model.named_parameters()
        if ("lora_A" in name or "lora_B" in name) and adapter in name and p.requires_grad
    ]
    with torch.enable_grad():
        norms = []
        for name, p in factors:
            gram = p @ p.T if "lora_A" in name else p.T @ p
            norms.append(torch.linalg.norm(gram - torch.eye(len(gram), device=p.device)))
        value = torch.stack(norms).mean()
        grads = torch.autograd.grad(value, [p for _, p in factors])
    weight = _config(tuner).orth_reg_weight
    for (_, p), grad in zip(factors, grads, strict=True):
        p.grad = weight * grad if p.grad is None else p.grad.add_(grad, alpha=weight)
    return value.detach()


def finite(gradients: list[Tensor]) -> bool:
    """Return whether all numbers in all gradients are finite."""
    return bool(torch.stack([gradient.isfinite().all() for gradient in gradients]).all())


def prune(tuner: AdaLoraModel, step: int) -> None:
    """Weigh the triplets by the step's gradients, and prune to the step's budget.

    Nothing is done for a step whose gradients are not finite, which a gradient scaler has skipped: they
    would stay in the averages for ever. `step` counts the optimizer steps done.

    Raises:
        InputError: If there was no step to weigh the triplets by when the last pruning comes.
    """
    config = _config(tuner)
    assert config.total_step is not None  # by PEFT's own check
    last = config.total_step - config.tfinal
    grads = [p.grad for p in tuner.model.parameters() if p.requires_grad and p.grad is not None]
    if step < last and not finite(grads):
        return
    if step < last or tuner.rankallocator.ipt:
        tuner.update_and_allocate(step)
    elif config.rank_pattern:
        # Behind the last pruning, which may be that of a run that this one trains further.
        tuner.rankallocator.mask_using_rank_pattern(tuner.model, config.rank_pattern)
    else:
        raise InputError(
            f"none of the {last} steps before AdaLoRA's last pruning had finite gradients: lower "
            "model.optimizer.lr, train longer, or use a wider precision (trainer.precision)"
        )


def allocator_state(tuner: AdaLoraModel) -> dict[str, Any]:
    """Return the state of the pruning beside the weights, as plain data and tensors."""
    averages = {
        name: {key: value.cpu() for key, value in getattr(tuner.rankallocator, name).items()}
        for name in AVERAGES
    }
    return {**averages, "rank_pattern": _config(tuner).rank_pattern or {}}


def load_allocator_state(tuner: AdaLoraModel, state: dict[str, Any], device: torch.device) -> None:
    """Restore what `allocator_state` returned."""
    for name in AVERAGES:
        values = {key: value.to(device) for key, value in state[name].items()}
        setattr(tuner.rankallocator, name, values)
    config = _config(tuner)
    config.rank_pattern = state["rank_pattern"] or config.rank_pattern


def remaining_triplets(tuner: AdaLoraModel) -> int:
    """Count the triplets whose singular value is not zero, over all layers."""
    adapter = tuner.trainable_adapter_name
    values = [p for n, p in tuner.model.named_parameters() if f"lora_E.{adapter}" in n]
    return int(sum((value != 0).sum() for value in values))
