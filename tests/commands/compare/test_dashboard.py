"""What the W&B workspace asks W&B for; that every panel finds its data is tested on a real run."""

import json

import pytest
import wandb

from app.commands.compare.dashboard import dashboard_command

BARS, LINES, SCATTER = "Bar Chart", "Run History Line Plot", "Scatter Plot"


@pytest.fixture
def dashboard(tmp_path):
    """Return `dashboard(*options)`, which returns what W&B would be sent."""

    def run(*options):
        file = tmp_path / "dashboard.json"
        assert dashboard_command(["--entity", "me", *options, "--output", str(file)]) == 0
        return json.loads(file.read_text())

    return run


def sections(content):
    return content["spec"]["section"]["panelBankConfig"]["sections"]


def panels(content, *kinds):
    shown = [panel for section in sections(content) for panel in section["panels"]]
    return [panel["config"] for panel in shown if not kinds or panel["viewType"] in kinds]


def runs(content):
    [shown] = content["spec"]["section"]["runSets"]
    return shown


def test_the_sections_and_the_reported_score_first(dashboard):
    content = dashboard("--score", "gsm8k/strict", "--project", "p", "--name", "n")
    assert [content[key] for key in ("entity", "project", "displayName")] == ["me", "p", "n"]
    assert [section["name"] for section in sections(content) if section["panels"]] == [
        *("Scores", "Training", "Initialization", "Alignment metrics", "Cost")
    ]
    first, second = panels(content, BARS)[:2]
    assert first["metrics"] == ["summary_metrics.test/gsm8k/strict"]
    assert second["metrics"] == ["summary_metrics.final/gsm8k/strict"]
    [scatter] = panels(content, SCATTER)
    assert scatter["xAxis"] == "config:model.value.optimizer.init_args.lr"
    assert scatter["yAxis"] == "summary:final/gsm8k/strict"
    assert scatter["xAxisLogScale"]
    memory = [p for p in panels(content, BARS) if "train/peak_bytes" in p["metrics"][0]]
    assert len(memory) == 1


def test_bars_and_lines_are_means_over_the_seeds_of_a_cell(dashboard):
    shown = panels(dashboard(), BARS, LINES)
    assert len(shown) == 21
    for panel in shown:
        grouped = [panel[key] for key in ("groupBy", "groupAgg", "groupArea", "aggregate")]
        assert grouped == ["cell.value", "mean", "stddev", True], panel["chartTitle"]


@pytest.mark.parametrize(
    ("score", "ascending"),
    [("accuracy", False), ("gsm8k/strict", False), ("loss", True), ("rows/loss", True)],
)
def test_the_table_groups_runs_with_the_best_on_top(score, ascending, dashboard):
    shown = runs(dashboard("--score", score))
    assert [(key["section"], key["name"]) for key in shown["grouping"]] == [
        ("run", "group"),
        ("config", "model.value.method"),
        ("config", "model.value.adapter.r"),
        ("config", "model.value.optimizer.init_args.lr"),
    ]
    [key] = shown["sort"]["keys"]
    assert key["key"] == {"section": "summary", "name": f"final/{score}"}
    assert key["ascending"] is ascending


@pytest.mark.parametrize("score", ["accuracy", "loss"])
def test_no_panel_is_there_twice(score, dashboard):
    shown = panels(dashboard("--score", score))
    keys = ("metrics", "xAxis", "yAxis", "mediaKeys")
    data = {json.dumps([panel.get(key) for key in keys]) for panel in shown}
    assert len(data) == len({panel["chartTitle"] for panel in shown}) == len(shown)
    drawn = {name for panel in shown for name in panel.get("metrics") or []}
    assert {"summary_metrics.final/loss", "val/loss"} <= drawn


def test_one_task(dashboard, error_of):
    assert runs(dashboard())["filters"]["filters"] == []
    group, task = runs(dashboard("--task", "glue/sst2"))["filters"]["filters"]
    assert group["key"] == {"section": "run", "name": "group"}
    assert task["key"] == {"section": "summary", "name": "task"}
    for part in (group, task):
        assert (part["op"], part["value"], part["disabled"]) == ("=", "glue/sst2", False)
    assert task["connector"] == "OR"
    for name in ("it's", "a=b", "a<b", "a\\b", ""):
        told = error_of("dashboard", "--entity", "me", "--task", name)
        assert "expected the name of a task or of a W&B group" in told


def test_errors_are_one_line(error_of, tmp_path, monkeypatch):
    def save(made):
        raise wandb.errors.UsageError("no API key")

    monkeypatch.setattr("wandb_workspaces.workspaces.Workspace.save", save)
    missing = "the following arguments are required: --entity"
    for options, message in (
        (["--entity=me"], "be saved to W&B project me/lora-one (no API key): log in"),
        ([], missing),
        *(
            (["--entity=me", "--output", output], f"--output is {str(output) or '.'!r}")
            for output in (tmp_path / "nowhere" / "x.json", tmp_path, "")
        ),
    ):
        error = error_of("dashboard", *options)
        assert message in error
        assert "\n" not in error
