"""The processes of a run meet: same settings everywhere, and each watches the others."""

import os
import threading
from typing import Any

import torch.distributed as dist
import yaml
from lightning.fabric.strategies.launchers.subprocess_script import _ChildProcessObserver
from lightning.pytorch.strategies import Strategy

from app.distributed import heartbeat
from app.distributed.collectives import world_size
from app.utils.errors import InputError


def install_setup_checks(strategy: Strategy, settings: str) -> None:
    """Let processes compare their settings, and watch each other, as soon as they have met.

    That is before data or model are loaded; Lightning has no hook so early.

    Args:
        strategy: The trainer's; its `setup_environment` brings the processes together.
        settings: The resolved configuration as YAML.
    """
    set_up = strategy.setup_environment

    def setup_environment() -> None:
        set_up()
        if world_size() > 1:
            heartbeat.start()
            disable_child_observer()
            check_same_settings(settings)

    strategy.setup_environment = setup_environment  # type: ignore[method-assign]


def disable_child_observer() -> None:
    """Keep Lightning from killing this process, which has started the others, when one of them ends.

    It would within five seconds, in the middle of whatever this process writes or says. The heartbeat
    tells the processes of each other from now on.
    """
    for thread in threading.enumerate():
        if isinstance(thread, _ChildProcessObserver):
            thread._child_processes = []


def check_same_settings(settings: str) -> None:
    """Raise InputError on all processes unless they were started with the same settings."""
    everyone: list[Any] = [None] * world_size()
    dist.all_gather_object(everyone, settings)
    for other, theirs in enumerate(everyone):
        if theirs != everyone[0]:
            raise InputError(
                f"process {other} was started with other settings than process 0: "
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

    Args:
        num_nodes: `trainer.num_nodes`.
        num_devices: Devices of a node, which is what `trainer.devices` comes to.
    """
    started = int(os.environ.get("WORLD_SIZE", num_nodes * num_devices))
    if started != num_nodes * num_devices:
        raise InputError(
            f"the launcher started {started} processes (WORLD_SIZE), but trainer.num_nodes={num_nodes} times "
            f"trainer.devices={num_devices} are {num_nodes * num_devices}: start as many, or set these two; "
            "several processes need --config strategies/ddp.yaml or strategies/fsdp.yaml"
        )
