"""A cell of a grid: method, learning rate and seed; where it lives and how far it is."""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

from app.tracking.run_folder import SUMMARY_FILE, run_folders
from app.utils.errors import InputError
from app.utils.files import read_json
from app.utils.text import rate_text

T = TypeVar("T")

CELLS_FOLDER = "cells"
FAILURE_FILE = "failure.json"
LOG_FILE = "cell.log"
LOCK_FILE = "cell.lock"


@dataclass(frozen=True)
class Cell:
    """One run of a grid."""

    method: str
    learning_rate: float
    seed: int

    @property
    def name(self) -> str:
        """Its folder's name, the same for every spelling of the rate."""
        return f"{self.method}-lr{rate_text(self.learning_rate)}-seed{self.seed}"


State = Literal["missing", "started", "trained", "finished", "failed", "diverged"]


@dataclass(frozen=True)
class CellState:
    """How far a cell is.

    Attributes:
        state: `trained` has its adapter and no test scores yet; `diverged` is a failure of the method, where
            loss or gradient were not finite; `failed` is any other.
        run: The newest run folder that has a summary; None without one.
        message: Why it failed.
    """

    state: State
    run: Path | None = None
    message: str = ""


def grid(methods: Sequence[str], rates: Sequence[float], seeds: Sequence[int]) -> list[Cell]:
    """Return all cells, one seed after the other, so that half a grid says something already."""
    return [Cell(method, rate, seed) for seed in seeds for rate in rates for method in methods]


def state_of(folder: Path, benchmarks: Collection[str] = ()) -> CellState:
    """Read how far the cell in a folder is; what is there decides, nothing else is kept.

    Args:
        folder: The cell's.
        benchmarks: Those whose scores a finished cell has.
    """
    versions = run_folders(folder)
    summaries = [(path, read_json(path / SUMMARY_FILE)) for path in versions]
    complete = [(path, told) for path, told in summaries if told is not None]
    run, summary = complete[-1] if complete else (None, {})
    metrics = (summary or {}).get("metrics")
    test = metrics.get("test") if isinstance(metrics, dict) else None
    if isinstance(test, dict) and all(
        any(name.startswith(f"{benchmark}/") for name in test) for benchmark in benchmarks
    ):
        return CellState("finished", run)
    failure = read_json(folder / FAILURE_FILE)
    if failure is not None:
        state: State = "diverged" if failure.get("diverged") else "failed"
        return CellState(state, run, str(failure.get("message", "")))
    if run is not None:
        return CellState("trained", run)
    return CellState("started" if versions else "missing")


def parse_rates(text: str) -> list[float]:
    """Read `1e-4,3e-4` as learning rates.

    Raises:
        InputError: One is no finite number above 0, or occurs twice.
    """
    rates = []
    for part in _parts("learning_rates", text, "1e-4,3e-4,1e-3"):
        try:
            rate = float(part)
        except ValueError:
            rate = math.nan
        if not (math.isfinite(rate) and rate > 0):
            raise InputError(
                f"--learning_rates has {part!r}: expected numbers above 0, such as 1e-4,3e-4,1e-3"
            )
        rates.append(rate)
    return _once("learning_rates", rates)


def parse_seeds(text: str) -> list[int]:
    """Read `0,1,2` as seeds.

    Raises:
        InputError: One is no whole number from 0 to 2^32 - 1, or occurs twice.
    """
    seeds = []
    for part in _parts("seeds", text, "0,1,2"):
        if not (part.isascii() and part.isdigit() and int(part) < 2**32):
            raise InputError(
                f"--seeds has {part!r}: expected whole numbers from 0 to {2**32 - 1}, such as 0,1,2"
            )
        seeds.append(int(part))
    return _once("seeds", seeds)


def parse_methods(text: str, known: Sequence[str]) -> list[str]:
    """Read `lora,lora_one` as names of method overlays.

    Raises:
        InputError: One is unknown, which lists all, or occurs twice.
    """
    methods = _parts("methods", text, ",".join(known[:2]))
    for method in methods:
        if method not in known:
            raise InputError(f"there is no method {method!r}: expected some of {', '.join(known)}")
    return _once("methods", methods)


def _parts(name: str, text: str, example: str) -> list[str]:
    parts = [part.strip() for part in text.split(",")]
    if not all(parts):
        raise InputError(
            f"--{name} is {text!r}: expected values with commas between, such as {example}"
        )
    return parts


def _once(name: str, values: list[T]) -> list[T]:
    twice = next((value for i, value in enumerate(values) if value in values[:i]), None)
    if twice is not None:
        raise InputError(f"--{name} names {twice} twice: expected each value once")
    return values
