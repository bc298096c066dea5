"""The history of benchmark runs: one row a run, and a picture."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks import history


def test_each_run_appends_a_row_that_is_drawn(tmp_path, monkeypatch):
    file, picture = tmp_path / "history.jsonl", tmp_path / "docs" / "history.png"
    arguments = {"rounds": 3, "data": Path("/some/where/test.jsonl"), "json": None}
    history.append("init", arguments, {"PEFT's / ours": 1.23456}, file)
    history.append("optimizer", {}, {"PEFT's / ours": 3.0, "ours / AdamW": 2.5}, file)
    first, second = map(json.loads, file.read_text().splitlines())
    assert first["arguments"] == {"rounds": 3, "data": "test.jsonl"}
    assert first["figures"] == {"PEFT's / ours": 1.2346}
    assert first["torch"] == torch.__version__
    assert (first["script"], second["script"]) == ("init", "optimizer")
    assert first["date"] <= second["date"]
    monkeypatch.setattr("sys.argv", ["history", "--file", str(file), "--output", str(picture)])
    history.main()
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_without_runs_there_is_nothing_to_draw(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["history", "--file", str(tmp_path / "none.jsonl")])
    with pytest.raises(SystemExit):
        history.main()
    assert "none.jsonl does not exist: run a benchmark first" in capsys.readouterr().err
