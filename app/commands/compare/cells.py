"""Cells of a grid: method, rank, learning rate and seed; where each one is stored, and how far it is."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

from pydantic import Field

from app.tracking.record import RunRecord
from app.tracking.run_folder import RunFolder, run_folders
from app.utils.errors import InputError
from app.utils.files import read_json
from app.utils.text import rate_text

CELLS_FOLDER = "cells"
FAILURE_FILE = "failure.json"
LOG_FILE = "cell.log"
LOCK_FILE = "cell.lock"

Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Rank = Annotated[int, Field(ge=1)]


class Variant(NamedTuple):
    """A method at a rank; None is the rank of its configuration, which may be none."""

    method: str
    rank: Rank | None = None

    @property
    def name(self) -> str:
        """Such as `lora-r8`."""
        return self.method if self.rank is None else f"{self.method}-r{self.rank}"


class Cell(NamedTuple):
    """One run of a grid."""

    method: str
    learning_rate: Rate
    seed: int
    rank: Rank | None = None

    @property
    def variant(self) -> Variant:
        """The method at its rank."""
        return Variant(self.method, self.rank)

    @property
    def name(self) -> str:
        """Its folder's name, the same for every spelling of the rate."""
        return f"{self.variant.name}-lr{rate_text(self.learning_rate)}-seed{self.seed}"


@dataclass(frozen=True)
class CellState:
    """How far a cell is, its newest run folder that has a summary, and why it failed.

    `trained` has its adapter and no test scores yet; `diverged` is a failure of the method, where loss or
    gradient were not finite; `failed` is any other.
    """

    state: Literal["missing", "started", "trained", "finished", "failed", "diverged"]
    run: Path | None = None
    message: str = ""


def grid(variants: Sequence[Variant], rates: Sequence[float], seeds: Sequence[int]) -> list[Cell]:
    """Return all cells, one seed after the other, so that half a grid says something already."""
    return [
        Cell(method, rate, seed, rank)
        for seed in seeds
        for rate in rates
        for method, rank in variants
    ]


def state_of(folder: Path, benchmarks: Collection[str] = ()) -> CellState:
    """Read how far the cell in a folder is, from its files alone.

    A finished one has all benchmarks' scores; with none, and no test rows, it is finished once it is trained.
    """
    versions = run_folders(folder)
    run = None
    for version in reversed(versions):
        try:
            record = RunRecord.read(RunFolder(version).summary)
        except InputError:
            continue  # not written yet, or damaged
        if "final" not in record.metrics:
            continue  # ended in its final scores, which going on makes
        run = version
        test = record.metrics.get("test", None if record.data.has_test else {})
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
