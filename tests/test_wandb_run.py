"""Weights & Biases: offline without a key and without a question; the file holds the whole run."""

import csv
import io
import json
import struct
import sys

import pytest
import wandb
import yaml
from lightning.pytorch.loggers import CSVLogger, WandbLogger
from wandb.proto import wandb_internal_pb2

from app import plots
from app.run_folder import OutputSettings, make_loggers

BLOCK = 32768
FULL, FIRST, MIDDLE, LAST = 1, 2, 3, 4


def records(path):
    """Yield the records of a .wandb file: LevelDB's log format behind a header of 7 bytes."""
    content = path.read_bytes()
    assert content[:4] == b":W&B"
    position, parts = 7, []
    while position + 7 <= len(content):
        room = BLOCK - position % BLOCK
        if room < 7:
            position += room
            continue
        _, length, kind = struct.unpack_from("<IHB", content, position)
        parts.append(content[position + 7 : position + 7 + length])
        position += 7 + length
        assert kind in (FULL, FIRST, MIDDLE, LAST)
        if kind in (FULL, LAST):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(b"".join(parts))
            parts = []
            yield record


def items(entries):
    return {
        "/".join(entry.nested_key) or entry.key: json.loads(entry.value_json) for entry in entries
    }


@pytest.fixture
def no_key(monkeypatch, tmp_path):
    """Take away every key, and whatever could answer a question."""
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_SILENT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", "/dev/null")
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "no_settings"))
    stdin = io.StringIO()
    stdin.close()
    monkeypatch.setattr(sys, "stdin", stdin)
    wandb.teardown()  # it reads its environment once
    yield
    wandb.teardown()


def test_an_offline_run_holds_everything(no_key, command, tiny_run, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr("callbacks.run_report.write_plots", plots.write_plots)
    options = ("--output.wandb=auto", "--output.wandb_group=g", "--output.wandb_tags=[one, two]")
    assert command("fit", "--config", tiny_run, *options) == 0
    told = capfd.readouterr()
    assert "wandb: WARNING" not in told.err + told.out
    folder = tmp_path / "runs" / "tiny" / "version_0"
    [file] = folder.glob("wandb/offline-run-*/*.wandb")
    history, summary, config, run = [], {}, {}, None
    for record in records(file):
        kind = record.WhichOneof("record_type")
        if kind == "history":
            history.append(items(record.history.item))
        elif kind == "summary":
            summary |= items(record.summary.update)
        elif kind == "run":
            run = record.run
            config |= items(record.run.config.update)
        elif kind == "config":
            config |= items(record.config.update)

    assert run.display_name == "tiny/version_0"
    assert (run.project, run.run_group, list(run.tags)) == ("lora-one", "g", ["one", "two"])

    with (folder / "metrics.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    expected = {int(r["step"]): float(r["train/loss"]) for r in rows if r["train/loss"]}
    curve = {h["trainer/global_step"]: h["train/loss"] for h in history if "train/loss" in h}
    assert len(expected) == 3
    assert curve == pytest.approx(expected, rel=1e-6)

    metrics = json.loads((folder / "summary.json").read_text())["metrics"]
    assert set(metrics) == {"zero_shot", "after_init", "final"}
    for moment, scores in metrics.items():
        for name, value in scores.items():
            assert summary[f"{moment}/{name}"] == pytest.approx(value)

    saved = yaml.safe_load((folder / "config.yaml").read_text())
    assert config["model"]["adapter"]["r"] == saved["model"]["adapter"]["r"] == 4
    assert config["init"]["init_args"]["num_samples"] == 16
    assert config["seed_everything"] == 0

    [table] = file.parent.glob("files/media/table/init/spectrum*.table.json")
    content = json.loads(table.read_text())
    assert content["columns"] == ["layer", "index", "singular_value", "captured_energy"]
    layers = json.loads((folder / "summary.json").read_text())["init"]["layers"]
    assert content["data"] == [
        [name, i + 1, pytest.approx(value), pytest.approx(layer["captured_energy"])]
        for name, layer in layers.items()
        for i, value in enumerate(layer["singular_values"])
    ]
    assert len(content["data"]) >= 14 * 4
    pictures = {
        path.name.partition("_")[0] for path in file.parent.glob("files/media/images/plots/*")
    }
    assert pictures >= {"loss", "validation", "spectrum", "captured"}


def mode_of(settings):
    table, logger = make_loggers(settings)
    assert isinstance(table, CSVLogger)
    assert isinstance(logger, WandbLogger)
    assert logger._offline is (logger._wandb_init["mode"] == "offline")
    return logger._wandb_init["mode"]


def test_a_key_means_online(no_key, monkeypatch, tmp_path):
    settings = {"name": "x", "root": str(tmp_path)}
    assert mode_of(OutputSettings(**settings)) == "offline"
    monkeypatch.setenv("WANDB_API_KEY", "0123456789" * 4)
    wandb.teardown()
    assert mode_of(OutputSettings(**settings)) == "online"
    assert mode_of(OutputSettings(**settings, wandb="offline")) == "offline"


def test_the_setting_beats_the_key(no_key, tmp_path):
    settings = {"name": "x", "root": str(tmp_path)}
    assert mode_of(OutputSettings(**settings, wandb="online")) == "online"
    [only] = make_loggers(OutputSettings(**settings, wandb="disabled"))
    assert isinstance(only, CSVLogger)
    assert only.log_dir == str(tmp_path / "x" / "version_1")
