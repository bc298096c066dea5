"""Collectives of the processes of a run; with one process, nothing is sent."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from app.distributed.processes import global_rank, world_size
from app.utils.errors import InputError

T = TypeVar("T")


def raise_on_all_ranks(make: Callable[[], T]) -> T:
    """Return what this process makes, once all processes have made theirs without an error.

    A process that failed alone would leave the others waiting for it at their next collective. All processes
    call this function at the same place.

    Raises:
        InputError: An InputError of any process, or another's failure.
        Exception: What `make` raises here.
    """
    if world_size() == 1:
        return make()
    failure: Exception | None = None
    try:
        made = make()
    except Exception as error:
        failure = error
    messages: list[Any] = [None] * world_size()
    text = None
    if failure is not None:
        prefix = f"process {global_rank()} failed: {type(failure).__name__}: "
        text = str(failure) if isinstance(failure, InputError) else f"{prefix}{failure}"
    dist.all_gather_object(messages, text)
    if failure is not None:
        raise failure
    for message in messages:
        if message is not None:
            raise InputError(message)
    return made


def from_first_process(make: Callable[[], T]) -> T:
    """Return what the first process makes, to all processes; if it fails, all raise (`raise_on_all_ranks`)."""
    made: list[Any] = [raise_on_all_ranks(lambda: make() if global_rank() == 0 else None)]
    if world_size() > 1:
        dist.broadcast_object_list(made, src=0)
    return made[0]


def sum_over_processes(tensor: Tensor) -> Tensor:
    """Sum a tensor over all processes, in place; all get the sum."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def sum_in_one_buffer(tensors: list[Tensor]) -> None:
    """Sum each tensor over all processes, which have the same shapes, with one collective for each dtype."""
    if world_size() == 1:
        return
    for dtype in sorted({tensor.dtype for tensor in tensors}, key=str):
        group = [tensor for tensor in tensors if tensor.dtype == dtype]
        flat = torch.cat([tensor.reshape(-1) for tensor in group])
        dist.all_reduce(flat)
        for tensor, part in zip(group, flat.split([t.numel() for t in group]), strict=True):
            tensor.copy_(part.view_as(tensor))


def gather_numbers(number: int, device: torch.device) -> list[int]:
    """Return every process's number, in the order of the processes."""
    numbers = torch.zeros(world_size(), dtype=torch.int64, device=device)
    numbers[global_rank()] = number
    return sum_over_processes(numbers).tolist()


def largest_over_processes(number: int, device: torch.device) -> int:
    """Return the largest of all processes' numbers."""
    return max(gather_numbers(number, device))


def any_rank(flag: bool, device: torch.device) -> bool:
    """Return whether the flag is set on any process."""
    return bool(largest_over_processes(int(flag), device))


def broadcast(tensor: Tensor) -> Tensor:
    """Return the first process's values of a tensor, contiguous; all have one of this shape."""
    tensor = tensor.contiguous()
    if world_size() > 1:
        dist.broadcast(tensor, 0)
    return tensor
