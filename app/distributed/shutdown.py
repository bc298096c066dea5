"""How the processes of a run end: together, or soon after one of them is lost."""

import os
import sys
import traceback
from typing import NoReturn

import torch.distributed as dist

from app.distributed.collectives import world_size


def shutdown() -> None:
    """Wait for all processes and destroy the process group, if there is one."""
    if dist.is_available() and dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def is_peer_failure(error: BaseException) -> bool:
    """Return whether a collective failed: another process is gone, or exceeded the timeout.

    torch raises a `DistError` for NCCL and for the store. For gloo it raises a plain RuntimeError, which only
    the path of gloo's source in its message tells from others.
    """
    if world_size() == 1 or not isinstance(error, RuntimeError):
        return False
    return isinstance(error, dist.DistError) or "/gloo/" in str(error)


def abort_after_peer_failure(error: RuntimeError) -> NoReturn:
    """Print what `is_peer_failure` recognised and exit with status 1.

    The traceback is printed too, unless gloo says that a connection was lost: where this process waited in
    vain is where the other one is missing.
    """
    reason = str(error).splitlines()[0]
    if "remote worker" not in reason:
        traceback.print_exception(error)
    print(
        f"error: another of the {world_size()} processes has ended, or did not answer within "
        f"trainer.strategy.timeout ({reason}). Look at what it printed last; `--ckpt_path last` goes on from "
        "the last checkpoint",
        file=sys.stderr,
        flush=True,
    )
    os._exit(1)  # destroying the process group would wait for the other process
