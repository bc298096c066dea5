"""The numbers of the tables, against numpy."""

import io
import json
from csv import DictReader

import numpy as np
import pytest

from app.commands.compare.cells import state_of
from app.commands.compare.collect import collect
from app.commands.compare.selection import by_rank, comparisons
from app.commands.compare.tables import (
    before_training_table,
    rank_table,
    rate_table,
    runs_csv,
    seed_table,
)
from tests.support.report_runs import RATES, SCORES, fail, grid_run, main_rows, manifest, write_run


@pytest.fixture
def comparison(runs):
    return comparisons(collect([runs]))[0]


def rows_of(table):
    return table.frame.T.to_dict()


def test_the_main_table(runs):
    rows, notes = main_rows(runs)
    assert list(rows) == ["lora_one", "lora"]  # by test score
    for method, rate in (("lora_one", 1e-3), ("lora", 1e-2)):
        row, values = rows[method], 100 * np.array(SCORES[method][rate])
        mean, std = values.mean(axis=0), values.std(axis=0, ddof=1)
        assert row["validation accuracy, %"] == f"{mean[0]:.2f} ± {std[0]:.2f}"
        assert row["test accuracy, %"] == f"{mean[1]:.2f} ± {std[1]:.2f}"
        assert row["seeds"] == "3"
        assert row["trained parameters"] == "1,234"
        assert row["step, ms"] == f"{1000 * np.mean([0.5, 0.6, 0.7]):.0f}"
        assert row["training, s"] == f"{np.mean([2.0, 2.4, 2.8]):.0f}"
    ours, lora = rows.values()
    assert (ours["learning rate"], lora["learning rate"]) == ("1e-3", "1e-2 †")
    assert (ours["initialization, s"], lora["initialization, s"]) == ("3.0", "0.0")
    assert (ours["peak memory, GiB"], lora["peak memory, GiB"]) == ("5.00", "3.00")
    edge = "† At the edge of the rates tried, so that a better one may lie beyond: "
    assert f"{edge}lora (the highest rate tried)." in notes
    # A loss is no percentage.
    values = [1 - test for _, test in SCORES["lora_one"][1e-3]]
    row = main_rows(runs, score="loss")[0]["lora_one"]
    assert row["test loss"] == f"{np.mean(values):.4f} ± {np.std(values, ddof=1):.4f}"


def test_without_a_test_the_validation_loss_is_compared(tmp_path, report):
    """Rows of free answers, and no benchmark: finished once they are trained."""
    losses = {
        "lora": {1e-4: (0.9, 0.8), 1e-3: (0.7, 0.5)},
        "lora_one": {1e-4: (0.3, 0.5), 1e-3: (0.6, 0.6)},
    }
    folder = tmp_path / "compare"
    for method, by_rate in losses.items():
        for rate, values in by_rate.items():
            for seed, loss in enumerate(values):
                run = grid_run(folder, method, rate, seed, 1 - loss, None)
                metrics = {m: {"loss": v} for m, v in (("zero_shot", 2.0), ("final", loss))}
                summary = json.loads((run / "summary.json").read_text()) | {"metrics": metrics}
                summary["data"]["rows"]["test"] = 0
                (run / "summary.json").write_text(json.dumps(summary))
                assert state_of(run.parent).state == "finished"
                assert state_of(run.parent, ["gsm8k"]).state == "trained"
    rows, notes = main_rows(folder)
    std = np.std([0.3, 0.5], ddof=1)
    assert list(rows) == ["lora_one", "lora"]
    assert rows["lora_one"]["validation loss"] == f"0.4000 ± {std:.4f}"
    assert rows["lora"]["learning rate"] == "1e-3 †"
    assert not [name for name in rows["lora"] if "test" in name]
    assert any("**There is no test**" in note for note in notes)
    [compared] = comparisons(collect([folder]))
    seeds = seed_table(compared)
    assert rows_of(seeds)["lora_one"] == {"seed 0": "0.3000", "seed 1": "0.5000"}
    assert "Validation loss" in seeds.notes[0]
    assert "validation loss" in report(folder)
    assert "not tested" not in (tmp_path / "out" / "report.html").read_text()


