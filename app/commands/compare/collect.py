"""Read from their folders what runs have left, and which of them count."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import yaml

from app.commands.compare.cells import CELLS_FOLDER, state_of
from app.commands.compare.manifest import MANIFEST_FILE, GridManifest, read_manifest
from app.commands.compare.settings import (
    RATE,
    Settings,
    differences,
    flat,
    method_settings,
    rank_of,
    task_settings,
    without_model_name,
)
from app.tracking.metrics_table import read_metrics
from app.tracking.record import RunRecord
from app.tracking.run_folder import CONFIG_FILE, SUMMARY_FILE, RunFolder, run_folders
from app.utils.errors import InputError
from app.utils.files import load_yaml

State = Literal[
    "finished", "failed", "diverged", "missing", "unfinished", "repeated", "unreadable", "withdrawn"
]

KNOWN_AT_THE_END = ("data rows", "model fingerprint")
"""Of a run's task what only its record has."""


@dataclass(frozen=True)
class Run:
    """A run, or a cell of a comparison that has none.

    Attributes:
        folder: Its folder.
        state: Only finished runs count; a `withdrawn` one is not wanted by its comparison any more, the
            settings of a `repeated` one were run again later.
        reason: Why it does not count.
        method: `model.method`; None where it is not known.
        learning_rate: Of the optimizer; NaN if it has none or it is not known.
        seed: The seed; None where it is not known.
        settings: What makes the method, without the learning rate; None where it is not known.
        task: What all comparable runs share; empty where it is not known.
        record: Of a finished run its summary.json.
        curves: Of a finished run its metrics.csv: (step, value) lists by name.
    """

    folder: Path
    state: State
    reason: str = ""
    method: str | None = None
    learning_rate: float = math.nan
    seed: int | None = None
    settings: Settings | None = None
    task: Settings = field(default_factory=dict)
    record: RunRecord = field(default_factory=RunRecord, repr=False)
    curves: Mapping[str, list[tuple[int, float]]] = field(default_factory=dict, repr=False)

    def scores(self, moment: str) -> Mapping[str, float]:
        """Return the scores at a moment: zero_shot, after_init, final (of the validation rows), test."""
        return self.record.metrics.get(moment, {})

    @property
    def rank(self) -> int | None:
        """The adapter's r; None without an adapter, or where it is not known."""
        return rank_of(self.settings or {})

    @property
    def init_seconds(self) -> float:
        """Seconds of the initialization's gradient passes and decompositions; 0 without one."""
        return self.record.init.seconds or 0.0

    @property
    def train_seconds(self) -> float:
        """Seconds of the training loop, without validation."""
        seconds = self.record.train.seconds
        return math.nan if seconds is None else seconds

    @property
    def step_seconds(self) -> float:
        """Mean seconds of an optimizer step."""
        steps = self.record.train.steps
        return self.train_seconds / steps if steps else math.nan

    @property
    def device(self) -> str:
        """What it was trained on."""
        return self.record.train.device or "unknown device"

    @property
    def peak_bytes(self) -> int | None:
        """Peak memory of initialization and training, of the process that needs most."""
        trained = self.record.train.peak_bytes
        return max(trained, *self.record.init.peak_bytes, 0) if trained else None


def collect(folders: Sequence[Path]) -> list[Run]:
    """Read all runs in and below folders: the finished ones by folder, then those that do not count.

    Raises:
        InputError: A folder does not exist or holds no run, or no run is finished.
    """
    runs: dict[Path, Run] = {}
    for folder in folders:
        if not folder.is_dir():
            state = "is a file" if folder.exists() else "does not exist"
            expected = "a run folder such as runs/quickstart/version_0, or a folder above several"
            raise InputError(f"{str(folder)!r} {state}: expected {expected}")
        here = {run.folder.resolve(): run for run in _read_below(folder)}
        if not here:
            raise InputError(
                f"{str(folder)!r} holds no run: expected {CONFIG_FILE} and {SUMMARY_FILE} of a `fit` in it or "
                "below it"
            )
        runs |= here
    newest, repeated = _newest(run for run in runs.values() if run.state == "finished")
    excluded = [run for run in runs.values() if run.state != "finished"]
    # An unfinished run says nothing where its cell is listed, or a later attempt beside it was finished.
    cells = {run.folder for run in excluded}
    done = {_attempt(run) for run in newest}
    excluded = [
        run
        for run in excluded
        if run.state != "unfinished" or not (run.folder.parent in cells or _attempt(run) in done)
    ]
    if not newest:
        reasons = "; ".join(f"{run.folder}: {run.reason}" for run in excluded[:3])
        reasons = reasons or "all folders are empty"
        raise InputError(f"there is no finished run to report: {reasons}")
    return [*newest, *excluded, *repeated]


