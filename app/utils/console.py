"""Progress, status lines, and the messages of libraries that no user can act on."""

import logging
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from app.utils.errors import reason

T = TypeVar("T")

SECONDS_BETWEEN_LINES = 5.0
ROOT = Path(__file__).parents[2]
NOTHING_TO_ACT_ON = (
    "💡",
    "TPU available",
    "Seed set",
    "Loading `train_dataloader` to estimate",
    "Failed to load CPU gemm_4bit_forward",
)
"""How such messages begin."""


def on_terminal() -> bool:
    """Return whether standard error is a terminal."""
    return sys.stderr.isatty()


def bold(text: str) -> str:
    """Return a text that a terminal shows bold; as it is where none reads it, or NO_COLOR is set."""
    return f"\x1b[1m{text}\x1b[0m" if on_terminal() and not os.environ.get("NO_COLOR") else text


def track(items: Sequence[T], label: str, note: Callable[[], str] = str) -> Iterator[T]:
    """Yield the items and show the progress under `label`, with a note.

    A terminal gets a bar. A log file gets a plain line every few seconds, and at the end: tqdm would write
    carriage returns there, whatever its `mininterval`.
    """
    # Lightning takes seconds to import, which a command that shows no progress does not spend.
    from lightning.pytorch.utilities.rank_zero import rank_zero_only
    from tqdm.auto import tqdm

    if rank_zero_only.rank > 0:  # type: ignore[attr-defined]
        yield from items
        return
    if on_terminal():
        with tqdm(items, desc=label, leave=False, dynamic_ncols=True) as bar:
            for item in bar:
                yield item
                bar.set_postfix_str(note())
        return
    start = last = time.perf_counter()
    for i, item in enumerate(items):
        yield item
        now = time.perf_counter()
        if now - last >= SECONDS_BETWEEN_LINES or i + 1 == len(items):
            last = now
            noted = f", {note()}" if note() else ""
            print(f"{label}: {i + 1}/{len(items)} batches, {now - start:.0f} s{noted}", flush=True)


@contextmanager
def warn_on_failure(what: str, then: str = "the run goes on without") -> Iterator[None]:
    """Make an error of what a run can do without one warning.

    Args:
        what: What could not be made or written, such as "the plots".
        then: What follows.
    """
    try:
        yield
    except Exception as error:
        from lightning.pytorch.utilities.rank_zero import rank_zero_warn  # slow

        rank_zero_warn(f"{what} failed ({reason(error)}): {then}")


def silence() -> None:
    """Drop what no user can act on: advertisements, absent hardware, deprecations inside libraries."""
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.seed"):
        logging.getLogger(name).addFilter(_says_something)
    # PEFT imports bitsandbytes wherever it is installed, also for a base that is not quantised.
    logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(_says_something)
    for inside in (
        "Experiment logs directory .* exists and is not empty",  # make_loggers has just made it
        "The dirpath has changed from",  # a run that goes on from another folder's checkpoint
        "You're resuming from a checkpoint that ended before",  # the data module knows its position
        "Total length of `list` across ranks is zero",  # no validation rows: the data module has said so
        "`is_gradient_checkpointing` is deprecated",
        "`gradient_checkpointing_enable` is deprecated",
        r"`isinstance\(treespec, LeafSpec\)`",
        r"The '\w+_dataloader' does not have many workers",  # rows are tokens in memory
        "It is recommended to use `self.log",  # what is logged has been reduced over processes already
    ):
        warnings.filterwarnings("ignore", message=inside)


def shorten_warnings() -> None:
    """Write warnings without the line of code that they come from, and the project's own as a message alone.

    Lightning, where it is imported later, sets a format of its own.
    """
    warnings.formatwarning = _one_line


def _one_line(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    line: str | None = None,
) -> str:
    if Path(filename).is_relative_to(ROOT) and "site-packages" not in filename:
        return f"warning: {message}\n"
    return f"{filename}:{lineno}: {category.__name__}: {message}\n"


def _says_something(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(NOTHING_TO_ACT_ON)


def say(message: str) -> None:
    """Print one status line to stderr."""
    print(message, file=sys.stderr, flush=True)
