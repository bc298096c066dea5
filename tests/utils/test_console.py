"""Progress: plain lines in a log file, bars on a terminal."""

import logging
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from app.utils import console as progress
from tests.support.paths import ROOT


@pytest.mark.slow
def test_a_log_file_holds_plain_lines(tiny_run, tmp_path):
    """The one run in a process of its own, as a notebook starts it, without a terminal or a key."""
    log = tmp_path / "log.txt"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled"}
    environment["MPLBACKEND"] = "module://of_a_notebook"  # not installed here
    with log.open("wb") as file:
        status = subprocess.run(
            [sys.executable, ROOT / "train.py", "fit", "--config", tiny_run],
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            env=environment,
            cwd=tmp_path,
            timeout=300,
            check=False,
        ).returncode
    message = log.read_bytes().decode()
    assert status == 0, message
    assert not re.search(r"[\r\x1b\x08█▏▎▍▌▋▊▉┃━]|it/s", message)
    for line in ("Warning", "warn(", "Traceback", "💡", "Total FLOPs", "Writing model shards"):
        assert line not in message
    expected = (
        r"8,784 parameters in float32; 2,048 are trained",
        r"score, zero shot: 3/3 batches, \d+ s",
        r"one-step gradient, pass 1 of at most 4: 4/4 batches, \d+ s",
        r"LoRA-One initialization: 14 layers, 16 samples, 1 pass to a tolerance of 0.02, loss \d",
        r"score, after init: 3/3 batches, \d+ s",
        r"epoch 0, step 3/3, train/loss \d\.\d{4}, \d+ s, 0 s left",
        r"score, final: 3/3 batches, \d+ s",
        r"zero_shot( +-?\d\.\d{4}){4}",
        r"after_init( +-?\d\.\d{4}){4}",
        r"final( +-?\d\.\d{4}){4}",
        rf"run folder: {tmp_path}/runs/tiny/version_0",
    )
    places = [re.search(line, message) for line in expected]
    assert all(places), [line for line, place in zip(expected, places, strict=True) if not place]
    starts = [place.start() for place in places]
    assert starts == sorted(starts)


def test_a_kernel_that_only_a_quantised_base_uses_is_not_spoken_of(caplog):
    progress.silence()
    log = logging.getLogger("bitsandbytes.backends.cpu.ops")
    log.warning("Failed to load CPU gemm_4bit_forward from kernels-community: %s", "no module")
    log.warning("Something else")
    assert [record.getMessage() for record in caplog.records] == ["Something else"]


def test_a_warning_is_one_line(command, monkeypatch):
    """The project's own as a message alone, others with their place; whatever an import has set."""
    source = "warn(message)"

    def imported(*_):
        monkeypatch.setattr(warnings, "formatwarning", lambda *_: f"UserWarning\n  {source}\n")
        return lambda arguments: 0

    monkeypatch.setattr("app.cli.main._imported", imported)
    assert command("fit") == 0

    def written(*place):
        file = str(Path(*place))
        return file, warnings.formatwarning(UserWarning("a b"), UserWarning, file, 7, source)

    assert written(ROOT, "data_modules", "table.py")[1] == "warning: a b\n"
    for place in (("/elsewhere", "x.py"), (ROOT, ".venv", "lib", "site-packages", "x.py")):
        file, line = written(*place)
        assert line == f"{file}:7: UserWarning: a b\n"


def test_track_yields_everything_and_speaks_every_few_seconds(monkeypatch, capsys):
    clock = iter(range(0, 1000, 2))
    monkeypatch.setattr(progress, "on_terminal", lambda: False)
    monkeypatch.setattr(progress.time, "perf_counter", lambda: next(clock))
    assert list(progress.track(range(7), "counting")) == list(range(7))
    lines = capsys.readouterr().out.splitlines()
    assert lines == [f"counting: {n}/7 batches, {2 * n} s" for n in (3, 6, 7)]
    assert list(progress.track([], "nothing")) == []


def test_a_terminal_gets_a_bar(monkeypatch, capsys):
    monkeypatch.setattr(progress, "on_terminal", lambda: True)
    assert list(progress.track([3, 1, 2], "counting")) == [3, 1, 2]
    message = capsys.readouterr()
    assert "counting" in message.err
    assert "\r" in message.err
    assert message.out == ""


@pytest.mark.parametrize("bar", ["true", "false"])
def test_a_terminal_run(bar, monkeypatch, command, tiny_run, capsys):
    monkeypatch.setattr("app.cli.lora_cli.on_terminal", lambda: True)
    monkeypatch.setattr(progress, "on_terminal", lambda: True)
    assert command("fit", "--config", tiny_run, f"--trainer.enable_progress_bar={bar}") == 0
    message = capsys.readouterr()
    assert ("Epoch 0:" in message.out + message.err) is (bar == "true")
    assert "epoch 0, step" not in message.out
