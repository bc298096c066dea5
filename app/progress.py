"""Show how far a loop is: a bar on a terminal, a line now and then in a log file."""

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from tqdm.auto import tqdm

from app.processes import rank

T = TypeVar("T")

SECONDS_BETWEEN_LINES = 5.0


def on_terminal() -> bool:
    """Return whether someone watches: standard error is a terminal."""
    return sys.stderr.isatty()


def track(items: Sequence[T], label: str, note: Callable[[], str] = str) -> Iterator[T]:
    """Yield the items and show the progress under `label`, with a note of the moment."""
    if rank() > 0:
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
            told = f", {note()}" if note() else ""
            print(f"{label}: {i + 1}/{len(items)} batches, {now - start:.0f} s{told}", flush=True)
