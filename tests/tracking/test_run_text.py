"""What a command says at its end: scores, speed, memory, files, and commands that work as they stand."""

import re
import shlex
from types import SimpleNamespace

import pytest
import torch

from app.tracking.record import DataRecord, RunRecord, TrainRecord
from app.tracking.run_folder import RunFolder
from app.tracking.run_text import duration_text, finished_text, next_commands
from app.training.module import LoraModule
from app.utils import console
from callbacks.run_report import RunReport
from tests.support.run_folders import summary


def test_all_that_is_said_of_a_run(tmp_path):
    train = TrainRecord(
        steps=40,
        seconds=125.0,
        samples_per_second=2.56,
        tokens_per_second=1234.4,
        peak_bytes=1_936_000_000,
        device="cpu",
    )
    record = RunRecord(metrics={"final": {"accuracy": 0.85}}, train=train)
    (tmp_path / "adapter").mkdir()
    assert finished_text(record, RunFolder(tmp_path)).splitlines() == [
        "",
        "scores",
        "                accuracy",
        "       final      0.8500",
        "",
        "trained: 40 steps in 2 min 05 s, 2.6 examples a second, 1,234 tokens a second",
        "peak memory: 1.94 GB on cpu",
        f"adapter: {tmp_path}/adapter",
        f"run folder: {tmp_path}",
        "",
        "next",
        f"  python train.py test --run {tmp_path}",
        f"  python train.py export --run {tmp_path} --merge",
        f"  python train.py report {tmp_path.parent}",
    ]


def test_a_run_that_an_earlier_version_trained_has_no_speed(tmp_path):
    said = finished_text(RunRecord(metrics={}, train=TrainRecord(steps=3)), RunFolder(tmp_path))
    assert "trained:" not in said
    assert "peak memory" not in said
    assert f"model: {tmp_path}/model" in said


def test_what_comes_next_fits_the_run(tmp_path):
    folder = RunFolder(tmp_path / "my runs" / "version_0")
    record = RunRecord(data=DataRecord(rows={"test": 0}))
    commands = next_commands(record, folder)
    assert [shlex.split(command)[2] for command in commands] == ["validate", "export", "report"]
    assert shlex.split(commands[0])[-1] == str(folder)
    assert shlex.split(commands[2])[-1] == str(folder.path.parent)
    after_a_test = next_commands(record, folder, tested=True)
    assert after_a_test == commands[1:]
    unscored = RunRecord(data=DataRecord(rows={"validation": 0, "test": 0}))
    assert next_commands(unscored, folder) == commands[1:]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.04, "0.0 s"),
        (7.25, "7.2 s"),
        (59.7, "1 min 00 s"),
        (72, "1 min 12 s"),
        (11221, "3 h 07 min"),
    ],
)
def test_durations(seconds, text):
    assert duration_text(seconds) == text


def test_bold_is_for_terminals(monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert console.bold("next") == "next"
    monkeypatch.setattr(console, "on_terminal", lambda: True)
    assert console.bold("next") == "\x1b[1mnext\x1b[0m"
    monkeypatch.setenv("NO_COLOR", "1")
    assert console.bold("next") == "next"


@pytest.mark.slow
def test_the_commands_work_as_they_are_printed(command, fit, tmp_path, caplog, capsys, monkeypatch):
    with caplog.at_level("INFO", logger="lightning.pytorch.utilities.rank_zero"):
        folder = fit()
        said = caplog.text
        caplog.clear()
        commands = [shlex.split(line) for line in re.findall(r"  python train.py (.*)", said)]
        assert [words[0] for words in commands] == ["test", "export", "report"]
        monkeypatch.chdir(tmp_path)
        capsys.readouterr()
        for words in commands:
            assert command(*words) == 0
    assert (folder / "merged" / "model.safetensors").is_file()
    assert caplog.text.count("python train.py") == 2
    test = summary(folder)["metrics"]["test"]
    assert f"{'test':>12}{test['accuracy']:12.4f}" in caplog.text
    assert "Test metric" not in capsys.readouterr().out  # the scores are said once


def test_tokens_are_those_of_the_masks(fit, monkeypatch):
    seen = []
    original = LoraModule.training_step

    def training_step(module, batch, batch_idx):
        seen.extend(batch["attention_mask"].sum(1).tolist())
        return original(module, batch, batch_idx)

    monkeypatch.setattr(LoraModule, "training_step", training_step)
    train = summary(fit())["train"]
    assert len(seen) == train["samples"] == 24
    assert train["tokens"] == sum(seen) > 24 * 20
    assert train["tokens_per_second"] == pytest.approx(sum(seen) / train["seconds"])


def test_padding_rows_are_neither_examples_nor_tokens():
    """A process gets them where the rows do not divide by the processes."""
    report, module = RunReport(), SimpleNamespace(log=lambda *_: None)
    batch = {
        "index": torch.tensor([3, -1]),
        "attention_mask": torch.tensor([[1, 1, 0], [1, 1, 1]]),
        "input_ids": torch.zeros(2, 3, dtype=torch.long),
    }
    report.on_train_batch_end(SimpleNamespace(global_step=1), module, None, batch, 0)
    state = report.state_dict()
    assert (state["samples"], state["tokens"]) == (1, 2)
