"""Train and test the cells of a grid, each in its own processes, beside other commands that do the same.

The process that trains inherits the lock of its cell, which is held as long as that process lives, even if the
command that started it was killed. What is finished is read from the run folders alone.
"""

import fcntl
import shlex
import signal
import subprocess
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

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

NextCommand = Callable[[Cell, CellState], Sequence[str]]


def start_process(command: Sequence[str], log: IO[bytes], lock: int) -> subprocess.Popen[bytes]:
    """Start a command that writes to a log and inherits the cell's lock."""
    nothing, same = subprocess.DEVNULL, subprocess.STDOUT
    return subprocess.Popen(command, stdin=nothing, stdout=log, stderr=same, pass_fds=(lock,))


@dataclass
class _Job:
    cell: Cell
    lock: IO[str]
    log: IO[bytes]
    begin: float = field(default_factory=time.perf_counter)
    process: subprocess.Popen[bytes] = field(init=False)
    log_start: int = field(init=False)  # where the process began to write

    def close(self) -> None:
        self.log.close()
        self.lock.close()


@dataclass
class GridRun:
    """Work on a grid, shared with other commands that work on the same folder.

    Attributes:
        cells: The cells wanted, in this order.
        root: The comparison's folder; cells are in its `cells/`.
        next_command: Returns what to start next for a cell that is not finished: training, then the test.
        jobs: Cells at once.
        benchmarks: Those that finished cells have been asked.
        states: How far each cell is.
    """

    cells: Sequence[Cell]
    root: Path
    next_command: NextCommand
    jobs: int = 1
    benchmarks: Collection[str] = ()
    states: dict[Cell, CellState] = field(init=False)

    def __post_init__(self) -> None:
        self.folder = self.root / CELLS_FOLDER
        self.states = {cell: self._state(cell) for cell in self.cells}
        self._failed_before = {cell: self._failure(cell) for cell in self.cells}
        self._running: list[_Job] = []
        self._seconds: list[float] = []  # of each cell that this process has trained

    def _state(self, cell: Cell) -> CellState:
        return state_of(self.folder / cell.name, self.benchmarks)

    def _failure(self, cell: Cell) -> bytes:
        path = self.folder / cell.name / FAILURE_FILE
        return path.read_bytes() if path.is_file() else b""

    def work(self) -> None:
        """Work until every cell is finished or has failed.

        Raises:
            Stopped: A signal came; the cells at work were asked to save and have ended.
        """
        done = ("finished", "diverged")
        pending = [cell for cell, state in self.states.items() if state.state not in done]
        self._print_progress("start")
        waiting = False
        try:
            while pending or self._running:
                for job in list(self._running):
                    self._advance(job)
                for cell in list(pending):
                    if len(self._running) < self.jobs and self._begin(cell):
                        pending.remove(cell)
                if pending and not self._running and not waiting:
                    names = ", ".join(cell.name for cell in pending)
                    print(f"waiting for cells that another process trains: {names}", flush=True)
                waiting = bool(pending) and not self._running
                if pending or self._running:
                    time.sleep(POLL_SECONDS)
        except Stopped as stopped:
            self._stop(stopped)
        finally:
            for job in self._running:
                job.close()

    def _begin(self, cell: Cell) -> bool:
        """Begin with a cell; False if another process works on it."""
        folder = self.folder / cell.name
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / LOCK_FILE).open("a")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.close()
            return False
        state = self._state(cell)  # another process may have had it in the meantime
        failed = state.state == "failed" and self._failed_before[cell] != self._failure(cell)
        if state.state in ("finished", "diverged") or failed:
            lock.close()
            self._set_state(cell, state, "was trained by another process")
            return True
        (folder / FAILURE_FILE).unlink(missing_ok=True)
        job = _Job(cell, lock, (folder / LOG_FILE).open("ab"))
        self._launch(job, self._state(cell))
        self._running.append(job)
        print(f"{cell.name}: {'tests' if state.run else 'trains'}; {folder / LOG_FILE}", flush=True)
        return True

    def _launch(self, job: _Job, state: CellState) -> None:
        """Start the next command of a cell."""
        command = self.next_command(job.cell, state)
        job.log.write(f"$ {shlex.join(command)}\n".encode())
        job.log.flush()
        job.log_start = job.log.tell()  # before the start: the process moves this position
        job.process = start_process(command, job.log, job.lock.fileno())

    def _advance(self, job: _Job) -> None:
        """Start the test of a cell whose training has ended; close a cell whose test has ended."""
        status = job.process.poll()
        if status is None:
            return
        state = self._state(job.cell)
        if status == 0 and state.state == "trained" and self.states[job.cell].state != "trained":
            self.states[job.cell] = state
            self._launch(job, state)
            return
        self._running.remove(job)
        if state.state == "finished":
            self._seconds.append(time.perf_counter() - job.begin)
        else:
            self._write_failure(job, status)
            state = self._state(job.cell)
        job.close()
        self._set_state(job.cell, state, state.state)

    def _write_failure(self, job: _Job, status: int) -> None:
        folder = self.folder / job.cell.name
        with (folder / LOG_FILE).open("rb") as stream:
            stream.seek(job.log_start)
            lines = stream.read().decode(errors="replace").splitlines()
        failure = {
            **job.cell._asdict(),
            "diverged": status == DivergedError.exit_status,
            "message": failure_message(lines, status),
            "time": time.time(),
        }
        write_json(folder / FAILURE_FILE, failure)

    def _set_state(self, cell: Cell, state: CellState, what: str) -> None:
        self.states[cell] = state
        message = f": {state.message}" if state.message else ""
        self._print_progress(f"{cell.name} {what}{message}")

    def _print_progress(self, event: str) -> None:
        states = [state.state for state in self.states.values()]
        finished = states.count("finished")
        failed = states.count("failed") + states.count("diverged")
        left = len(states) - finished - failed
        line = f"{finished}/{len(states)} finished" + (f", {failed} failed" if failed else "")
        if left and self._seconds:
            mean = sum(self._seconds) / len(self._seconds)
            line += f", about {duration(mean * left / self.jobs)} left"
        print(f"[{line}] {event}", flush=True)

    def _stop(self, stopped: Stopped) -> None:
        """Let the cells at work save and end."""
        # Ctrl-C has reached them already, and a second one would not let them save.
        interrupted = stopped.status == exit_status(signal.SIGINT)
        number = signal.SIGTERM if interrupted else stopped.status - 128
        for job in self._running:
            if job.process.poll() is None:
                job.process.send_signal(number)
        for job in self._running:
            job.process.wait()
        done = sum(state.state == "finished" for state in self.states.values())
        message = (
            f"stopped with {done} of {len(self.cells)} cells finished; the same command goes on"
        )
        raise Stopped(stopped.status, message) from stopped


def failure_message(lines: Sequence[str], status: int) -> str:
    """Return why a command failed, from what it printed last."""
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    if errors:
        return errors[-1]
    if status < 0:
        name = signal.Signals(-status).name
        hint = ", as the kernel does where memory runs out" if -status == signal.SIGKILL else ""
        return f"ended by {name}{hint}"
    printed = ["it said nothing", *(line.strip() for line in lines if line.strip())]
    return f"exit status {status}: {printed[-1]}"


def duration(seconds: float) -> str:
    """Write seconds as `45 s`, `12 min` or `3 h 20 min`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"
