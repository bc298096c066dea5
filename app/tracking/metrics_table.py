"""Read and write metrics.csv, the table of a run, which an interrupted run continues."""

import csv
import errno
import io
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from app.utils.files import atomic_write


def read_table(path: Path) -> tuple[list[str], list[dict[str, str]]]:
    """Return the column names and the rows of a table, without a last row that was cut off."""
    if not path.is_file():
        return [], []
    with path.open(newline="", encoding="utf-8") as stream:
        reader = csv.DictReader(stream)
        rows = [row for row in reader if None not in row and None not in row.values()]
        return list(reader.fieldnames or []), rows


def write_table(path: Path, names: list[str], rows: Iterable[dict[str, str]]) -> None:
    """Write a table, whole or not at all."""
    with atomic_write(path) as stream:
        header = dict(zip(names, names, strict=True))
        stream.write(_lines(names, [header, *rows]))


def append_rows(path: Path, names: list[str], rows: Iterable[dict[str, Any]]) -> None:
    """Add rows to a table, all or none."""
    content = _lines(names, rows)
    with path.open("ab", buffering=0) as stream:
        before = stream.tell()
        try:
            if stream.write(content) != len(content):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            stream.truncate(before)
            raise


def _lines(names: list[str], rows: Iterable[dict[str, Any]]) -> bytes:
    text = io.StringIO(newline="")
    csv.DictWriter(text, names).writerows(rows)
    return text.getvalue().encode()


def rewind_table(path: Path, step: int, validation_due: bool, scored: bool) -> None:
    """Drop the rows that an interrupted run logged after its checkpoint: they are made again.

    Args:
        path: The table.
        step: Optimizer steps at the checkpoint.
        validation_due: Whether the validation after that step is made again, too.
        scored: Whether the checkpoint holds the final scores, which are not made again.
    """
    names, rows = read_table(path)
    if not names:
        return

    def has(row: dict[str, str], prefix: str) -> bool:
        return any(value and name.startswith(prefix) for name, value in row.items())

    def is_kept(row: dict[str, str]) -> bool:
        logged = int(row["step"]) if row["step"].isdigit() else step + 1
        if logged >= step:  # steps count from 0: at the next one stand the final scores alone
            return scored and logged == step and has(row, "final/")
        return not (validation_due and logged == step - 1 and has(row, "val/"))

    write_table(path, names, filter(is_kept, rows))


def has_value(path: Path, step: int, name: str) -> bool:
    """Return whether a table holds a value of that name at that step."""
    return any(row["step"] == str(step) and row.get(name) for row in read_table(path)[1])


def read_metrics(path: Path) -> dict[str, list[tuple[int, float]]]:
    """Read metrics.csv into (step, value) lists, one for each column that has numbers."""
    curves: dict[str, list[tuple[int, float]]] = {}
    with path.open(newline="") as stream:
        for row in csv.DictReader(stream):
            for name, cell in row.items():
                if cell and name not in ("step", "epoch"):
                    curves.setdefault(name, []).append((int(float(row["step"])), float(cell)))
    return curves
