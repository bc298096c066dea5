"""compare.json: what a comparison's runs share, each method's settings, and the cells ever asked for."""

import fcntl
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from app.commands.compare.cells import CELLS_FOLDER, Cell
from app.commands.compare.settings import Settings, differences, told
from app.tracking.run_folder import run_folders
from app.utils.errors import InputError
from app.utils.files import read_json, write_json

PLAN_FILE = "compare.json"
PLAN_LOCK = "compare.lock"


@dataclass(frozen=True)
class Plan:
    """What a comparison was asked for.

    Attributes:
        cells: The cells.
        task: The settings that all runs share; None where the file does not say.
        methods: The settings of each method, without the learning rate.
        benchmarks: The settings of each benchmark that finished runs are asked, by its name.
    """

    cells: list[Cell]
    task: Settings | None = None
    methods: Mapping[str, Settings] = field(default_factory=dict)
    benchmarks: Mapping[str, Settings] = field(default_factory=dict)


def update_manifest(folder: Path, plan: Plan) -> None:
    """Write down what is asked for, beside what was asked for before.

    Args:
        folder: The comparison's folder.
        plan: What is asked for now.

    Raises:
        InputError: The folder cannot be written, or holds a comparison of another task, or has a method or
            a benchmark with other settings; the file is then as it was.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / PLAN_LOCK).open("a")
    except OSError as error:
        raise InputError(
            f"the folder {str(folder)!r} cannot be written ({error.strerror}): set --name or output.root"
        ) from error
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        before = read_plan(folder)
        other = "(then, now). Give this one another --name"
        found = {} if before.task is None else differences(before.task, plan.task or {})
        if found and not any(run_folders(folder / CELLS_FOLDER / c.name) for c in before.cells):
            before, found = Plan([]), {}  # nothing has been trained that it could be mixed with
        if found:
            raise InputError(f"{folder} holds a comparison of another task: {told(found)} {other}")
        for kind, then, now in (
            ("method", before.methods, plan.methods),
            ("benchmark", before.benchmarks, plan.benchmarks),
        ):
            for name in then.keys() & now.keys():
                found = differences(then[name], now[name])
                if found:
                    raise InputError(
                        f"{folder} has other settings of the {kind} {name}: {told(found)} {other}"
                    )
        merged = Plan(
            list(dict.fromkeys([*before.cells, *plan.cells])),
            plan.task,
            {**before.methods, **plan.methods},
            {**before.benchmarks, **plan.benchmarks},
        )
        if merged != before:
            write_json(
                folder / PLAN_FILE,
                {
                    "task": merged.task,
                    "methods": merged.methods,
                    "benchmarks": merged.benchmarks,
                    "cells": [(c.method, c.learning_rate, c.seed) for c in merged.cells],
                },
            )


def read_plan(folder: Path) -> Plan:
    """Return what a comparison's folder was asked for; an empty plan elsewhere."""
    content = read_json(folder / PLAN_FILE) or {}
    parts = [content.get(name) for name in ("task", "methods", "benchmarks", "cells")]
    task, methods, benchmarks = (part if isinstance(part, dict) else None for part in parts[:3])
    cells = parts[3] if isinstance(parts[3], list) else []
    return Plan(
        [Cell(cell[0], float(cell[1]), cell[2]) for cell in cells if _is_cell(cell)],
        task or None,
        _settings_only(methods),
        _settings_only(benchmarks),
    )


def _is_cell(cell: Any) -> bool:
    return (
        isinstance(cell, list)
        and len(cell) == 3
        and isinstance(cell[0], str)
        and isinstance(cell[1], int | float)
        and math.isfinite(cell[1])
        and cell[1] > 0
        and isinstance(cell[2], int)
    )


def _settings_only(found: Mapping[str, Any] | None) -> dict[str, Settings]:
    return {name: value for name, value in (found or {}).items() if isinstance(value, dict)}
