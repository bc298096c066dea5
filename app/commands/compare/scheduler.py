"""Train and test the cells of a grid, each in its own processes, beside others who do the same.

A cell's lock belongs to whoever works on it, and is handed down to the process that trains: it is held as
long as that process lives, even if the command that started it was killed. What is finished is read from
the run folders, so that nothing has to be kept in step with them.
"""

import fcntl
import shlex
import signal
import subprocess
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol

from app.commands.compare.cells import (
    CELLS_FOLDER,
    FAILURE_FILE,
    LOCK_FILE,
    LOG_FILE,
    Cell,
    CellState,
    state_of,
)
from app.utils.errors import DivergedError
from app.utils.files import write_json
from app.utils.signals import Stopped, exit_status

POLL_SECONDS = 0.2


class Process(Protocol):
    """What is needed of a running command."""

    def poll(self) -> int | None:
        """Return its exit status; None while it runs."""

    def wait(self) -> int:
        """Wait for its end."""

    def send_signal(self, sig: int) -> None:
        """Send it a signal."""


Start = Callable[[Sequence[str], IO[bytes], int], Process]
Command = Callable[[Cell, CellState], Sequence[str]]


def start_process(command: Sequence[str], log: IO[bytes], lock: int) -> Process:
    """Start a command that writes to a log and inherits the cell's lock."""
    return subprocess.Popen(
        list(command),
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        pass_fds=(lock,),
    )


@dataclass
class _Work:
    cell: Cell
    folder: Path
    lock: IO[Any]
    log: IO[bytes]
    begin: float
    process: Process
    log_start: int = 0


