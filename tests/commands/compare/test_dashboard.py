"""What the W&B workspace asks W&B for; that every panel finds its data is tested on a real run."""

import json

import pytest
import wandb

BARS, LINES, SCATTER = "Bar Chart", "Run History Line Plot", "Scatter Plot"


@pytest.fixture
def dashboard(command, tmp_path):
    """Return `dashboard(*options)`, which returns what W&B would be sent."""

    def run(*options):
        file = tmp_path / "dashboard.json"
        assert command("dashboard", "--entity", "me", *options, "--output", file) == 0
        return json.loads(file.read_text())

    return run


def panels(found, *kinds):
    sections = found["spec"]["section"]["panelBankConfig"]["sections"]
    told = [panel for section in sections for panel in section["panels"]]
    return [panel["config"] for panel in told if not kinds or panel["viewType"] in kinds]


def runs(found):
    [shown] = found["spec"]["section"]["runSets"]
    return shown


def test_the_sections_and_the_reported_score_first(dashboard):
    found = dashboard("--score", "gsm8k/strict", "--project", "p", "--name", "n")
    assert (found["entity"], found["project"], found["displayName"]) == ("me", "p", "n")
    sections = found["spec"]["section"]["panelBankConfig"]["sections"]
    assert [s["name"] for s in sections if s["panels"]] == [
        *("Scores", "Training", "Initialization", "Alignment metrics", "Cost")
    ]
    first, second = panels(found, BARS)[:2]
    assert first["metrics"] == ["summary_metrics.test/gsm8k/strict"]
    assert second["metrics"] == ["summary_metrics.final/gsm8k/strict"]
    memory = [p for p in panels(found, BARS) if "train/peak_bytes" in p["metrics"][0]]
    assert len(memory) == 1


def test_bars_and_lines_are_means_over_the_seeds_of_a_cell(dashboard):
    shown = panels(dashboard(), BARS, LINES)
    assert len(shown) == 21
    for panel in shown:
        told = (panel["groupBy"], panel["groupAgg"], panel["groupArea"], panel["aggregate"])
        assert told == ("cell.value", "mean", "stddev", True), panel["chartTitle"]


def test_the_scatter_has_a_point_a_run(dashboard):
    [scatter] = panels(dashboard("--score=mcc"), SCATTER)
    assert scatter["xAxis"] == "config:model.value.optimizer.init_args.lr"
    assert scatter["yAxis"] == "summary:final/mcc"
    assert scatter["xAxisLogScale"]


def test_the_table_goes_from_the_task_to_the_learning_rate(dashboard):
    assert [(key["section"], key["name"]) for key in runs(dashboard())["grouping"]] == [
        ("run", "group"),
        ("config", "model.value.method"),
        ("config", "model.value.optimizer.init_args.lr"),
    ]


@pytest.mark.parametrize(
    ("score", "ascending"),
    [("accuracy", False), ("gsm8k/strict", False), ("loss", True), ("rows/loss", True)],
)
def test_the_best_run_is_on_top(score, ascending, dashboard):
    [key] = runs(dashboard("--score", score))["sort"]["keys"]
    assert key["key"] == {"section": "summary", "name": f"final/{score}"}
    assert key["ascending"] is ascending


@pytest.mark.parametrize("score", ["accuracy", "loss"])
def test_no_panel_is_there_twice(score, dashboard):
    found = panels(dashboard("--score", score))
    data = [
        json.dumps({key: p.get(key) for key in ("metrics", "xAxis", "yAxis", "mediaKeys")})
        for p in found
    ]
    titles = [p["chartTitle"] for p in found]
    assert len(set(data)) == len(data)
    assert len(set(titles)) == len(titles)
    drawn = [name for p in found for name in p.get("metrics") or []]
    assert {"summary_metrics.final/loss", "val/loss"} <= set(drawn)


def test_one_task(dashboard, command, capfd):
    assert runs(dashboard())["filters"]["filters"] == []
    group, task = runs(dashboard("--task", "glue/sst2"))["filters"]["filters"]
    assert group["key"] == {"section": "run", "name": "group"}
    assert task["key"] == {"section": "summary", "name": "task"}
    assert {(f["op"], f["value"], f["disabled"]) for f in (group, task)} == {
        ("=", "glue/sst2", False)
    }
    assert task["connector"] == "OR"
    for name in ("it's", "a=b", "a<b", "a\\b", ""):
        assert command("dashboard", "--entity", "me", "--task", name) == 2
        assert "expected the name of a task or of a W&B group" in capfd.readouterr().err


def test_errors_are_one_line(command, tmp_path, capfd, monkeypatch):
    def save(made):
        raise wandb.errors.UsageError("no API key")

    monkeypatch.setattr("wandb_workspaces.workspaces.Workspace.save", save)
    assert command("dashboard", "--entity", "me") == 2
    assert (
        "could not be saved to W&B project me/lora-one (no API key): log in"
        in capfd.readouterr().err
    )
    assert command("dashboard") == 2
    assert "the following arguments are required: --entity" in capfd.readouterr().err
    for output in (tmp_path / "nowhere" / "x.json", tmp_path, ""):
        assert command("dashboard", "--entity", "me", "--output", output) == 2
        told = capfd.readouterr().err
        assert told.startswith(f"error: --output is {str(output) or '.'!r}")
        assert told.count("\n") == 1
