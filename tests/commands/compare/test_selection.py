"""`python train.py report`: which run counts, which rate is chosen, and that tables and pictures say so."""

import os

import numpy as np
import pytest

import app.commands.compare.figures
from app.commands.compare.cells import Cell
from tests.support.report_runs import RATES, SCORES, change, grid_run, plan, rows_of, write_run


def test_a_row_for_each_run(report, runs, tmp_path):
    assert report(runs) == 0
    found = rows_of(tmp_path / "out" / "runs.csv")
    assert len(found) == 18
    for row in found:
        rate, seed = float(row["learning_rate"]), int(row["seed"])
        validation, test = SCORES[row["method"]][rate][seed]
        assert row["state"] == "finished"
        assert float(row["selection_score"]) == validation
        assert float(row["reported_score"]) == test
        assert (float(row["untouched_score"]), float(row["start_score"])) == (0.5, 0.55)
        assert float(row["train_seconds"]) == pytest.approx(4 * (0.5 + 0.1 * seed))
        assert float(row["init_seconds"]) == (2 + seed if row["method"] == "lora_one" else 0)


def test_before_training_and_seed_by_seed(report, runs, tmp_path):
    assert report(runs) == 0
    text = (tmp_path / "out" / "report.md").read_text()
    before = text.partition("### Before and after training")[2].partition("###")[0]
    assert "| lora_one | 50.00 ± 0.00 | 55.00 ± 0.00 | 91.00 ± 1.00 |" in before
    assert "| lora | 50.00 ± 0.00 | 55.00 ± 0.00 | 81.00 ± 1.00 |" in before
    seeds = text.partition("### Seed by seed")[2].partition("###")[0]
    assert "| method | seed 0 | seed 1 | seed 2 |" in seeds
    assert "| lora_one | 84.00 | 86.00 | 89.00 |" in seeds
    assert "| lora | 81.00 | 79.00 | 83.00 |" in seeds


def test_the_curves_over_learning_rates(report, runs, monkeypatch):
    drawn = {}
    finish = app.commands.compare.figures._finish

    def watched(name, title, figure, axes):
        lines = axes.get_legend_handles_labels()
        drawn[name] = {
            label: np.asarray(bars.lines[0].get_data())
            for bars, label in zip(*lines, strict=True)
            if hasattr(bars, "lines")
        }
        return finish(name, title, figure, axes)

    monkeypatch.setattr(app.commands.compare.figures, "_finish", watched)
    assert report(runs) == 0
    for i, split in enumerate(("validation", "test")):
        for method, by_rate in SCORES.items():
            x, y = drawn[f"learning_rate_{split}"][method]
            assert tuple(x) == RATES
            means = [100 * np.mean([scores[i] for scores in by_rate[rate]]) for rate in RATES]
            assert y.tolist() == pytest.approx(means)


def test_of_rates_with_equal_scores_the_one_of_less_loss(report, tmp_path):
    """Few rows tie often; a float32 mean of the same hits differs in its last digits."""
    for rate, accuracy, loss in ((1e-4, 0.9, 0.5), (1e-3, 0.9 - 1e-8, 0.3), (1e-2, 0.9, 0.4)):
        folder = tmp_path / "runs" / f"{rate}" / "version_0"
        write_run(folder, rate=rate)
        change(folder, metrics={"final": {"accuracy": accuracy, "loss": loss}})
    assert report(tmp_path / "runs") == 0
    [row] = rows_of(tmp_path / "out" / "table.csv")
    assert row["learning rate"] == "1e-3"


def test_a_lower_loss_is_passed_over_where_a_run_failed(report, tmp_path, capsys):
    grid = tmp_path / "grid"
    for rate, loss in ((1e-4, 0.4), (1e-3, 0.2), (1e-2, 0.6)):
        grid_run(grid, "lora", rate, 0, 1 - loss, 0.5)
    for rate in (1e-3, 1e-2):
        failed = grid / "cells" / Cell("lora", rate, 1).name
        failed.mkdir()
        (failed / "failure.json").write_text('{"message": "no memory"}')
    plan(grid, [["lora", rate, seed] for rate in (1e-4, 1e-3, 1e-2) for seed in (0, 1)])
    assert report(grid, "--score=loss") == 0
    [row] = rows_of(tmp_path / "out" / "table.csv")
    assert row["learning rate"].startswith("1e-4")
    told = "not chosen, since a run failed or diverged there: lora at 1e-3 (0.2000)."
    assert told in capsys.readouterr().out


def test_a_cell_that_was_taken_out_of_the_plan_counts_for_nothing(report, tmp_path, capsys):
    """Neither a run that was finished and best, nor one that had diverged."""
    grid = tmp_path / "grid"
    for rate, validation in ((1e-4, 0.8), (1e-3, 0.95)):
        grid_run(grid, "lora", rate, 0, validation)
    diverged = grid_run(grid, "lora", 1e-2, 0)
    (diverged / "summary.json").unlink()
    (diverged.parent / "failure.json").write_text(
        '{"message": "the loss is nan", "diverged": true}'
    )
    plan(grid, [["lora", 1e-4, 0]])
    assert report(grid) == 0
    printed = capsys.readouterr().out
    [row] = rows_of(tmp_path / "out" / "table.csv")
    assert row["learning rate"] == "1e-4 ‡"
    assert "Preliminary" not in printed
    assert printed.count("withdrawn: compare.json does not name its cell") == 2


def test_of_repeated_runs_the_one_trained_last_counts(report, tmp_path):
    """Also where the older one was tested later, which writes its summary again."""
    for name, ended, test in (("version_0", 100.0, 0.6), ("version_1", 200.0, 0.8)):
        write_run(tmp_path / "runs" / name, test=test)
        change(tmp_path / "runs" / name, train={"began": ended - 9, "ended": ended, "host": "a"})
    os.utime(tmp_path / "runs" / "version_1" / "summary.json", (1e9, 1e9))
    assert report(tmp_path / "runs") == 0
    [row] = rows_of(tmp_path / "out" / "table.csv")
    assert row["test accuracy, %"] == "80.00"


@pytest.mark.parametrize("cell", [["lora", float("inf"), 0], ["lora", 0, 0], ["lora", -1e-3, 0]])
def test_a_damaged_plan_names_no_cell(cell, report, tmp_path):
    grid_run(tmp_path / "grid", "lora", 1e-3, 0)
    plan(tmp_path / "grid", [cell])
    assert report(tmp_path / "grid") == 0
