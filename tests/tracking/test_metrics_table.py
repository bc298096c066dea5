"""metrics.csv survives a disk that refuses for a while."""

import csv
import resource
import warnings
from contextlib import contextmanager

import pytest

from app.tracking.loggers import MetricsTable


@contextmanager
def files_end_at(size):
    """Let the kernel refuse to make any file of this process larger."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture
def table(tmp_path):
    return MetricsTable(str(tmp_path), "tiny", "version_0")


def rows(table):
    with open(f"{table.log_dir}/metrics.csv", newline="") as stream:
        return list(csv.DictReader(stream))


@pytest.mark.parametrize("new_column", [False, True])
@pytest.mark.parametrize("room", [0, 30])
def test_rows_wait_until_they_can_be_written(room, new_column, table, tmp_path):
    """With `room`, the refusal comes in the middle of the rows."""
    table.log_metrics({"train/loss": 4.5}, step=0)
    table.save()
    file = tmp_path / "tiny" / "version_0" / "metrics.csv"
    before = file.read_bytes()
    with files_end_at(len(before) + room):
        for step in range(1, 8):
            more = {"val/loss": 0.5} if new_column else {}
            table.log_metrics({"train/loss": 4.0 - step / 8, **more}, step=step)
        with pytest.warns(UserWarning, match="metrics.csv could not be written .*training goes on"):
            table.save()
        assert [row["step"] for row in rows(table)] == ["0"]
        with warnings.catch_warnings(action="error"):  # it has been said
            table.finalize("failed")
        assert not list(file.parent.glob("*.part"))
    table.log_metrics({"train/loss": 1.0, "val/accuracy": 0.5}, step=8)
    table.save()
    found = rows(table)
    assert [int(row["step"]) for row in found] == list(range(9))
    wanted = [4.5, *(4.0 - step / 8 for step in range(1, 8)), 1.0]
    assert [float(row["train/loss"]) for row in found] == wanted
    assert found[-1]["val/accuracy"] == "0.5"


def test_a_table_that_cannot_be_begun(table, tmp_path):
    with files_end_at(0):
        table.log_metrics({"train/loss": 4.5}, step=0)
        with pytest.warns(UserWarning, match="could not be written"):
            table.save()
    table.save()
    assert [row["train/loss"] for row in rows(table)] == ["4.5"]
