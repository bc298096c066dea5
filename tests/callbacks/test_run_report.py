"""What a finished run leaves: pictures, record, adapter, printed table."""

import json

import matplotlib.image
import pytest

from app.tracking import plots
from app.tracking.metrics_table import read_metrics
from app.tracking.record import InitRecord, RunRecord


def picture(path):
    """Return the picture as an array, having checked that something is drawn in it."""
    pixels = matplotlib.image.imread(path)
    assert pixels.shape[0] > 200
    assert pixels.shape[1] > 600
    assert pixels[..., :3].std() > 0.02
    return pixels


def test_the_folder_of_a_run(monkeypatch, command, tiny_run, tmp_path, caplog):
    monkeypatch.setattr("callbacks.run_report.write_plots", plots.write_plots)
    with caplog.at_level("INFO", logger="lightning.pytorch.utilities.rank_zero"):
        assert command("fit", "--config", tiny_run, "--trainer.val_check_interval=2") == 0
    folder = tmp_path / "runs" / "tiny" / "version_0"
    names = {path.name for path in folder.iterdir()}
    assert names >= {
        *("config.yaml", "metrics.csv", "summary.json", "adapter", "checkpoints"),
        *("loss.png", "validation.png", "spectrum.png", "captured_energy.png"),
    }
    assert not [name for name in names if name.endswith(".part")]
    for name in ("loss", "validation", "spectrum", "captured_energy"):
        picture(folder / f"{name}.png")
    files = {path.name for path in (folder / "adapter").iterdir()}
    assert files >= {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json"}
    metrics = json.loads((folder / "summary.json").read_text())["metrics"]
    printed = caplog.text
    for moment, scores in metrics.items():
        cells = (scores[name] for name in ("accuracy", "f1", "mcc", "loss"))
        row = "".join(f"{value:12.4f}" for value in cells)
        assert f"{moment:>12}{row}" in printed
    assert f"run folder: {folder}" in printed
    curves = read_metrics(folder / "metrics.csv")
    assert [step for step, _ in curves["train/loss"]] == [0, 1, 2]
    assert curves["final/loss"] == [(3, metrics["final"]["loss"])]
    assert curves["zero_shot/accuracy"] == [(0, metrics["zero_shot"]["accuracy"])]


def test_a_run_without_gradient_pass_has_no_spectrum(tmp_path):
    metrics = {"zero_shot": {"accuracy": 0.5}, "final": {"accuracy": 1.0}}
    written = plots.write_plots(tmp_path, {"train/loss": [(0, 1.0), (1, 0.5)]}, metrics, {})
    assert [path.name for path in written] == ["loss.png", "validation.png"]
    assert plots.write_plots(tmp_path, {}, {}, {}) == []


def test_scores_of_any_name_get_a_panel(tmp_path, monkeypatch):
    """A run on free answers has no accuracy, but a loss and what its benchmarks score."""
    drawn = []
    original = plots._score
    monkeypatch.setattr(
        plots, "_score", lambda axes, name, *rest: (drawn.append(name), original(axes, name, *rest))
    )
    scores = {"gsm8k/strict": 0.1, "gsm8k/flexible": 0.2, "mmlu/anatomy/accuracy": 0.3, "loss": 1.0}
    metrics = {"zero_shot": scores, "final": scores}
    [written] = plots.write_plots(tmp_path, {"val/loss": [(3, 1.1)]}, metrics, {})
    assert drawn == ["loss", "gsm8k/strict", "gsm8k/flexible"]
    assert written.stat().st_size > 0


def test_layers_of_different_width_and_without_gradient(tmp_path):
    layers = {
        "a.q_proj": {"singular_values": [2.0, 1.0, 0.5], "captured_energy": 0.9},
        "b.q_proj": {"singular_values": [4.0, 1.0], "captured_energy": 0.8},
        "b.v_proj": {"singular_values": [0.0, 0.0], "captured_energy": 0.0},
    }
    written = plots.write_plots(tmp_path, {}, {}, layers)
    assert [path.name for path in written] == ["spectrum.png", "captured_energy.png"]
    for path in written:
        picture(path)


def test_many_layers_and_long_curves(tmp_path):
    layers = {
        f"layers.{i}.{kind}_proj": {"singular_values": [1.0, 0.1], "captured_energy": i / 80}
        for i in range(80)
        for kind in ("q", "k", "v", "o", "gate", "up", "down")
    }
    curve = [(step, 1 / (1 + step)) for step in range(2000)]
    metrics = {"final": {"accuracy": 0.9}}
    for path in plots.write_plots(tmp_path, {"train/loss": curve}, metrics, layers):
        pixels = picture(path)
        assert pixels.shape[1] < 4000


def test_record_is_written_whole_or_not_at_all(tmp_path):
    record = RunRecord(method="m", metrics={"final": {"accuracy": 0.5, "loss": 1.0}})
    record.write(tmp_path / "summary.json")
    record.init = InitRecord(broken=object())
    with pytest.raises(TypeError):
        record.write(tmp_path / "summary.json")
    assert json.loads((tmp_path / "summary.json").read_text())["metrics"] == record.metrics
    assert record.score_table().splitlines() == [
        "                accuracy        loss",
        "       final      0.5000      1.0000",
    ]
