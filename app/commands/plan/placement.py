"""Where a run puts its weights, and how much memory there is."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import psutil
import torch
from lightning.pytorch.strategies import ModelParallelStrategy

from app.utils.errors import InputError

GIB = 2**30


@dataclass(frozen=True)
class Placement:
    """Where a run's processes put the weights.

    Attributes:
        strategy: The trainer's name of it, for the reader.
        devices: Processes on each node.
        num_nodes: Nodes.
        sharded: Whether frozen weights are spread over all processes; otherwise each holds everything.
        gather_dtype: Type in which sharded weights are gathered; None is their own.
        cpu_offload: Whether the shards live in host memory.
        reshard_after_forward: Whether a block's gathered weights are freed after its forward pass.
    """

    strategy: str
    devices: int = 1
    num_nodes: int = 1
    sharded: bool = False
    gather_dtype: torch.dtype | None = None
    cpu_offload: bool = False
    reshard_after_forward: bool = True

    @property
    def world_size(self) -> int:
        """Number of processes."""
        return self.devices * self.num_nodes


def read_placement(settings: Mapping[str, Any]) -> Placement:
    """Read off a trainer's settings where a run puts its weights.

    Args:
        settings: `strategy` (a name or an object), `devices`, `num_nodes` and `accelerator`; "auto" devices
            are those of this machine, 1 on the CPU.
    """
    strategy = settings.get("strategy") or "auto"
    name = strategy if isinstance(strategy, str) else type(strategy).__name__
    devices = _count(settings.get("devices", "auto"), str(settings.get("accelerator")))
    num_nodes = int(settings.get("num_nodes", 1))
    dtype = getattr(strategy, "param_dtype", None)
    if name == "auto":
        name = "ddp" if devices * num_nodes > 1 else "one process"
    return Placement(
        strategy=name,
        devices=devices,
        num_nodes=num_nodes,
        sharded="fsdp" in name.lower() or isinstance(strategy, ModelParallelStrategy),
        gather_dtype=None if dtype is None else getattr(torch, dtype),
        cpu_offload=bool(getattr(strategy, "cpu_offload", False)),
        reshard_after_forward=bool(getattr(strategy, "reshard_after_forward", True)),
    )


def _count(devices: Any, accelerator: str) -> int:
    """Count devices as the trainer does: "auto", -1, a number, "2", "0,1" or [0, 1]."""
    if str(devices) in ("auto", "-1"):
        return max(torch.cuda.device_count(), 1) if accelerator != "cpu" else 1
    if isinstance(devices, str) and "," in devices:
        return len([number for number in devices.split(",") if number.strip()])
    return len(devices) if isinstance(devices, list) else int(devices)


def device_memory(accelerator: str, processes: int, memory_gib: float | None) -> int:
    """Return the bytes that one process may use.

    Args:
        accelerator: The trainer's: "auto" takes a GPU where this machine has one.
        processes: Processes that share this machine's main memory, if the run is on the CPU.
        memory_gib: What the user says instead, for one device.

    Raises:
        InputError: A size that is not positive, or a GPU asked for that this machine does not have.
    """
    if memory_gib is not None:
        if not memory_gib > 0:
            raise InputError(f"--memory_gib is {memory_gib}: expected more than 0, such as 80")
        return round(memory_gib * GIB)
    if accelerator != "cpu" and torch.cuda.is_available():
        return int(torch.cuda.get_device_properties(0).total_memory)
    if accelerator not in ("cpu", "auto"):
        raise InputError(
            f"trainer.accelerator is {accelerator!r}, but this machine has none to ask how much memory "
            "it has: say so with --memory_gib, such as --memory_gib 80"
        )
    return psutil.virtual_memory().available // processes
