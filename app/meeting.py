"""The processes of a run meet: same settings everywhere, and each watches the others."""

import threading
from typing import Any

import torch.distributed as dist
import yaml
from lightning.fabric.strategies.launchers.subprocess_script import _ChildProcessObserver
from lightning.pytorch.strategies import Strategy

from app import heartbeat
from app.errors import InputError
from app.processes import world_size


def meet(strategy: Strategy, settings: str) -> None:
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
            release_children()
            check_same_settings(settings)

    strategy.setup_environment = setup_environment  # type: ignore[method-assign]


def release_children() -> None:
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
