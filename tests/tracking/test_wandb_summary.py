"""Weights & Biases: offline without a key and without a question; the file holds the whole run."""

import json
from types import SimpleNamespace

import pytest
import wandb
import yaml

from app.commands.compare.dashboard import workspace
from app.tracking import alignment_plots, plots
from app.tracking.loggers import OutputSettings
from app.tracking.record import InitRecord, RunRecord
from app.tracking.run_folder import RunFolder
from app.tracking.wandb_summary import cell_of, log_run_summary, log_test_scores
from app.utils.files import write_json
from callbacks.alignment_monitor import _alignment
from tests.support.run_folders import losses, summary, table
from tests.support.wandb_file import read


@pytest.mark.slow
def test_an_offline_run_holds_everything(no_key, command, tiny_run, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr("callbacks.run_report.write_plots", plots.write_plots)
    drawn = alignment_plots.write_heat_maps
    monkeypatch.setattr("callbacks.alignment_monitor.write_heat_maps", drawn)
    options = ("--output.wandb=auto", "--output.wandb_group=g", "--output.wandb_tags=[one, two]")
    options += ("--config", "callbacks/alignment.yaml", "--trainer.callbacks.every_n_steps=1")
    options += ("--trainer.val_check_interval=1",)
    assert command("fit", "--config", tiny_run, *options) == 0
    folder = tmp_path / "runs" / "tiny" / "version_0"
    curves = (folder / "metrics.csv").read_text()
    assert command("test", "--run", folder) == 0
    wandb.teardown()  # as at the program's end; until then W&B's own process may still write
    shown = "".join(capfd.readouterr())
    assert "wandb: WARNING" not in shown
    assert "did not reach" not in shown
    assert (folder / "metrics.csv").read_text() == curves
    file, later = sorted(folder.glob("wandb/offline-run-*/*.wandb"))
    fitted, tested = read(file), read(later)
    run, history, config = fitted.run, fitted.history, fitted.config

    assert run.display_name == "tiny/version_0"
    assert (run.project, run.run_group) == ("lora-one", "g")
    assert list(run.tags) == ["one", "two", "lora_one", "seed 0"]

    expected = losses(folder)
    curve = {h["trainer/global_step"]: h["train/loss"] for h in history if "train/loss" in h}
    assert len(expected) == 3
    assert curve == pytest.approx(expected, rel=1e-6)

    metrics = summary(folder)["metrics"]
    check_test(fitted, tested, metrics.pop("test"))
    assert set(metrics) == {"zero_shot", "after_init", "final"}
    for moment, scores in metrics.items():
        for name, value in scores.items():
            assert fitted.summary[f"{moment}/{name}"] == pytest.approx(value)

    saved = yaml.safe_load((folder / "config.yaml").read_text())
    assert config["model"]["adapter"]["r"] == saved["model"]["adapter"]["r"] == 4
    assert config["init"]["init_args"]["num_samples"] == 16
    assert config["seed_everything"] == 0
    assert config["cell"] == "g: lora_one, r 4, lr 1e-2"

    [spectrum] = file.parent.glob("files/media/table/init/spectrum*.table.json")
    content = json.loads(spectrum.read_text())
    assert content["columns"] == ["layer", "index", "singular_value", "captured_energy"]
    layers = summary(folder)["init"]["layers"]
    assert content["data"] == [
        [name, i + 1, pytest.approx(value), pytest.approx(layer["captured_energy"])]
        for name, layer in layers.items()
        for i, value in enumerate(layer["singular_values"])
    ]
    assert len(content["data"]) >= 14 * 4
    pictures = {
        path.name.partition("_")[0] for path in file.parent.glob("files/media/images/plots/*")
    }
    assert pictures >= {"loss", "validation", "spectrum", "captured", "alignment"}

    [adapter] = [artifact for artifact in fitted.artifacts if artifact.type == "adapter"]
    about = json.loads(adapter.metadata)
    model = summary(folder)["model"]
    assert about["base"] == {name: model[name] for name in ("name", "fingerprint")}
    assert (about["method"], about["seed"], about["scores"]) == ("lora_one", 0, metrics)
    content = {entry.path for entry in adapter.manifest.contents}
    if not content:  # a long manifest stands in a file beside
        content = set(adapter.manifest.manifest_file_path)
    assert content

    rows = table(folder, "alignment.csv")
    steps = sorted({int(row["step"]) for row in rows})
    shown = [h for h in history if "alignment_layers/norm/bins" in h]
    assert [h["trainer/global_step"] for h in shown] == steps == [0, 1, 2, 3]
    for h, step in zip(shown, steps, strict=True):
        of_step = [float(row["norm"]) for row in rows if int(row["step"]) == step]
        assert sum(h["alignment_layers/norm/values"]) == len(of_step)
        bins = h["alignment_layers/norm/bins"]
        assert (bins[0], bins[-1]) == pytest.approx((min(of_step), max(of_step)))
    check_charts(file.parent, rows)
    check_dashboard(history, {**fitted.summary, **tested.summary}, config)


def check_test(fitted, tested, scores):
    """A test goes on in the W&B run of the training, and changes its summary alone."""
    for name in ("run_id", "project", "run_group", "display_name", "tags"):
        assert getattr(tested.run, name) == getattr(fitted.run, name), name
    assert tested.history == []
    assert tested.artifacts == []
    added = {name for name in tested.summary if name not in fitted.summary}
    assert added == {f"test/{name}" for name in scores} >= {"test/accuracy", "test/loss"}
    for name, value in scores.items():
        assert tested.summary[f"test/{name}"] == pytest.approx(value)
    for name, value in tested.summary.items():
        # W&B keeps its own count of the seconds
        assert name in added or name.startswith("_") or fitted.summary[name] == value, name
    configs = [
        {name: value for name, value in part.config.items() if not name.startswith("_wandb")}
        for part in (fitted, tested)
    ]
    assert configs[0] == configs[1]


def check_charts(wandb_folder, rows):
    """The custom charts are tables beside the run's file."""
    [chart] = wandb_folder.glob("files/media/table/alignment/angles*.table.json")
    content = json.loads(chart.read_text())
    found = {(step, key): value for step, key, value in content["data"]}
    for side, key in (("A", "lora_A, input side"), ("B", "lora_B, output side")):
        for step in (0, 3):
            angles = [float(row[f"angle_{side}"]) for row in rows if int(row["step"]) == step]
            assert found[step, key] == pytest.approx(sorted(angles)[(len(angles) - 1) // 2])
    [chart] = wandb_folder.glob("files/media/table/init/spectra*.table.json")
    content = json.loads(chart.read_text())
    assert {row[1] for row in content["data"]} == {row["layer"].rpartition(".")[2] for row in rows}
    assert all(value == 1 for i, _, value in content["data"] if i == 1)


def check_dashboard(history, summary, config):
    """Every panel of the workspace finds its data in this one run."""
    logged = {name for row in history for name in row}
    made = workspace("me", "lora-one", "LoRA-One", "accuracy")
    panels = [panel for section in made.sections for panel in section.panels]
    assert len(panels) == 24
    wanted = {"line": set(), "summary": set(), "config": set(), "media": set()}
    for panel in panels:
        wanted["line"] |= set(panel.y) if type(panel).__name__ == "LinePlot" else set()
        shown = [*getattr(panel, "metrics", []), getattr(panel, "y", None)]
        wanted["summary"] |= {m.name for m in shown if type(m).__name__ == "SummaryMetric"}
        wanted["media"] |= set(getattr(panel, "media_keys", []))
        for axis in (getattr(panel, "x", None), getattr(panel, "groupby", None)):
            if hasattr(axis, "name"):
                wanted["config"].add(axis.name)
    lines = {name for name in wanted["line"] if isinstance(name, str)}
    assert lines <= logged, lines - logged
    assert wanted["summary"] <= set(summary), wanted["summary"] - set(summary)
    media = {name.removesuffix("/_type") for name in logged if name.endswith("/_type")}
    assert wanted["media"] <= media, wanted["media"] - media
    for name in wanted["config"]:
        value = config
        for part in name.split("."):
            value = value[part]
    pinned = made.runset_settings.pinned_columns
    names = {c.removeprefix("summary:") for c in pinned if c.startswith("summary:")}
    assert len(names) == 6
    assert names <= set(summary)
    assert lines
    assert wanted["summary"]
    assert wanted["media"]


def charts_of(layers):
    """Return the names of the charts and tables that a run with these layers logs."""
    names = []
    experiment = SimpleNamespace(summary={}, log=names.extend)
    logger = SimpleNamespace(experiment=experiment, log_table=lambda key, **_: names.append(key))
    log_run_summary(logger, RunRecord(init=InitRecord(layers=layers)), plots=[], adapter=None)
    return names


def test_a_gradient_of_zero_has_no_chart():
    layer, zero = ({"singular_values": s, "captured_energy": 0.0} for s in ([2.0, 1.0], [0.0, 0.0]))
    assert charts_of({"a.q": zero, "a.v": zero}) == ["init/spectrum"]
    assert charts_of({"a.q": layer, "a.v": zero}) == ["init/spectrum", "init/spectra"]


def test_angles_that_are_no_numbers_are_left_out_of_the_chart(tmp_path):
    rows = [(0, "80", "nan"), (0, "70", "nan"), (2, "60", "nan"), (2, "50", "40")]
    table = "step,angle_A,angle_B\n" + "".join(f"{s},{a},{b}\n" for s, a, b in rows)
    (tmp_path / "alignment.csv").write_text(table)
    chart = _alignment(tmp_path / "alignment.csv")
    sides = ("lora_A, input side", "lora_B, output side")
    assert chart.table.data == [[0, sides[0], 70], [2, sides[0], 50], [2, sides[1], 40]]


def cell(rate=2e-4, group=None, task="glue/sst2", adapter=None):
    optimizer = {"init_args": {} if rate is None else {"lr": rate}}
    model = {"method": "lora", "optimizer": optimizer, "adapter": adapter}
    settings = {"seed_everything": 3, "model": model, "output": {"wandb_group": group}}
    return cell_of(settings, task)


def test_a_cell_is_all_but_the_seed():
    assert cell() == "glue/sst2: lora, lr 2e-4"
    assert cell(rate=3.5e-4) == "glue/sst2: lora, lr 3.5e-4"
    assert cell(rate=None) == "glue/sst2: lora"
    assert cell(adapter={"r": 8}) == "glue/sst2: lora, r 8, lr 2e-4"
    assert cell(group="rank 64") == "rank 64: lora, lr 2e-4"
    assert cell(task=None) == "lora, lr 2e-4"


def test_a_test_is_logged_where_the_training_was_and_never_fails_by_it(
    no_key, monkeypatch, tmp_path, recwarn
):
    asked = []

    def init(**options):
        asked.append((options["id"], options["mode"]))
        raise wandb.errors.CommError("no network")

    monkeypatch.setattr(wandb, "init", init)
    write_json(tmp_path / "summary.json", {"metrics": {"test": {"accuracy": 0.5}}})
    log_test_scores(
        RunFolder(tmp_path), OutputSettings(wandb="online"), {}
    )  # its training was not logged
    write_json(tmp_path / "wandb.json", {"id": "abc"})
    log_test_scores(RunFolder(tmp_path), OutputSettings(wandb="disabled"), {})
    assert not asked
    assert not recwarn.list
    for mode, why in (("online", "no API key"), ("offline", "no network"), ("auto", "no network")):
        with pytest.warns(UserWarning, match=rf"did not reach the W&B run of .* \(.*{why}.*\)"):
            log_test_scores(RunFolder(tmp_path), OutputSettings(wandb=mode), {})
    assert asked == [("abc", "offline"), ("abc", "offline")]
