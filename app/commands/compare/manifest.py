"""compare.json: what a comparison's runs share, each method's settings, and the cells ever asked for."""

import fcntl
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from app.commands.compare.cells import CELLS_FOLDER, Cell
from app.commands.compare.settings import Settings, differences, differences_text, flat
from app.tracking.run_folder import run_folders
from app.utils.errors import InputError
from app.utils.files import read_json, write_json

MANIFEST_FILE = "compare.json"
MANIFEST_LOCK = "compare.lock"


@dataclass(frozen=True)
class GridManifest:
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


def update_manifest(folder: Path, asked: GridManifest) -> None:
    """Add what is asked for now to what was asked for before.

    Args:
        folder: The comparison's folder.
        asked: What is asked for now.

    Raises:
        InputError: The folder cannot be written, or holds a comparison of another task, or has a method or
            a benchmark with other settings; the file is then as it was.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / MANIFEST_LOCK).open("a")
    except OSError as error:
        raise InputError(
            f"the folder {str(folder)!r} cannot be written ({error.strerror}): set --name or output.root"
        ) from error
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        merged = _merge(folder, read_manifest(folder), asked)
        content = {
            "task": merged.task,
            "methods": merged.methods,
            "benchmarks": merged.benchmarks,
            "cells": [(c.method, c.learning_rate, c.seed) for c in merged.cells],
        }
        write_json(folder / MANIFEST_FILE, content)


def _merge(folder: Path, before: GridManifest, asked: GridManifest) -> GridManifest:
    """Return both manifests as one; raise InputError where their settings differ."""
    other = "(then, now). Give this one another --name"
    differ = {} if before.task is None else differences(before.task, asked.task or {})
    if differ and not any(run_folders(folder / CELLS_FOLDER / c.name) for c in before.cells):
        return asked  # nothing has been trained that it could be mixed with
    if differ:
        raise InputError(
            f"{folder} holds a comparison of another task: {differences_text(differ)} {other}"
        )
    for kind, then, now in (
        ("method", before.methods, asked.methods),
        ("benchmark", before.benchmarks, asked.benchmarks),
    ):
        for name in then.keys() & now.keys():
            differ = differences(then[name], now[name])
            if differ:
                raise InputError(
                    f"{folder} has other settings of the {kind} {name}: {differences_text(differ)} {other}"
                )
    return GridManifest(
        list(dict.fromkeys([*before.cells, *asked.cells])),
        asked.task,
        {**before.methods, **asked.methods},
        {**before.benchmarks, **asked.benchmarks},
    )


def read_manifest(folder: Path) -> GridManifest:
    """Return what a comparison's folder was asked for; an empty manifest elsewhere."""
    content = read_json(folder / MANIFEST_FILE) or {}
    sections = {
        name: content[name] if isinstance(content.get(name), dict) else {}
        for name in ("task", "methods", "benchmarks")
    }
    cells = content.get("cells")
    return GridManifest(
        [Cell(c[0], float(c[1]), c[2]) for c in cells if _is_cell(c)]
        if isinstance(cells, list)
        else [],
        flat(sections["task"]) or None,
        {name: flat(s) for name, s in sections["methods"].items() if isinstance(s, dict)},
        {name: flat(s) for name, s in sections["benchmarks"].items() if isinstance(s, dict)},
    )


def _is_cell(cell: Any) -> bool:
    if not (isinstance(cell, list) and [type(part) for part in cell[::2]] == [str, int]):
        return False
    rate = cell[1]
    return isinstance(rate, int | float) and math.isfinite(rate) and rate > 0
