"""Find out which process of a run has died, when the others notice only that somebody has."""

import os
import sys
import threading
import time
from contextlib import suppress
from typing import NoReturn

import torch.distributed as dist

from app.processes import rank, world_size

PERIOD = 1.0  # seconds between two beats
SILENCE = 4 * PERIOD  # a process that is silent for so long is taken for dead


class Heartbeat(threading.Thread):
    """Count up in the processes' common store once a second, whatever the main thread waits for."""

    def __init__(self) -> None:
        super().__init__(daemon=True, name="heartbeat")
        self._store = _store()
        self._stopped = threading.Event()
        self._beats = 0
        self._beat()

    def _beat(self) -> None:
        self._beats += 1
        self._store.set(str(rank()), str(self._beats))

    def run(self) -> None:
        """Beat until stopped, or until the store is gone."""
        while not self._stopped.wait(PERIOD):
            try:
                self._beat()
            except RuntimeError:
                return

    def stop(self) -> None:
        """End the thread."""
        self._stopped.set()


def silent_processes() -> list[int]:
    """Return the processes whose heart has stopped beating; takes at most three times four periods."""
    before = _beats()
    if before is not None:
        time.sleep(SILENCE)
    after = _beats()
    if before is None or after is None:
        return [0]  # the store lives in the first process, or dies with the launcher that serves it
    return [other for other in range(world_size()) if before[other] == after[other]]


def _store() -> dist.Store:
    # torch keeps the store of the processes' meeting to itself.
    return dist.PrefixStore("heartbeat", dist.distributed_c10d._get_default_store())


def _beats() -> list[bytes] | None:
    """Return every process's count, or None if the store does not answer."""
    found: list[bytes] = []

    def ask() -> None:
        with suppress(RuntimeError):
            store = _store()
            found.extend([store.get(str(other)) for other in range(world_size())])

    # A store whose process is stopped, not dead, lets its clients wait without end.
    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(SILENCE)
    return found if len(found) == world_size() else None


def lost_contact(error: BaseException) -> bool:
    """Return whether an exception means that another process does not answer any more."""
    if world_size() == 1 or not isinstance(error, RuntimeError):
        return False
    if isinstance(error, dist.DistNetworkError | dist.DistBackendError):
        return True
    told = str(error).lower()
    signs = (
        "closed by peer",
        "connection reset",
        "timed out",
        "broken pipe",
        "socket",
        "gloo",
        "nccl",
    )
    return any(sign in told for sign in signs)


def leave_without(lost: RuntimeError) -> NoReturn:
    """Say which process is gone, and end this one without waiting for it."""
    silent = silent_processes()
    who = f"process {', '.join(map(str, silent))}" if silent else "another process"
    print(
        f"error: {who} of {world_size()} does not answer any more ({str(lost).splitlines()[0]}). "
        "Look at what it printed last; `--ckpt_path last` goes on from the last checkpoint",
        file=sys.stderr,
        flush=True,
    )
    os._exit(1)  # leaving in order would wait for it