class GridRun:
    """The work on a grid, shared with whoever works on the same folder.

    Args:
        cells: The cells wanted, in this order.
        folder: The comparison's folder; cells live in its `cells/`.
        command: Returns what to start next for a cell that is not finished: training, then the test.
        jobs: Cells at once.
        start: Starts a command.
        benchmarks: Those that finished cells have been asked.
        say: Prints a line.
    """

    def __init__(
        self,
        cells: Sequence[Cell],
        folder: Path,
        command: Command,
        jobs: int = 1,
        start: Start = start_process,
        benchmarks: Collection[str] = (),
        say: Callable[[str], None] = lambda line: print(line, flush=True),
    ) -> None:
        self.cells = list(cells)
        self.folder = folder / CELLS_FOLDER
        self.command = command
        self.jobs = jobs
        self.start = start
        self.benchmarks = benchmarks
        self.say = say
        self.states = {cell: self._state(self.folder / cell.name) for cell in self.cells}
        self._failed_before = {
            cell: self._failure(cell)
            for cell, found in self.states.items()
            if found.state == "failed"
        }
        self._running: list[_Work] = []
        self._seconds: list[float] = []  # of each cell that this process has trained

    def _state(self, folder: Path) -> CellState:
        return state_of(folder, self.benchmarks)

    def run(self) -> None:
        """Work until every cell is finished or has failed.

        Raises:
            Stopped: A signal came; the cells at work were asked to save and have ended.
        """
        pending = [
            cell
            for cell, found in self.states.items()
            if found.state not in ("finished", "diverged")
        ]
        self.say(self._progress("start"))
        waiting = False
        try:
            while pending or self._running:
                for work in list(self._running):
                    self._advance(work)
                for cell in list(pending):
                    if len(self._running) == self.jobs:
                        break
                    if self._take(cell):
                        pending.remove(cell)
                if pending and not self._running and not waiting:
                    names = ", ".join(cell.name for cell in pending)
                    self.say(f"waiting for cells that another process trains: {names}")
                waiting = bool(pending) and not self._running
                if pending or self._running:
                    time.sleep(POLL_SECONDS)
        except Stopped as stopped:
            self._stop(stopped)
        finally:
            for work in self._running:
                self._release(work)

    def _take(self, cell: Cell) -> bool:
        """Begin with a cell; False if somebody else works on it."""
        folder = self.folder / cell.name
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / LOCK_FILE).open("a")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.close()
            return False
        found = self._state(folder)  # somebody may have had it in the meantime
        again = found.state == "failed" and self._failed_before.get(cell) == self._failure(cell)
        if found.state in ("finished", "diverged") or (found.state == "failed" and not again):
            lock.close()
            self._note(cell, found, "was trained by another process")
            return True
        (folder / FAILURE_FILE).unlink(missing_ok=True)
        log = (folder / LOG_FILE).open("ab")
        begin = time.perf_counter()
        process, log_start = self._launch(cell, self._state(folder), log, lock)
        self._running.append(_Work(cell, folder, lock, log, begin, process, log_start))
        self.say(f"{cell.name}: {'tests' if found.run else 'trains'}; {folder / LOG_FILE}")
        return True

    def _launch(
        self, cell: Cell, found: CellState, log: IO[bytes], lock: IO[Any]
    ) -> tuple[Process, int]:
        command = self.command(cell, found)
        log.write(f"$ {shlex.join(command)}\n".encode())
        log.flush()
        where = log.tell()  # before the start: the process moves this position
        return self.start(command, log, lock.fileno()), where

    def _advance(self, work: _Work) -> None:
        status = work.process.poll()
        if status is None:
            return
        before = self.states[work.cell]
        found = self._state(work.folder)
        if status == 0 and found.state == "trained" and before.state != "trained":
            self.states[work.cell] = found
            work.process, work.log_start = self._launch(work.cell, found, work.log, work.lock)
            return
        self._running.remove(work)
        if found.state != "finished":
            self._fail(work, status)
            found = self._state(work.folder)
        else:
            self._seconds.append(time.perf_counter() - work.begin)
        self._release(work)
        self._note(work.cell, found, found.state)

    def _fail(self, work: _Work, status: int) -> None:
        with (work.folder / LOG_FILE).open("rb") as stream:
            stream.seek(work.log_start)
            lines = stream.read().decode(errors="replace").splitlines()
        message = failure_message(lines, status)
        cell = work.cell
        told = {
            "method": cell.method,
            "learning_rate": cell.learning_rate,
            "seed": cell.seed,
            "diverged": status == DivergedError.exit_status,
            "message": message,
            "time": time.time(),
        }
        write_json(work.folder / FAILURE_FILE, told)

    def _failure(self, cell: Cell) -> bytes:
        path = self.folder / cell.name / FAILURE_FILE
        return path.read_bytes() if path.is_file() else b""

    def _release(self, work: _Work) -> None:
        work.log.close()
        work.lock.close()

    def _note(self, cell: Cell, found: CellState, what: str) -> None:
        self.states[cell] = found
        reason = f": {found.message}" if found.message else ""
        self.say(self._progress(f"{cell.name} {what}{reason}"))

    def _progress(self, told: str) -> str:
        done = [found.state for found in self.states.values()]
        finished, failed = done.count("finished"), done.count("failed") + done.count("diverged")
        left = len(done) - finished - failed
        line = f"[{finished}/{len(done)} finished"
        line += f", {failed} failed" if failed else ""
        if left and self._seconds:
            mean = sum(self._seconds) / len(self._seconds)
            line += f", about {duration(mean * left / self.jobs)} left"
        return f"{line}] {told}"

    def _stop(self, stopped: Stopped) -> None:
        """Let the cells at work save and end."""
        # Ctrl-C has reached them already, and a second one would not let them save.
        interrupted = stopped.status == exit_status(signal.SIGINT)
        number = signal.SIGTERM if interrupted else stopped.status - 128
        for work in self._running:
            if work.process.poll() is None:
                work.process.send_signal(number)
        for work in self._running:
            work.process.wait()
        done = sum(found.state == "finished" for found in self.states.values())
        raise Stopped(
            stopped.status,
            f"stopped with {done} of {len(self.cells)} cells finished; the same command goes on",
        ) from stopped


def failure_message(lines: Sequence[str], status: int) -> str:
    """Say why a command failed, from what it printed last."""
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    if errors:
        return errors[-1]
    if status < 0:
        name = signal.Signals(-status).name
        hint = ", as the kernel does where memory runs out" if -status == signal.SIGKILL else ""
        return f"ended by {name}{hint}"
    spoken = [line.strip() for line in lines if line.strip()]
    last = spoken[-1] if spoken else "it said nothing"
    return f"exit status {status}: {last}"


def duration(seconds: float) -> str:
    """Write seconds as `45 s`, `12 min` or `3 h 20 min`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"
