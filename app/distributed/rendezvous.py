"""Check that the processes of a run fit together."""

import os
from collections.abc import Callable
from typing import Any

import torch.distributed as dist
import yaml

from app.distributed.collectives import world_size
from app.utils.errors import InputError


def check_rendezvous() -> None:
    """Raise InputError if this is one of several processes that cannot find each other."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or "SLURM_PROCID" in os.environ:
        return
    needed = ("LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in needed if name not in os.environ]
    if missing:
        raise InputError(
            f"the environment has WORLD_SIZE={os.environ['WORLD_SIZE']}, but not {', '.join(missing)}: "
            "start the processes with torchrun, which sets them all (launch/node.sh), or unset WORLD_SIZE"
        )


def check_number_of_processes(num_nodes: int, num_devices: int) -> None:
    """Raise InputError unless the launcher started as many processes as the trainer counts on.

    `num_devices` of a node are what `trainer.devices` comes to.
    """
    expected = num_nodes * num_devices
    started = int(os.environ.get("WORLD_SIZE", expected))
    if started != expected:
        raise InputError(
            f"the launcher started {started} processes (WORLD_SIZE), but trainer.num_nodes={num_nodes} times "
            f"trainer.devices={num_devices} are {expected}: start as many, or set these two; "
            "several processes need --config strategies/ddp.yaml or strategies/fsdp.yaml"
        )


def check_same_settings(settings: Callable[[], str]) -> None:
    """Raise InputError on all processes unless they have the same resolved configuration.

    `settings` returns it as YAML, which takes a while and is not asked of a process that is alone.
    """
    if world_size() == 1:
        return
    everyone: list[Any] = [None] * world_size()
    dist.all_gather_object(everyone, settings())
    for number, theirs in enumerate(everyone):
        if theirs != everyone[0]:
            raise InputError(
                f"process {number} was started with other settings than process 0: "
                f"{first_difference(yaml.safe_load(everyone[0]), yaml.safe_load(theirs))}. "
                "Give all processes the same command line and files"
            )


def first_difference(first: Any, other: Any, name: str = "") -> str:
    """Name the first setting that differs, with both values."""
    if isinstance(first, dict) and isinstance(other, dict):
        for key in [*first, *(key for key in other if key not in first)]:
            if first.get(key) != other.get(key):
                inner = f"{name}.{key}" if name else str(key)
                return first_difference(first.get(key), other.get(key), inner)
    return f"{name} is {other!r}, not {first!r}"
