"""What runs have left, read from their folders."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from app.compare.cells import CELLS_FOLDER, FAILURE_FILE, read_json, state_of
from app.compare.plan_file import planned_cells
from app.compare.settings import RATE, Settings, flat, method_settings, task_settings
from app.errors import InputError
from app.plots import read_metrics
from app.run_folder import CONFIG_FILE, SUMMARY_FILE

Curve = list[tuple[float, float]]


@dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes:
        folder: Its folder.
        method: `model.method`.
        settings: What makes the method, without the learning rate.
        task: What all comparable runs share.
        learning_rate: Of the optimizer; NaN if it has none.
        seed: The seed.
        validation: Scores of the trained model on the validation rows.
        test: Scores on the reported set; empty if it was never tested.
        told: summary.json.
        curves: metrics.csv: (step, value) lists by name.
    """

    folder: Path
    method: str
    settings: Settings
    task: Settings
    learning_rate: float
    seed: int
    validation: Mapping[str, float]
    test: Mapping[str, float]
    told: Mapping[str, Any]
    curves: Mapping[str, list[tuple[int, float]]] = field(repr=False)

    @property
    def trainable(self) -> int | None:
        """Trainable parameters."""
        return self.told.get("model", {}).get("trainable_parameters")

    @property
    def init_seconds(self) -> float:
        """Seconds of the initialisation's gradient passes and decompositions; 0 without one."""
        return float(self.told.get("init", {}).get("seconds", 0.0))

    @property
    def train_seconds(self) -> float:
        """Seconds of the training loop, without validation."""
        return float(self.told.get("train", {}).get("seconds", math.nan))

    @property
    def step_seconds(self) -> float:
        """Mean seconds of an optimizer step."""
        steps = self.told.get("train", {}).get("steps", 0)
        return self.train_seconds / steps if steps else math.nan

    @property
    def peak_bytes(self) -> int | None:
        """Peak memory of initialisation and training, of the process that needs most."""
        peaks = [
            *self.told.get("init", {}).get("peak_bytes", []),
            self.told.get("train", {}).get("peak_bytes"),
        ]
        return max((peak for peak in peaks if peak), default=None) if peaks[-1] else None

    @property
    def device(self) -> str:
        """What it was trained on."""
        return str(self.told.get("train", {}).get("device", "unknown device"))

    def curve(self, name: str, over: str) -> Curve:
        """Return a curve over optimizer steps made or over seconds of initialisation and training.

        Args:
            name: "loss", or a score on the validation rows.
            over: "steps" or "seconds".
        """
        if name == "loss":
            points = [(step + 1.0, value) for step, value in self.curves.get("train/loss", [])]
        else:
            points = [(step + 1.0, value) for step, value in self.curves.get(f"val/{name}", [])]
            start = self.told["metrics"].get("after_init", {}).get(name)
            points = [(0.0, start), *points] if start is not None else points
            last = self.told.get("train", {}).get("steps")
            if last and name in self.validation and points[-1][0] < last:
                points.append((float(last), self.validation[name]))
        if over == "steps" or not points:
            return points
        steps, values = zip(*points, strict=True)
        return list(zip(self._seconds_at(steps), values, strict=True))

    def _seconds_at(self, steps: Sequence[float]) -> list[float]:
        """Return the seconds up to numbers of steps, between the clock's readings."""
        clock = [(0.0, 0.0)]
        clock += [(step + 1.0, value) for step, value in self.curves.get("train/seconds", [])]
        last = float(self.told.get("train", {}).get("steps", 0))
        if last > clock[-1][0]:
            clock.append((last, self.train_seconds))
        known, passed = np.array(clock).T
        return [float(at) for at in self.init_seconds + np.interp(steps, known, passed)]


@dataclass(frozen=True)
class LeftOut:
    """A run that is in no mean, and why.

    Attributes:
        name: Its folder.
        state: `failed`, `diverged`, `missing`, `unfinished`, `repeated` or `unreadable`.
        reason: In words.
        method: Its method, where known.
        learning_rate: Its rate, where known.
        seed: Its seed, where known.
    """

    name: str
    state: str
    reason: str
    method: str | None = None
    learning_rate: float | None = None
    seed: int | None = None


@dataclass(frozen=True)
class Collection:
    """All that was found in some folders."""

    runs: list[Run]
    left_out: list[LeftOut]


