"""Handle the signals that end a run: at its next step while it trains, at once at any other time."""

import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any

STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class Stopped(BaseException):
    """End a run because of a signal; not an Exception, so that no library handles it as an error.

    The program exits with `status` and prints `line`. `together`: all processes of the run stop at one place.
    """

    def __init__(self, status: int, line: str, together: bool = False) -> None:
        super().__init__(line)
        self.status = status
        self.line = line
        self.together = together


class StopSignals:
    """Handlers of SIGTERM, SIGINT (Ctrl-C) and SIGUSR1 (Slurm's warning) while this context lasts."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None  # what asked to stop
        self.deferred = False  # whether a signal is only noted, to stop at training's next step
        self.ending = False  # whether the run is ending anyway, so that only a second Ctrl-C counts
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopSignals":
        self._before = {number: signal.getsignal(number) for number in STOPPING}
        self.install()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if threading.current_thread() is threading.main_thread():
            for number, handler in self._before.items():
                signal.signal(number, handler if handler is not None else signal.SIG_DFL)

    def install(self) -> None:
        """Install the handlers, also over those that somebody else has installed since."""
        if threading.current_thread() is threading.main_thread():  # others may install none
            for number in STOPPING:
                signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        again = self.received is not None and number == signal.SIGINT
        self.received = signal.Signals(number)
        name = self.received.name
        if again:
            os.write(2, b"\nCtrl-C again: stopped at once; complete checkpoints stay\n")
            os._exit(exit_status(self.received))
        if self.ending:
            return
        if not self.deferred:
            raise Stopped(exit_status(self.received), f"{name}: stopped before the first step")
        # print() is not allowed to interrupt itself
        os.write(2, f"\n{name}: stops after this step, with a checkpoint\n".encode())


def exit_status(number: signal.Signals) -> int:
    """Return what a shell reports of a program that a signal has ended."""
    return 128 + int(number)
