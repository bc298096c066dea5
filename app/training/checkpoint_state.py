"""What a checkpoint holds beside Lightning's own: trained weights, what they belong to, random states."""

import random
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from app.distributed.processes import world_size
from app.tracking.record import ModelRecord, RunRecord
from app.training.protocols import Factors
from app.utils.errors import InputError

SUBTRACTED = "starts"
"""Key of the subtracted factors, as earlier versions read it."""


def random_state() -> dict[str, Any]:
    """Return the state of this process's random generators, as plain data and tensors."""
    version, numbers, gauss = random.getstate()
    numpy_state: Any = np.random.get_state()  # noqa: NPY002 (the global one)
    name, keys, *rest = numpy_state
    state: dict[str, Any] = {
        "python": [version, list(numbers), gauss],
        "numpy": [name, torch.from_numpy(keys.astype(np.int64)), *rest],
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_random_state(state: dict[str, Any]) -> None:
    """Set this process's random generators to what `random_state` returned, here or elsewhere."""
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))  # noqa: NPY002
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def seed_anew(seed: int, rank: int, step: int) -> None:
    """Seed the generators of a process that the interrupted run did not have."""
    mixed = zlib.crc32(f"{seed} {rank} {step}".encode())
    random.seed(mixed)
    np.random.seed(mixed)  # noqa: NPY002
    torch.manual_seed(mixed)


def gather_states(state: dict[str, Any]) -> list[dict[str, Any]]:
    """Return every process's state, in the order of the processes."""
    if world_size() == 1:
        return [state]
    states: list[Any] = [None] * world_size()
    dist.all_gather_object(states, state)
    return states


def keep_trained(
    checkpoint: dict[str, Any], module: nn.Module, record: RunRecord, factors: Factors
) -> None:
    """Leave only trainable weights in a checkpoint, and add what they belong to.

    Args:
        checkpoint: Has the module's "state_dict".
        module: Its frozen weights come from the base model's name.
        record: Names the base model and the method.
        factors: What an initialization has subtracted from the base.
    """
    trainable = {name for name, p in module.named_parameters() if p.requires_grad}
    state = checkpoint["state_dict"]
    checkpoint["state_dict"] = {name: value for name, value in state.items() if name in trainable}
    checkpoint["base"] = {"name": record.model.name, "fingerprint": record.model.fingerprint}
    checkpoint["method"] = record.method
    if factors:
        checkpoint[SUBTRACTED] = {name: [A.cpu(), B.cpu()] for name, (A, B) in factors.items()}


def saved_factors(checkpoint: Mapping[str, Any]) -> Factors:
    """Return the factors that the run of a checkpoint had subtracted from the base."""
    return {name: (A, B) for name, (A, B) in checkpoint.get(SUBTRACTED, {}).items()}


def check_trained(checkpoint: Mapping[str, Any], module: nn.Module, model: ModelRecord) -> None:
    """Raise InputError unless a checkpoint fits the base model and the trainable weights of a module."""
    theirs = checkpoint["base"]
    if theirs["fingerprint"] != model.fingerprint:
        raise InputError(
            f"the checkpoint belongs to the base model {theirs['name']} ({theirs['fingerprint']}), but "
            f"model.name is {model.name} ({model.fingerprint}): set model.name or ckpt_path"
        )
    trainable = {name: p.shape for name, p in module.named_parameters() if p.requires_grad}
    saved = {name: value.shape for name, value in checkpoint["state_dict"].items()}
    for name in (*saved, *trainable):
        if saved.get(name) != trainable.get(name):
            shapes = [
                "no weight" if shape is None else f"one of shape {list(shape)}"
                for shape in (saved.get(name), trainable.get(name))
            ]
            raise InputError(
                f"the checkpoint has {shapes[0]} for {name.removeprefix('model.')}, but this model "
                f"trains {shapes[1]}: set model.adapter as that run had it, or another ckpt_path"
            )
