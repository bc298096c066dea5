"""The loggers of a run: metrics.csv while the disk is full, and how W&B is asked for."""

import resource
import warnings
from contextlib import contextmanager

import pytest
from lightning.pytorch.loggers import CSVLogger, WandbLogger

from app.tracking.loggers import MetricsTable, OutputSettings, make_loggers, run_folder_of
from tests.support.run_folders import table


@contextmanager
def files_end_at(size):
    """Make every write fail that makes a file of this process larger."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "tiny" / "version_0"


@pytest.fixture
def logger(tmp_path):
    return MetricsTable(str(tmp_path), "tiny", "version_0")


@pytest.mark.parametrize("new_column", [False, True])
@pytest.mark.parametrize("room", [0, 30])
def test_rows_wait_until_they_can_be_written(room, new_column, logger, folder):
    """With `room`, the write fails in the middle of the rows."""
    logger.log_metrics({"train/loss": 4.5}, step=0)
    logger.save()
    before = (folder / "metrics.csv").read_bytes()
    with files_end_at(len(before) + room):
        for step in range(1, 8):
            more = {"val/loss": 0.5} if new_column else {}
            logger.log_metrics({"train/loss": 4.0 - step / 8, **more}, step=step)
        with pytest.warns(UserWarning, match="metrics.csv could not be written .*training goes on"):
            logger.save()
        assert [row["step"] for row in table(folder)] == ["0"]
        with warnings.catch_warnings(action="error"):  # it has been said
            logger.finalize("failed")
        assert not list(folder.glob("*.part"))
    logger.log_metrics({"train/loss": 1.0, "val/accuracy": 0.5}, step=8)
    logger.save()
    written = table(folder)
    assert [int(row["step"]) for row in written] == list(range(9))
    wanted = [4.5, *(4.0 - step / 8 for step in range(1, 8)), 1.0]
    assert [float(row["train/loss"]) for row in written] == wanted
    assert written[-1]["val/accuracy"] == "0.5"


def test_a_table_that_cannot_be_begun(logger, folder):
    with files_end_at(0):
        logger.log_metrics({"train/loss": 4.5}, step=0)
        with pytest.warns(UserWarning, match="could not be written"):
            logger.save()
    logger.save()
    assert [row["train/loss"] for row in table(folder)] == ["4.5"]


def loggers(tmp_path, **settings):
    return make_loggers(OutputSettings(name="x", root=str(tmp_path), **settings), task="glue/sst2")


def test_the_run_folder_is_that_of_the_runs_own_table(tmp_path):
    """On other processes, and in a dry run, there are the user's loggers alone."""
    own = CSVLogger(str(tmp_path))
    [table] = loggers(tmp_path, wandb="disabled")
    assert run_folder_of([own]) is None
    assert run_folder_of([own, table]).path == tmp_path / "x" / "version_0"


def test_a_wandb_logger_of_the_users_own_takes_the_place_of_the_runs(tmp_path):
    settings = OutputSettings(name="x", root=str(tmp_path), wandb="offline")
    assert len(make_loggers(settings)) == 2
    [only] = make_loggers(settings, own=[WandbLogger(save_dir=tmp_path, offline=True)])
    assert isinstance(only, MetricsTable)


def test_the_group_is_the_task_unless_it_is_named(no_key, tmp_path):
    groups = [
        loggers(tmp_path, **settings)[1]._wandb_init["group"]
        for settings in ({}, {"wandb_group": "g"})
    ]
    assert groups == ["glue/sst2", "g"]