def test_the_whole_curve(runs, comparison):
    for i, reported in enumerate((False, True)):
        rows = rows_of(rate_table(comparison, reported))
        for method, chosen in (("lora_one", 1e-3), ("lora", 1e-2)):
            for rate, text in zip(RATES, rows[method].values(), strict=True):
                values = 100 * np.array(SCORES[method][rate])[:, i]
                cell = f"{values.mean():.2f} ± {values.std(ddof=1):.2f}"
                assert text == (f"**{cell}**" if rate == chosen else cell)
    for seed, diverged in ((3, True), (4, False), (5, True)):
        fail(runs, "lora_one", 1e-3, seed, diverged=diverged)
    manifest(runs, [["lora_one", 1e-3, seed] for seed in (3, 4, 5, 6)])
    rows = rows_of(rate_table(comparisons(collect([runs]))[0], reported=False))
    assert rows["lora_one"]["1e-3"] == "91.00 ± 1.00, 2 diverged, 1 failed, 1 missing"


def test_ranks_side_by_side(ranks):
    table = rank_table(by_rank(comparisons(collect([ranks]))[0]))
    full = f"55.00 ± {100 * np.std([0.5, 0.6], ddof=1):.2f} at 1e-4 ‡"
    assert rows_of(table) == {
        "lora": {"rank 8": "56.00 at 1e-4 †", "rank 64": "65.50 at 1e-3 †"},
        "lora_one": {"rank 8": "66.00 at 1e-4 †", "rank 64": "75.50 at 1e-3 †"},
        "full": {"rank 8": full, "rank 64": full},
    }
    assert table.notes[0].startswith("Test accuracy, in %")


def test_before_training_and_seed_by_seed(comparison, tmp_path):
    before = {
        method: list(row.values())
        for method, row in rows_of(before_training_table(comparison)).items()
    }
    assert before == {
        "lora_one": ["50.00 ± 0.00", "55.00 ± 0.00", "91.00 ± 1.00"],
        "lora": ["50.00 ± 0.00", "55.00 ± 0.00", "81.00 ± 1.00"],
    }
    assert rows_of(seed_table(comparison)) == {
        "lora_one": {"seed 0": "84.00", "seed 1": "86.00", "seed 2": "89.00"},
        "lora": {"seed 0": "81.00", "seed 1": "79.00", "seed 2": "83.00"},
    }
    write_run(tmp_path / "one")
    assert seed_table(comparisons(collect([tmp_path / "one"]))[0]) is None


def test_a_row_for_each_run(runs):
    fail(runs, "pissa", 1e-3, 0)
    manifest(runs, [["pissa", 1e-3, 0]])
    found = collect([runs])
    *rows, failed = DictReader(io.StringIO(runs_csv(comparisons(found), found)))
    assert len(rows) == 18
    for row in rows:
        rate, seed = float(row["learning_rate"]), int(row["seed"])
        validation, test = SCORES[row["method"]][rate][seed]
        assert (row["task"], row["state"], row["device"]) == ("1", "finished", "cpu")
        assert float(row["selection_score"]) == validation
        assert float(row["reported_score"]) == test
        assert (float(row["untouched_score"]), float(row["start_score"])) == (0.5, 0.55)
        assert float(row["train_seconds"]) == pytest.approx(4 * (0.5 + 0.1 * seed))
        assert float(row["step_seconds"]) == pytest.approx(0.5 + 0.1 * seed)
        assert float(row["init_seconds"]) == (2 + seed if row["method"] == "lora_one" else 0)
        assert int(row["trainable_parameters"]) == 1234
        assert int(row["peak_bytes"]) == (5 if row["method"] == "lora_one" else 3) * 2**30
    known = {"method": "pissa", "learning_rate": "0.001", "seed": "0", "state": "failed"}
    known |= {"reason": "no memory", "folder": str(runs / "cells" / "pissa-lr1e-3-seed0")}
    assert failed == {**dict.fromkeys(failed, ""), **known}
