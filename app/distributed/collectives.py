"""What the processes of a run tell each other; with one process, nothing."""

import os
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from app.utils.errors import InputError

T = TypeVar("T")


def world_size() -> int:
    """Return the number of processes."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def global_rank() -> int:
    """Return this process's number, 0 to world_size - 1."""
    return dist.get_rank() if world_size() > 1 else 0


def is_first_process() -> bool:
    """Return whether this is the first process of the run, also before the processes have met.

    Launchers say so in the environment: torchrun by RANK, Slurm by SLURM_PROCID, Lightning by NODE_RANK
    and LOCAL_RANK.
    """
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank() == 0
    for names in (("RANK",), ("NODE_RANK", "LOCAL_RANK"), ("SLURM_PROCID",)):
        told = [os.environ[name] for name in names if name in os.environ]
        if told:
            return not any(map(int, told))
    return True


def raise_on_all_ranks(make: Callable[[], T]) -> T:
    """Return what this process makes, once all processes have made theirs without an error.

    A process that failed alone would leave the others waiting for it at their next exchange.

    Args:
        make: What may fail on one process only; all processes call `together` at the same place.

    Raises:
        InputError: An InputError of any process, or another's failure.
        Exception: What `make` raises here.
    """
    if world_size() == 1:
        return make()
    failed: Exception | None = None
    try:
        made = make()
    except Exception as error:
        failed = error
    told: list[Any] = [None] * world_size()
    mine = None if failed is None else (isinstance(failed, InputError), _named(failed))
    dist.all_gather_object(told, mine)
    if failed is not None:
        raise failed
    for other, failure in enumerate(told):
        if failure is not None:
            theirs_to_mend, text = failure
            raise InputError(text if theirs_to_mend else f"process {other} failed: {text}")
    return made


def _named(error: Exception) -> str:
    return str(error) if isinstance(error, InputError) else f"{type(error).__name__}: {error}"


def from_first_process(make: Callable[[], T]) -> T:
    """Return what the first process makes, to every process; if it fails, all raise (see `together`)."""
    made: list[Any] = [raise_on_all_ranks(lambda: make() if global_rank() == 0 else None)]
    if world_size() > 1:
        dist.broadcast_object_list(made, src=0)
    return made[0]


def sum_over_processes(tensor: Tensor) -> Tensor:
    """Add a tensor up over all processes, in place; every process gets the sum."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def sum_in_one_buffer(tensors: list[Tensor]) -> None:
    """Add each tensor up over all processes, in place, with one collective for each dtype.

    Args:
        tensors: The same list of shapes on every process.
    """
    if world_size() == 1:
        return
    for dtype in sorted({tensor.dtype for tensor in tensors}, key=str):
        group = [tensor for tensor in tensors if tensor.dtype == dtype]
        flat = torch.cat([tensor.reshape(-1) for tensor in group])
        dist.all_reduce(flat)
        parts = flat.split([tensor.numel() for tensor in group])
        torch._foreach_copy_(group, [p.view_as(t) for p, t in zip(parts, group, strict=True)])


def gather_numbers(number: int, device: torch.device) -> list[int]:
    """Return every process's number, in the order of the processes."""
    told = torch.zeros(world_size(), dtype=torch.int64, device=device)
    told[global_rank()] = number
    return sum_over_processes(told).tolist()


def broadcast(tensor: Tensor) -> Tensor:
    """Return the first process's values of a tensor, contiguous; all have one of this shape."""
    tensor = tensor.contiguous()
    if world_size() > 1:
        dist.broadcast(tensor, 0)
    return tensor


def largest_over_processes(number: int, device: torch.device) -> int:
    """Return the largest of all processes' numbers."""
    if world_size() == 1:
        return number
    told = torch.tensor(number, device=device)
    dist.all_reduce(told, dist.ReduceOp.MAX)
    return int(told)


def any_rank(flag: bool, device: torch.device) -> bool:
    """Return whether the flag is set on any process."""
    return bool(sum_over_processes(torch.tensor(float(flag), device=device)) > 0)
