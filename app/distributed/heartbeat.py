"""Who of a run's processes is alive: each one beats, and watches the others."""

import atexit
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import NoReturn

import torch.distributed as dist

from app.distributed.collectives import global_rank, world_size

PERIOD = 1.0  # seconds between two beats
SILENCE = 4  # periods without a beat, after which a process is taken for dead once contact is lost
PATIENCE = 60
"""Periods without a beat after which a process is given up unasked.

A beat waits for its interpreter, which a single call (reading a large file, swapped memory) can hold for
many seconds; nothing here holds it for a minute.
"""


class Heartbeat:
    """Count up in the processes' common store once a period, and follow the others' counts.

    Two threads, whatever the main thread waits for: one talks to the store, which can keep it waiting
    without end; the other notices that, too. Time is counted in periods of this process, so that a whole
    run that was suspended goes on.

    Args:
        patience: Periods of silence after which a process is given up, and this one ends.
    """

    def __init__(self, patience: int = PATIENCE) -> None:
        self.patience: float = patience
        # A client of its own: the main thread's is blocked while it waits for a key.
        # torch keeps the store of the processes' meeting to itself.
        default = dist.distributed_c10d._get_default_store()
        self._store = dist.PrefixStore("heartbeat", default).clone()  # type: ignore[attr-defined]
        self._rank, self._world_size = global_rank(), world_size()
        self._rounds = 0  # how often the store has answered
        self._looks = 0  # how often the others have been looked at
        self._counts: dict[int, bytes] = {}
        self._missed = [0] * self._world_size
        self._stopped = threading.Event()
        self._threads = [
            threading.Thread(target=self._every_period, args=(act,), daemon=True, name="heartbeat")
            for act in (self._beat, self._watcher())
        ]
        for thread in self._threads:
            thread.start()

    def _every_period(self, act: Callable[[], None]) -> None:
        while True:
            try:
                act()
            except RuntimeError:  # the store is gone, and with it this thread's use
                return
            if self._stopped.wait(PERIOD):
                return

    def _beat(self) -> None:
        self._store.set(str(self._rank), str(self._rounds))
        if len(self._counts) < self._world_size:
            # Asking for a count that is not there yet would wait for it.
            there = [other for other in range(self._world_size) if self._store.check([str(other)])]
        else:
            there = list(range(self._world_size))
        counts = self._store.multi_get([str(other) for other in there])
        self._counts = dict(zip(there, counts, strict=True))
        self._rounds += 1

    def _watcher(self) -> Callable[[], None]:
        rounds, counts = 0, self._counts

        def watch() -> None:
            nonlocal rounds, counts
            if self._rounds == rounds:
                # The store lives in the first process, or dies with the launcher that serves it.
                self._missed[0] += 1
            else:
                for other in range(self._world_size):
                    still = counts.get(other) == self._counts.get(other)
                    self._missed[other] = self._missed[other] + 1 if still else 0
            rounds, counts = self._rounds, self._counts
            self._looks += 1
            if given_up := self._silent_for(self.patience):
                seconds = f"no sign of life for {self.patience * PERIOD:.0f} s"
                _leave_without(given_up, self._world_size, seconds)

        return watch

    def _silent_for(self, periods: float) -> list[int]:
        missed = enumerate(self._missed)
        return [other for other, count in missed if count >= periods and other != self._rank]

    def silent(self) -> list[int]:
        """Return the other processes whose heart stands still; takes a few periods."""
        until = self._looks + SILENCE + 2
        while self._looks < until:
            time.sleep(PERIOD / 10)
        return self._silent_for(SILENCE)

    def stop(self) -> None:
        """End the threads; one that waits for a store without end is left behind."""
        self._stopped.set()
        for thread in self._threads:
            thread.join(PERIOD)


_own: Heartbeat | None = None


def start() -> None:
    """Let this process beat and watch from now on, unless it does already or is alone."""
    global _own
    if _own is None and world_size() > 1:
        _own = Heartbeat()
        # A thread that is inside torch when the interpreter goes would abort the process.
        atexit.register(_own.stop)


def disable_watchdog() -> None:
    """Do not end because of others any more: this process is about to end by itself."""
    if _own is not None:
        _own.patience = float("inf")


def leave() -> None:
    """End the talk with the other processes, if there was any; all of them do."""
    global _own
    if dist.is_available() and dist.is_initialized():
        dist.barrier()
        if _own is not None:
            _own.stop()
            _own = None
        dist.destroy_process_group()


def lost_contact(error: BaseException) -> bool:
    """Return whether an exception may mean that another process does not answer any more."""
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


def abort_after_peer_failure(lost: RuntimeError) -> NoReturn:
    """End after `lost_contact`: say which process is gone, or show the error if all are alive."""
    silent = _own.silent() if _own is not None else []
    if silent:
        _leave_without(silent, world_size(), str(lost).splitlines()[0])
    traceback.print_exception(lost)
    sys.stderr.flush()
    os._exit(1)


def _leave_without(silent: list[int], processes: int, why: str) -> NoReturn:
    print(
        f"error: process {', '.join(map(str, silent))} of {processes} does not answer any more ({why}). "
        "Look at what it printed last; `--ckpt_path last` goes on from the last checkpoint",
        file=sys.stderr,
        flush=True,
    )
    os._exit(1)  # leaving in order would wait for it
