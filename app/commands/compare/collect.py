"""What runs have left, read from their folders."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from app.commands.compare.cells import CELLS_FOLDER, FAILURE_FILE, state_of
from app.commands.compare.manifest import PLAN_FILE, Plan, read_plan
from app.commands.compare.runs import ExcludedRun, Run
from app.commands.compare.settings import (
    RATE,
    flat,
    method_settings,
    task_settings,
    without_model_name,
)
from app.tracking.metrics_table import read_metrics
from app.tracking.run_folder import CONFIG_FILE, SUMMARY_FILE, RunFolder, run_folders
from app.utils.errors import InputError
from app.utils.files import read_json

TRAIN_NUMBERS = ("steps", "seconds", "peak_bytes", "began", "ended")

FOUND_AT_THE_END = ("data rows", "model fingerprint")
"""Of a run's task what only its summary knows."""


@dataclass(frozen=True)
class Collection:
    """All that was found in some folders."""

    runs: list[Run]
    left_out: list[ExcludedRun]


def collect(folders: Sequence[Path]) -> Collection:
    """Read all runs in and below folders.

    Raises:
        InputError: A folder does not exist or holds no run.
    """
    runs: dict[Path, Run] = {}
    left_out: dict[str, ExcludedRun] = {}
    for folder in folders:
        if not folder.is_dir():
            state = "is a file" if folder.exists() else "does not exist"
            raise InputError(
                f"{str(folder)!r} {state}: expected a run folder such as runs/quickstart/version_0, or a "
                "folder above several"
            )
        before = len(runs) + len(left_out)
        plans = {root: read_plan(root) for root in _plan_folders(folder)}
        is_withdrawn = _withdrawals(plans)
        for path in _config_files(folder):
            found = read_run(path.parent)
            if found is not None and is_withdrawn(path.parent):
                told = f"{PLAN_FILE} does not name its cell"
                found = ExcludedRun(str(path.parent), "withdrawn", told, found.method)
            if isinstance(found, Run):
                runs[path.parent.resolve()] = found
            elif found is not None:
                left_out[found.name] = found
        for out in _grid_left_out(plans):
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


