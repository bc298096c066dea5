"""Check that the processes of a run fit together."""

import os
from collections.abc import Callable
from typing import Any

import yaml

from app.distributed.processes import is_first_process, process_group, world_size
from app.utils.errors import InputError

RANKS = ("RANK", "NODE_RANK", "LOCAL_RANK", "SLURM_PROCID")
"""Variables by which launchers number the processes of a run."""

NUMBERS = (*RANKS, "WORLD_SIZE", "MASTER_PORT")


def check_rendezvous() -> None:
    """Raise InputError if this is one of several processes that cannot find each other."""
    for name in NUMBERS:
        value = os.environ.get(name, "0")
        if not value.isdecimal():
            raise InputError(f"the environment has {name}={value}: expected a whole number")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and "SLURM_PROCID" not in os.environ:
        _check_variables("WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    if "TORCHELASTIC_RUN_ID" in os.environ:
        _check_variables("TORCHELASTIC_RUN_ID", "RANK", "LOCAL_RANK", "GROUP_RANK", "WORLD_SIZE")


def _check_variables(given: str, *needed: str) -> None:
    missing = [name for name in needed if name not in os.environ]
    if missing:
        raise InputError(
            f"the environment has {given}={os.environ[given]}, but not {', '.join(missing)}: "
            f"start the processes with torchrun, which sets them all (launch/node.sh), or unset {given}"
        )


def check_processes(num_nodes: int, num_devices: int, global_rank: int, local_rank: int) -> None:
    """Raise InputError unless the launcher started as many processes as the trainer counts on, and this is one.

    Args:
        num_nodes: Of the trainer.
        num_devices: Of a node: what `trainer.devices` comes to.
        global_rank: What the trainer takes this process for.
        local_rank: The same on its node.
    """
    from lightning.pytorch.plugins.environments import SLURMEnvironment  # slow

    expected = num_nodes * num_devices
    wanted = (
        f"trainer.num_nodes={num_nodes} times trainer.devices={num_devices} are {expected}: start as "
        "many, or set these two; several processes need --config strategies/ddp.yaml or strategies/fsdp.yaml"
    )
    name = "WORLD_SIZE"
    if name not in os.environ and SLURMEnvironment.detect():
        name = "SLURM_NTASKS"
    started = int(os.environ.get(name, expected))
    if started != expected:
        raise InputError(f"the launcher started {started} processes ({name}), but {wanted}")
    known = global_rank < expected and local_rank < num_devices
    if not known or is_first_process() != (global_rank == 0):
        given = ", ".join(f"{name}={os.environ[name]}" for name in RANKS if name in os.environ)
        raise InputError(
            f"the environment has {given}, which names one of several processes, but {wanted}; unset what an "
            "earlier launcher has left"
        )
    if expected > 1 and "LOCAL_RANK" in os.environ:
        _check_variables("LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def check_same_settings(settings: Callable[[], str]) -> None:
    """Raise InputError on all processes unless they have the same resolved configuration.

    `settings` returns it as YAML, which takes a while and is not asked of a process that is alone.
    """
    if world_size() == 1:
        return
    everyone: list[Any] = [None] * world_size()
    process_group().all_gather_object(everyone, settings())
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
