"""`compare` on the tiny run, with the commands of its cells in the test's process."""

import os
import sys
from types import SimpleNamespace

import pytest

from app.commands.compare import scheduler
from tests.support.paths import ROOT

OPTIONS = ("--trainer.max_steps=2", "--data.validation_size=20", "--init.num_samples=4")


@pytest.fixture
def started(monkeypatch):
    """Run each cell's commands in this process; return the list of them."""
    from app.cli.main import main

    commands = []

    def start(argv, log, lock):
        assert argv[:2] == [sys.executable, str(ROOT / "train.py")]
        commands.append(argv[2:])
        os.fstat(lock)
        saved = sys.stdout, sys.stderr
        sys.stdout = sys.stderr = open(log.fileno(), "w", closefd=False)  # noqa: SIM115
        try:
            status = main(argv[2:])
        finally:
            sys.stdout.flush()
            sys.stdout, sys.stderr = saved
        return SimpleNamespace(poll=lambda: status)

    monkeypatch.setattr(scheduler, "start_process", start)
    return commands


@pytest.fixture
def compare(command, started, tiny_run, monkeypatch):
    """Return `compare(*argv)`, which compares on the tiny run and returns the exit status; it draws nothing."""
    monkeypatch.setattr("app.commands.compare.report.comparison_plots", lambda _: [])
    return lambda *argv, options=OPTIONS: command("compare", "--config", tiny_run, *options, *argv)


@pytest.fixture
def refused(compare, capsys, started):
    """Return `refused(*argv)`: the one line that refuses, before anything was started."""

    def run(*argv, options=OPTIONS):
        capsys.readouterr()
        assert compare(*argv, options=options) == 2
        assert started == []
        return capsys.readouterr().err.removeprefix("error: ").strip()

    return run
