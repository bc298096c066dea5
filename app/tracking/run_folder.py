"""Name the files of a run folder, runs/NAME/version_N."""

import itertools
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from app.utils.errors import InputError

CONFIG_FILE = "config.yaml"
SUMMARY_FILE = "summary.json"
WAIT_FOR_LOCK = 10.0
"""Seconds; a process that was killed leaves workers behind, which end within five."""


class RunFolder:
    """The paths of what a run leaves in its folder."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / CONFIG_FILE  # the resolved configuration
        self.summary = path / SUMMARY_FILE  # the run record
        self.metrics = path / "metrics.csv"  # the table of logged values
        self.checkpoints = path / "checkpoints"
        self.adapter = path / "adapter"
        self.model = path / "model"  # all weights, where all were trained
        self.answers = path / "answers"  # to benchmarks
        self.scores = path / "benchmarks.json"
        self.row_scores = path / "row_scores"  # of each row that was scored: final.csv, test.csv
        self.wandb = path / "wandb.json"  # which W&B run a test adds its scores to
        self.lock = path / ".lock"  # held by the process that trains

    def __str__(self) -> str:
        return str(self.path)

    def check_finished(self) -> None:
        """Raise InputError unless the folder is that of a finished run."""
        missing = [file.name for file in (self.config, self.summary) if not file.is_file()]
        trained = (self.adapter / "adapter_config.json", self.model / "config.json")
        if not any(file.is_file() for file in trained):
            missing.append(" or ".join(str(file.relative_to(self.path)) for file in trained))
        if missing:
            state = f"lacks {', '.join(missing)}" if self.path.exists() else "does not exist"
            raise InputError(
                f"--run is {str(self)!r}, which {state}: expected the folder of a finished run, such as "
                "runs/quickstart/version_0"
            )

    def remove_if_unused(self) -> None:
        """Remove the folder if nothing but the configuration is in it: the run never began."""
        unused = {self.config, self.lock}
        if self.path.is_dir() and set(self.path.iterdir()) <= unused:
            for file in unused:
                file.unlink(missing_ok=True)
            self.path.rmdir()

    @contextmanager
    def held(self) -> Iterator[None]:
        """Hold the folder for training, as one process at a time may; the system frees it if that one dies.

        Warns where the file system has no locks.

        Raises:
            InputError: Another process holds it.
        """
        lock = FileLock(self.lock, timeout=WAIT_FOR_LOCK)
        try:
            lock.acquire()
        except Timeout:
            raise InputError(
                f"{self} is being trained by another process: wait until that has ended, or leave ckpt_path "
                "out for a run of its own"
            ) from None
        except (OSError, NotImplementedError) as error:
            message = f"{self} cannot be locked ({error}): start no other run in it"
            warnings.warn(message, stacklevel=2)
        try:
            yield
        finally:
            lock.release()


def new_run_folder(runs: Path) -> RunFolder:
    """Make version_0, version_1, ...: the first that is not there, also when two runs start at once.

    Raises:
        InputError: The folder cannot be made.
    """
    for number in itertools.count():
        folder = runs / f"version_{number}"
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            if folder.is_dir():
                continue
            raise InputError(f"{str(folder)!r} is a file: set output.name or output.root") from None
        except OSError as error:
            raise InputError(
                f"the run folder {str(folder)!r} cannot be written ({error.strerror}): set output.root"
            ) from error
        return RunFolder(folder)
    raise AssertionError("unreachable")


def run_folders(runs: Path) -> list[Path]:
    """Return version_0, version_1, ... below a folder, in the order of their numbers."""
    return _numbered(runs, "version_*", r"version_(\d+)")


def checkpoint_name(step: int) -> str:
    """Return the file name of the run's own checkpoint of an optimizer step.

    A `ModelCheckpoint` of the user's may save into the same folder, as `epoch=0-step=100.ckpt` or
    `step=100.ckpt`: what has another name is never deleted.
    """
    return f"resume-step={step}.ckpt"


def checkpoint_files(folder: Path, end: str = "") -> list[Path]:
    """Return the run's own checkpoints in a folder whose name has this behind it, the oldest first."""
    return _numbered(
        folder, f"resume-step=*.ckpt{end}", rf"resume-step=(\d+)\.ckpt{re.escape(end)}"
    )


def checkpoints_to_resume(folder: Path) -> list[Path]:
    """Return the complete checkpoints in a folder, the oldest first; without any, those of earlier versions."""
    return checkpoint_files(folder) or _numbered(folder, "step=*.ckpt", r"step=(\d+)\.ckpt")


def _numbered(folder: Path, glob: str, pattern: str) -> list[Path]:
    """Return the paths whose whole name matches, in the order of the number in it."""
    matches = ((re.fullmatch(pattern, path.name), path) for path in folder.glob(glob))
    numbers = {path: int(match[1]) for match, path in matches if match}
    return sorted(numbers, key=numbers.__getitem__)
