"""metrics.csv: the table of a run, which an interrupted run continues."""

import csv
import errno
import io
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from typing_extensions import override

from app.processes import rank

TABLE_FILE = "metrics.csv"


class MetricsTable(CSVLogger):
    """Lightning's CSV logger, which goes on in the table that it finds."""

    @property
    @override
    def experiment(self) -> Any:
        """The writer; only the first process has one that writes."""
        if self._experiment is None and rank() == 0:
            self._experiment = _Writer(self.log_dir)
        return self._experiment


class _Writer(ExperimentWriter):
    def __init__(self, log_dir: str) -> None:
        super().__init__(log_dir)
        self.metrics_keys = read_table(Path(self.metrics_file_path))[0]
        self._refused = False

    @override
    def _check_log_dir_exists(self) -> None:
        """Keep the table that is there."""

    @override
    def save(self) -> None:
        """Add the new rows to the table; if the disk refuses, say so once and keep them for the next time."""
        if not self.metrics:
            return
        path = Path(self.metrics_file_path)
        names = sorted({*self.metrics_keys, *(name for row in self.metrics for name in row)})
        try:
            if names != self.metrics_keys or not path.is_file():
                write_table(path, names, read_table(path)[1])
                self.metrics_keys = names
            append_rows(path, names, self.metrics)
        except OSError as error:
            if not self._refused:
                rank_zero_warn(
                    f"{path} could not be written ({error.strerror or error}): training goes on, and its rows "
                    "are kept until they can be. Make room, or allow writing there"
                )
            self._refused = True
        else:
            self.metrics, self._refused = [], False


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
    part = path.with_name(path.name + ".part")
    try:
        with part.open("w", newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, names)
            writer.writeheader()
            writer.writerows(rows)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(part, path)
    except OSError:
        part.unlink(missing_ok=True)  # a full disk needs its room
        raise


def append_rows(path: Path, names: list[str], rows: Iterable[dict[str, Any]]) -> None:
    """Add rows to a table, all or none."""
    text = io.StringIO(newline="")
    csv.DictWriter(text, names).writerows(rows)
    content = text.getvalue().encode()
    with path.open("ab", buffering=0) as stream:
        before = stream.tell()
        try:
            if stream.write(content) != len(content):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            stream.truncate(before)
            raise


def rewind_table(path: Path, step: int, validation_due: bool) -> None:
    """Drop the rows that an interrupted run logged after its checkpoint: they are made again.

    Args:
        path: The table.
        step: Optimizer steps at the checkpoint.
        validation_due: Whether the validation after that step is made again, too.
    """
    names, rows = read_table(path)
    if not names:
        return

    def stands(row: dict[str, str]) -> bool:
        if not row["step"].isdigit() or int(row["step"]) > step:
            return False
        if (
            int(row["step"]) == step
        ):  # steps count from 0; the final scores stand behind the last one
            return any(value and name.startswith("final/") for name, value in row.items())
        again = validation_due and int(row["step"]) == step - 1
        return not (again and any(value and name.startswith("val/") for name, value in row.items()))

    write_table(path, names, filter(stands, rows))


def has_value(path: Path, step: int, name: str) -> bool:
    """Return whether a table holds a value of that name at that step."""
    return any(row["step"] == str(step) and row.get(name) for row in read_table(path)[1])