def _read_below(folder: Path) -> Iterator[Run]:
    """Yield the runs in and below a folder, and the cells of comparisons without one."""
    roots = [path.parent for path in sorted(folder.rglob(MANIFEST_FILE))]
    manifests = {root: read_manifest(root) for root in roots}
    wanted = {
        root / CELLS_FOLDER / cell.name
        for root, manifest in manifests.items()
        for cell in manifest.cells
    }
    grids = {path.parent for path in wanted}
    paths = [folder]
    if not (folder / CONFIG_FILE).is_file():  # W&B keeps copies
        files = (file.relative_to(folder) for file in folder.rglob(CONFIG_FILE))
        paths = sorted(folder / file.parent for file in files if "wandb" not in file.parts)
    for path in paths:
        run = read_run(path)
        if run is None:
            continue
        if any(above.parent in grids and above not in wanted for above in path.parents):
            reason = f"{MANIFEST_FILE} does not name its cell"
            run = replace(run, state="withdrawn", reason=reason)
        yield run
    for root, manifest in manifests.items():
        yield from _cells_without_run(root, manifest)


def read_run(folder: Path) -> Run | None:
    """Read a run folder; None if it is no folder of a `fit`."""
    files = RunFolder(folder)
    try:
        config = load_yaml(files.config.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = f"{CONFIG_FILE} cannot be read: {' '.join(str(error).split())}"
        return Run(folder, "unreadable", reason)
    if not isinstance(config, dict) or not isinstance(config.get("model"), dict):
        return None
    rate, seed = flat(config).get(RATE), config.get("seed_everything")
    run = Run(folder, "unreadable", method=str(config["model"].get("method")))
    if not isinstance(rate, int | float | None) or not isinstance(seed, int | None):
        reason = f"{CONFIG_FILE} is damaged: learning rate {rate!r}, seed {seed!r}"
        return replace(run, reason=reason)
    task = without_model_name(task_settings(config))
    rate = math.nan if rate is None else float(rate)
    run = replace(run, learning_rate=rate, seed=seed, settings=method_settings(config), task=task)
    if not files.summary.is_file():
        return replace(run, state="unfinished", reason=f"it has no {SUMMARY_FILE} yet")
    try:
        record = RunRecord.read(files.summary)
        curves = read_metrics(files.metrics) if files.metrics.is_file() else {}
    except InputError as error:
        return replace(run, reason=str(error))
    except (ValueError, TypeError, KeyError) as error:
        return replace(run, reason=f"{files.metrics.name} is damaged ({error})")
    if "final" not in record.metrics:
        return replace(run, state="unfinished", reason="it has no final scores yet")
    for moment, rows in (("final", "validation"), ("test", "test")):
        for name, value in record.metrics.get(moment, {}).items():
            if not math.isfinite(value):
                reason = f"after training, the {rows} {name} is {value}"
                return replace(run, state="diverged", reason=reason)
    at_the_end = (str(record.data.rows), record.model.fingerprint)
    task |= zip(KNOWN_AT_THE_END, at_the_end, strict=True)
    seed = record.seed or seed or 0
    return replace(run, state="finished", seed=seed, task=task, record=record, curves=curves)


def _cells_without_run(root: Path, manifest: GridManifest) -> Iterator[Run]:
    """Yield the cells of a comparison that failed, never began or left no settings."""
    task = without_model_name(manifest.task or {})
    for cell in manifest.cells:
        folder = root / CELLS_FOLDER / cell.name
        progress = state_of(folder)
        has_settings = any(RunFolder(path).config.is_file() for path in run_folders(folder))
        state: State
        if progress.state in ("failed", "diverged"):
            state, reason = progress.state, progress.message
        elif progress.state == "missing":
            state, reason = "missing", "it was not run"
        elif progress.state == "started" and not has_settings:
            state, reason = "unfinished", "it was ended as it began"
        else:
            continue  # its run folder says more
        settings = manifest.methods.get(cell.variant.name)
        yield Run(folder, state, reason, cell.method, cell.learning_rate, cell.seed, settings, task)


def _newest(runs: Iterable[Run]) -> tuple[list[Run], list[Run]]:
    """Return one run of each settings, the one trained last, and the earlier ones as repeated."""

    def trained_at(run: Run) -> float:
        # A test writes the summary again.
        return run.record.train.ended or RunFolder(run.folder).summary.stat().st_mtime

    newest: list[Run] = []
    repeated = []
    for run in sorted(runs, key=trained_at):
        earlier = next((other for other in newest if _is_repeated(other, run)), None)
        if earlier is not None:
            newest.remove(earlier)
            reason = f"the same settings were run again later: {run.folder}"
            repeated.append(replace(earlier, state="repeated", reason=reason))
        newest.append(run)
    return sorted(newest, key=lambda run: str(run.folder)), repeated


def _is_repeated(first: Run, other: Run) -> bool:
    return (
        (first.method, first.learning_rate, first.seed)
        == (other.method, other.learning_rate, other.seed)
        and not differences(first.settings or {}, other.settings or {})
        and not differences(first.task, other.task)
    )


def _attempt(run: Run) -> tuple[Any, ...]:
    return (run.folder.parent, run.method, repr(run.learning_rate), run.seed)
