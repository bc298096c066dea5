"""How the processes of a run end: together, or soon after one of them is lost.

A private name of torch stands here alone: `_get_default_store`, the process group's key-value store. Through it
processes meet whatever collectives they are in; no public API of torch 2.13 returns it.
"""

import os
import sys
import time
import traceback
from collections.abc import Iterable
from contextlib import suppress
from typing import Any, NoReturn

from app.distributed.processes import global_rank, process_group, world_size

GRACE = 10.0
"""Seconds that a process that has failed waits for the others to fail likewise."""


def shutdown() -> None:
    """Wait for all processes and destroy the process group, if there is one."""
    if (dist := process_group()) is not None:
        dist.barrier()
        dist.destroy_process_group()


def print_failure(line: str) -> None:
    """Print an error, which the other processes leave out if the first one has printed the same."""
    rank, store = global_rank(), _store()
    if rank > 0:
        ends = time.monotonic() + GRACE / 5
        with suppress(RuntimeError):  # the first process, which keeps the store, is gone
            while not store.check(["failure"]) and time.monotonic() < ends:
                time.sleep(0.05)
            if store.check(["failure"]) and store.get("failure").decode() == line:
                return
    print(line, file=sys.stderr, flush=True)
    if store is not None and rank == 0:
        store.set("failure", line)


def wait_for_same_failure() -> None:
    """Wait until all processes have come here, which most errors of input lead to, at most GRACE.

    Launchers kill all processes once one has ended with a bad status: the first to end would take from the
    others their last lines, and under Lightning's launcher from the command its exit status.
    """
    if world_size() == 1:
        return
    store, others = _store(), range(1, world_size())
    ends = time.monotonic() + GRACE

    def come(name: str, ranks: Iterable[int]) -> None:
        # `store.wait` prints a warning of its own when its time is over.
        while not store.check([f"{name}/{rank}" for rank in ranks]) and time.monotonic() < ends:
            time.sleep(0.05)

    with suppress(RuntimeError):  # the first process, which keeps the store, is gone
        store.set(f"failed/{global_rank()}", "")
        come("failed", (0, *others))
        if global_rank() > 0:
            store.set(f"left/{global_rank()}", "")
        else:
            come("left", others)  # so that the others do not lose the store


def _store() -> Any:
    group = process_group()
    return None if group is None else group.distributed_c10d._get_default_store()


def is_peer_failure(error: BaseException) -> bool:
    """Return whether a collective failed: another process is gone, or exceeded the timeout.

    torch raises a `DistError` for NCCL and for the store. For gloo it raises a plain RuntimeError, which only
    the path of gloo's source in its message tells from others.
    """
    if world_size() == 1 or not isinstance(error, RuntimeError):
        return False
    import torch.distributed as dist  # there, as there are other processes

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