def read_run(folder: Path) -> Run | ExcludedRun | None:
    """Read a run folder; None if it is no folder of a `fit`."""
    try:
        config = yaml.safe_load((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        told = " ".join(str(error).split())
        return ExcludedRun(str(folder), "unreadable", f"{CONFIG_FILE} cannot be read: {told}")
    if not isinstance(config, dict) or not isinstance(config.get("model"), dict):
        return None
    method, rate = str(config["model"].get("method")), flat(config).get(RATE)
    seed = config.get("seed_everything")
    if not isinstance(rate, int | float | None) or not isinstance(seed, int | None):
        told = f"{CONFIG_FILE} is damaged: learning rate {rate!r}, seed {seed!r}"
        return ExcludedRun(str(folder), "unreadable", told, method)
    settings, task = method_settings(config), without_model_name(task_settings(config))
    known = (method, None if rate is None else float(rate), seed, settings, task)
    if not (folder / SUMMARY_FILE).is_file():
        return ExcludedRun(str(folder), "unfinished", f"it has no {SUMMARY_FILE} yet", *known)
    summary = read_json(folder / SUMMARY_FILE)
    damage = "it is no JSON object" if summary is None else _damage(summary)
    if summary is None or damage:
        return ExcludedRun(
            str(folder), "unreadable", f"{SUMMARY_FILE} is damaged: {damage}", *known
        )
    table = RunFolder(folder).metrics
    try:
        curves = read_metrics(table) if table.is_file() else {}
    except (ValueError, TypeError, KeyError) as error:
        return ExcludedRun(str(folder), "unreadable", f"metrics.csv is damaged ({error})", *known)
    validation, test = (summary["metrics"].get(moment, {}) for moment in ("final", "test"))
    for moment, scores in (("validation", validation), ("test", test)):
        for name, value in scores.items():
            if not math.isfinite(value):
                told = f"after training, the {moment} {name} is {value}"
                return ExcludedRun(str(folder), "diverged", told, *known)
    found = (
        str(summary.get("data", {}).get("rows")),
        summary.get("model", {}).get("fingerprint"),
    )
    return Run(
        folder,
        method,
        settings,
        {**task, **dict(zip(FOUND_AT_THE_END, found, strict=True))},
        math.nan if rate is None else float(rate),
        int(summary.get("seed") or seed or 0),
        validation,
        test,
        summary,
        curves,
    )


def _damage(summary: dict[str, Any]) -> str:
    """Say what of a summary has another form than a run's; nothing if all is well."""
    sections = {
        name: summary.get(name, {}) for name in ("metrics", "model", "data", "init", "train")
    }
    for name, section in sections.items():
        if not isinstance(section, dict):
            return f"{name} is {section!r}"
    if "metrics" not in summary:
        return "it has no metrics"
    numbers: dict[str, Any] = {"seed": summary.get("seed")}
    for moment, scores in sections["metrics"].items():
        if not isinstance(scores, dict):
            return f"metrics.{moment} is {scores!r}"
        if None in scores.values():
            return f"metrics.{moment} has no number for a score"
        numbers |= {f"metrics.{moment}.{name}": value for name, value in scores.items()}
    train, init, model = sections["train"], sections["init"], sections["model"]
    numbers |= {f"train.{name}": train.get(name) for name in TRAIN_NUMBERS}
    numbers["init.seconds"] = init.get("seconds")
    numbers |= {f"model.{name}": model.get(name) for name in ("parameters", "trainable_parameters")}
    peaks = init.get("peak_bytes", [])
    if not isinstance(peaks, list):
        return f"init.peak_bytes is {peaks!r}"
    numbers |= {f"init.peak_bytes {i}": peak for i, peak in enumerate(peaks)}
    if not isinstance(sections["data"].get("rows", {}), dict):
        return f"data.rows is {sections['data']['rows']!r}"
    wrong = [name for name, value in numbers.items() if not isinstance(value, int | float | None)]
    return f"{wrong[0]} is {numbers[wrong[0]]!r}" if wrong else ""


def _config_files(folder: Path) -> list[Path]:
    """Return the configurations in and below a folder, without W&B's copies."""
    if (folder / CONFIG_FILE).is_file():
        return [folder / CONFIG_FILE]
    found = folder.rglob(CONFIG_FILE)
    return sorted(path for path in found if "wandb" not in path.relative_to(folder).parts)


def _plan_folders(folder: Path) -> list[Path]:
    """Return the folders of comparisons in and below a folder."""
    plans = [folder / PLAN_FILE, *sorted(folder.rglob(PLAN_FILE))]
    return list(dict.fromkeys(path.parent for path in plans if path.is_file()))


def _withdrawals(plans: Mapping[Path, Plan]) -> Callable[[Path], bool]:
    """Return what says of a run whether it is of a comparison's cell that the plan does not name any more."""
    grids = {root / CELLS_FOLDER for root, plan in plans.items() if plan.cells}
    wanted = {
        root / CELLS_FOLDER / cell.name for root, plan in plans.items() for cell in plan.cells
    }
    return lambda run: any(p.parent in grids and p not in wanted for p in run.parents)


def _grid_left_out(plans: Mapping[Path, Plan]) -> Iterable[ExcludedRun]:
    """Yield the cells of comparisons that failed, never began or left no settings."""
    for root, plan in plans.items():
        task = None if plan.task is None else without_model_name(plan.task)
        for cell in plan.cells:
            path = root / CELLS_FOLDER / cell.name
            known = (
                *(cell.method, cell.learning_rate, cell.seed),
                *(plan.methods.get(cell.method), task),
            )
            found = state_of(path)
            if found.state in ("failed", "diverged"):
                told = read_json(path / FAILURE_FILE) or {}
                yield ExcludedRun(str(path), found.state, str(told.get("message")), *known)
            elif found.state == "missing":
                yield ExcludedRun(str(path), "missing", "it was not run", *known)
            elif found.state == "started" and not any(
                (version / CONFIG_FILE).is_file() for version in run_folders(path)
            ):
                yield ExcludedRun(str(path), "unfinished", "it was ended as it began", *known)


def _identity(run: Run) -> tuple[Any, ...]:
    parts = (run.method, repr(sorted(run.settings.items())), repr(sorted(run.task.items())))
    return (*parts, run.learning_rate, run.seed)


def _newest(runs: Iterable[Run]) -> tuple[list[Run], list[ExcludedRun]]:
    """Return one run of each settings, the last trained, and those before it."""
    chosen: dict[tuple[Any, ...], Run] = {}
    repeated = []
    for run in sorted(runs, key=_trained_at):
        before = chosen.pop(_identity(run), None)
        chosen[_identity(run)] = run
        if before is not None:
            reason = f"the same settings were run again later: {run.folder}"
            known = (before.method, before.learning_rate, before.seed)
            repeated.append(ExcludedRun(str(before.folder), "repeated", reason, *known))
    order = sorted(chosen.values(), key=lambda run: str(run.folder))
    return order, repeated


def _trained_at(run: Run) -> float:
    """Return when a run's training ended; its summary is written again by a test."""
    ended = run.told.get("train", {}).get("ended")
    return float(ended or (run.folder / SUMMARY_FILE).stat().st_mtime)


def _is_done(out: ExcludedRun, runs: Sequence[Run]) -> bool:
    """Return whether an unfinished run was finished by a later attempt beside it."""
    parent = Path(out.name).parent
    same = (out.method, out.learning_rate, out.seed)
    return any(
        run.folder.parent == parent and (run.method, run.learning_rate, run.seed) == same
        for run in runs
    )
