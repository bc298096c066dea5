"""Cells of a grid: method, learning rate and seed; where each one is stored, and how far it is."""

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, NamedTuple, TypeVar

from pydantic import Field

from app.tracking.record import RunRecord
from app.tracking.run_folder import RunFolder, run_folders
from app.utils.errors import InputError
from app.utils.files import read_json
from app.utils.text import rate_text

T = TypeVar("T")

CELLS_FOLDER = "cells"
FAILURE_FILE = "failure.json"
LOG_FILE = "cell.log"
LOCK_FILE = "cell.lock"


class Cell(NamedTuple):
    """One run of a grid."""

    method: str
    learning_rate: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    seed: int

    @property
    def name(self) -> str:
        """Its folder's name, the same for every spelling of the rate."""
        return f"{self.method}-lr{rate_text(self.learning_rate)}-seed{self.seed}"


@dataclass(frozen=True)
class CellState:
    """How far a cell is.

    Attributes:
        state: `trained` has its adapter and no test scores yet; `diverged` is a failure of the method, where
            loss or gradient were not finite; `failed` is any other.
        run: The newest run folder that has a summary; None without one.
        message: Why it failed.
    """

    state: Literal["missing", "started", "trained", "finished", "failed", "diverged"]
    run: Path | None = None
    message: str = ""


def grid(methods: Sequence[str], rates: Sequence[float], seeds: Sequence[int]) -> list[Cell]:
    """Return all cells, one seed after the other, so that half a grid says something already."""
    return [Cell(method, rate, seed) for seed in seeds for rate in rates for method in methods]


def state_of(folder: Path, benchmarks: Collection[str] = ()) -> CellState:
    """Read how far the cell in a folder is, from its files alone.

    Args:
        folder: The cell's.
        benchmarks: Those whose scores a finished cell has.
    """
    versions = run_folders(folder)
    run = None
    for version in reversed(versions):
        try:
            record = RunRecord.read(RunFolder(version).summary)
        except InputError:
            continue  # not written yet, or damaged
        run = version
        test = record.metrics.get("test")
        asked = {name.partition("/")[0] for name in test or {}}
        if test is not None and asked.issuperset(benchmarks):
            return CellState("finished", run)
        break
    failure = read_json(folder / FAILURE_FILE)
    if failure is not None:
        message = str(failure.get("message", ""))
        return CellState("diverged" if failure.get("diverged") else "failed", run, message)
    if run is not None:
        return CellState("trained", run)
    return CellState("started" if versions else "missing")


def parse_rates(text: str) -> list[float]:
    """Read `1e-4,3e-4` as learning rates.

    Raises:
        InputError: One is no finite number above 0, or occurs twice.
    """

    def rate(part: str) -> float:
        value = float(part)
        if not (math.isfinite(value) and value > 0):
            raise ValueError(part)
        return value

    return _parse("learning_rates", text, rate, "numbers above 0, such as 1e-4,3e-4,1e-3")


def parse_seeds(text: str) -> list[int]:
    """Read `0,1,2` as seeds.

    Raises:
        InputError: One is no whole number from 0 to 2^32 - 1, or occurs twice.
    """

    def seed(part: str) -> int:
        if not (part.isascii() and part.isdigit() and int(part) < 2**32):
            raise ValueError(part)
        return int(part)

    return _parse("seeds", text, seed, f"whole numbers from 0 to {2**32 - 1}, such as 0,1,2")


def parse_methods(text: str, known: Sequence[str]) -> list[str]:
    """Read `lora,lora_one` as names of method overlays.

    Raises:
        InputError: One is unknown, which lists all, or occurs twice.
    """
    methods = _parse("methods", text, str, f"names with commas between, such as {known[0]}")
    for method in methods:
        if method not in known:
            raise InputError(f"there is no method {method!r}: expected some of {', '.join(known)}")
    return methods


def _parse(name: str, text: str, convert: Callable[[str], T], expected: str) -> list[T]:
    """Read values with commas between; `convert` raises ValueError for a wrong one."""
    values: list[T] = []
    for part in text.split(","):
        if not part.strip():
            raise InputError(f"--{name} is {text!r}: expected {expected}")
        try:
            value = convert(part.strip())
        except ValueError as error:
            raise InputError(f"--{name} has {part.strip()!r}: expected {expected}") from error
        if value in values:
            raise InputError(f"--{name} names {value} twice: expected each value once")
        values.append(value)
    return values
