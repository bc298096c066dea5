"""compare.json: the settings that a comparison's runs share, and the cells ever asked for."""

import fcntl
from collections.abc import Sequence
from pathlib import Path

from app.compare.cells import Cell, read_json
from app.compare.settings import Settings, differences, told
from app.errors import InputError
from app.run_record import write_json

PLAN_FILE = "compare.json"
PLAN_LOCK = "compare.lock"


def note_cells(folder: Path, task: Settings, cells: Sequence[Cell]) -> None:
    """Write down what is asked for, beside what was asked for before.

    Args:
        folder: The comparison's folder.
        task: The settings that all runs share.
        cells: The cells asked for.

    Raises:
        InputError: The folder cannot be written, or holds a comparison of another task.
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
        before = read_json(folder / PLAN_FILE) or {"task": task, "cells": []}
        found = differences(before["task"], task)
        if found:
            raise InputError(
                f"{folder} holds a comparison of another task: {told(found)} (then, now). Give this one "
                "another --name"
            )
        wanted = [(cell.method, cell.learning_rate, cell.seed) for cell in cells]
        noted = [tuple(cell) for cell in before["cells"]]
        merged = list(dict.fromkeys([*noted, *wanted]))
        if merged != noted:
            write_json(folder / PLAN_FILE, {"task": task, "cells": merged})


def planned_cells(folder: Path) -> list[Cell]:
    """Return the cells that a comparison's folder was asked for; none elsewhere."""
    plan = read_json(folder / PLAN_FILE) or {}
    return [Cell(*cell) for cell in plan.get("cells", [])]