def collect(folders: Sequence[Path]) -> Collection:
    """Read all runs in and below folders.

    Raises:
        InputError: A folder does not exist or holds no run.
    """
    runs: dict[Path, Run] = {}
    left_out: dict[str, LeftOut] = {}
    for folder in folders:
        if not folder.is_dir():
            state = "is a file" if folder.exists() else "does not exist"
            raise InputError(
                f"{str(folder)!r} {state}: expected a run folder such as runs/quickstart/version_0, or a "
                "folder above several"
            )
        before = len(runs) + len(left_out)
        for path in _config_files(folder):
            found = read_run(path.parent)
            if isinstance(found, Run):
                runs[path.parent.resolve()] = found
            elif found is not None:
                left_out[found.name] = found
        for out in _grid_left_out(folder):
            left_out[out.name] = out
        if len(runs) + len(left_out) == before and folder.resolve() not in runs:
            raise InputError(
                f"{str(folder)!r} holds no run: expected {CONFIG_FILE} and {SUMMARY_FILE} of a `fit` in it or "
                "below it"
            )
    newest, repeated = _newest(runs.values())
    rest = [
        out
        for out in left_out.values()
        if out.state != "unfinished"
        or not (_is_done(out, newest) or str(Path(out.name).parent) in left_out)
    ]
    if not newest:
        told = "; ".join(f"{out.name}: {out.reason}" for out in rest[:3])
        raise InputError(f"there is no finished run to report: {told or 'all folders are empty'}")
    return Collection(newest, [*rest, *repeated])


def read_run(folder: Path) -> Run | LeftOut | None:
    """Read a run folder; None if it is no folder of a `fit`."""
    try:
        config = yaml.safe_load((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        told = " ".join(str(error).split())
        return LeftOut(str(folder), "unreadable", f"{CONFIG_FILE} cannot be read: {told}")
    if not isinstance(config, dict) or not isinstance(config.get("model"), dict):
        return None
    method, rate = str(config["model"].get("method")), flat(config).get(RATE)
    known = (method, None if rate is None else float(rate), config.get("seed_everything"))
    if not (folder / SUMMARY_FILE).is_file():
        return LeftOut(str(folder), "unfinished", f"it has no {SUMMARY_FILE} yet", *known)
    summary = read_json(folder / SUMMARY_FILE)
    if summary is None or not isinstance(summary.get("metrics"), dict):
        return LeftOut(str(folder), "unreadable", f"{SUMMARY_FILE} is damaged", *known)
    table = folder / "metrics.csv"
    try:
        curves = read_metrics(table) if table.is_file() else {}
    except (ValueError, TypeError, KeyError) as error:
        return LeftOut(str(folder), "unreadable", f"metrics.csv is damaged ({error})", *known)
    data = summary.get("data", {})
    model = summary.get("model", {})
    task = {
        **task_settings(config),
        "data rows": str(data.get("rows")),
        "model fingerprint": model.get("fingerprint"),
    }
    task.pop("model.name", None)  # the same weights may lie elsewhere
    return Run(
        folder,
        method,
        method_settings(config),
        task,
        math.nan if rate is None else float(rate),
        int(summary.get("seed") or config.get("seed_everything") or 0),
        summary["metrics"].get("final", {}),
        summary["metrics"].get("test", {}),
        summary,
        curves,
    )


def _config_files(folder: Path) -> list[Path]:
    """Return the configurations in and below a folder, without W&B's copies."""
    if (folder / CONFIG_FILE).is_file():
        return [folder / CONFIG_FILE]
    found = folder.rglob(CONFIG_FILE)
    return sorted(path for path in found if "wandb" not in path.relative_to(folder).parts)


def _grid_left_out(folder: Path) -> Iterable[LeftOut]:
    """Yield the cells of comparisons in and below a folder that failed or never began."""
    plans = [folder, *(path.parent for path in folder.rglob("compare.json"))]
    for root in dict.fromkeys(plans):
        for cell in planned_cells(root):
            path = root / CELLS_FOLDER / cell.name
            known = (cell.method, cell.learning_rate, cell.seed)
            found = state_of(path)
            if found.state in ("failed", "diverged"):
                told = read_json(path / FAILURE_FILE) or {}
                yield LeftOut(str(path), found.state, str(told.get("message")), *known)
            elif found.state == "missing":
                yield LeftOut(str(path), "missing", "it was not run", *known)


def _identity(run: Run) -> tuple[Any, ...]:
    parts = (run.method, repr(sorted(run.settings.items())), repr(sorted(run.task.items())))
    return (*parts, run.learning_rate, run.seed)


def _newest(runs: Iterable[Run]) -> tuple[list[Run], list[LeftOut]]:
    """Return one run of each settings, the last written, and those before it."""
    chosen: dict[tuple[Any, ...], Run] = {}
    repeated = []
    for run in sorted(runs, key=lambda run: (run.folder / SUMMARY_FILE).stat().st_mtime):
        before = chosen.pop(_identity(run), None)
        chosen[_identity(run)] = run
        if before is not None:
            reason = f"the same settings were run again later: {run.folder}"
            known = (before.method, before.learning_rate, before.seed)
            repeated.append(LeftOut(str(before.folder), "repeated", reason, *known))
    order = sorted(chosen.values(), key=lambda run: str(run.folder))
    return order, repeated


def _is_done(out: LeftOut, runs: Sequence[Run]) -> bool:
    """Return whether an unfinished run was finished by a later attempt beside it."""
    parent = Path(out.name).parent
    same = (out.method, out.learning_rate, out.seed)
    return any(
        run.folder.parent == parent and (run.method, run.learning_rate, run.seed) == same
        for run in runs
    )
