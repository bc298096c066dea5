"""Let processes that train take turns: each trains one epoch when it is told to, and reports what it took.

A contender calls `ready` once its model is loaded, `begin` before each epoch and `end` behind it. It waits
in `begin`, so that it does nothing at all while another one trains.
"""

import ctypes
import json
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


class Turns:
    """One process's side: standard input is a socket, on which a line says go, and JSON says what it took.

    What is printed goes elsewhere, then. The process ends when the other side closes the socket.
    """

    def __init__(self) -> None:
        self._line = socket.socket(fileno=0).makefile("rw")
        self._measured: dict[str, float] | None = None
        self._started = (0.0, 0.0)

    def loaded(self, model: Any) -> None:
        """Note the resident memory of the loaded model, and the bytes of what is trained."""
        for weight in model.parameters():
            float(weight.detach().sum())  # pages of a mapped file are resident once they are read
        self._loaded_mib = resident_mib("VmRSS")
        trained = (weight for weight in model.parameters() if weight.requires_grad)
        self._trained_bytes = sum(weight.numel() * weight.element_size() for weight in trained)

    def ready(self, first_pass: Callable[[], Any]) -> None:
        """Report the loss of the batch that all contenders compare.

        Args:
            first_pass: Passes forward and backward through that batch and returns its loss; nothing changes. It
                is called again before each epoch, so that the first step finds memory as later ones do.
        """
        self._first_pass = first_pass
        ready = {"loaded_mib": self._loaded_mib, "trained_bytes": self._trained_bytes}
        self._say({"loss": float(first_pass()), **ready})

    def begin(self) -> None:
        """Report the epoch before, if there was one; wait to be told to train; warm up; start the clock."""
        if self._measured is not None:
            self._say(self._measured)
        ctypes.CDLL(None).malloc_trim(
            0
        )  # several that wait would fill the machine with free memory
        if not self._line.readline():
            os._exit(0)  # nothing that a loop does at its end is measured
        self._first_pass()
        Path("/proc/self/clear_refs").write_text("5")  # the kernel begins a new peak
        self._started = (time.perf_counter(), time.process_time())

    def end(self) -> None:
        """Stop the clock."""
        seconds, cpu_seconds = time.perf_counter(), time.process_time()
        peak = resident_mib("VmHWM")
        self._measured = {
            "seconds": seconds - self._started[0],
            "cpu_seconds": cpu_seconds - self._started[1],
            "peak_mib": peak,
            "excess_mib": peak - self._loaded_mib,
        }

    def _say(self, what: dict[str, Any]) -> None:
        print(json.dumps(what), file=self._line, flush=True)


def resident_mib(field: str) -> float:
    """Return the resident memory of this process: VmRSS is the present one, VmHWM the peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) / 1024


def read_rows(task: Path) -> tuple[dict[str, Any], list[dict[str, list[int]]]]:
    """Return the settings of a task, and its rows in the contender's order with unshifted labels."""
    settings = json.loads(task.read_text())
    rows = [
        {"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer}
        for prompt, answer in settings.pop("rows")
    ]
    return settings, rows
