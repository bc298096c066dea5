"""Folders of runs with made numbers, for tests of the report."""

import csv
import json

import numpy as np
import pandas as pd
import pytest
import yaml

from app.commands.compare import command
from app.commands.compare.cells import Cell
from app.commands.compare.collect import collect
from app.commands.compare.selection import comparisons
from app.commands.compare.tables import main_table

RATES = (1e-4, 1e-3, 1e-2)
# Validation and test accuracy by method, rate and seed. Of lora_one the best rate by test is not the best by
# validation; of lora it is the highest one tried.
SCORES = {
    "lora_one": {
        1e-4: ((0.80, 0.79), (0.82, 0.80), (0.81, 0.80)),
        1e-3: ((0.90, 0.84), (0.92, 0.86), (0.91, 0.89)),
        1e-2: ((0.85, 0.97), (0.84, 0.98), (0.83, 0.99)),
    },
    "lora": {
        1e-4: ((0.70, 0.70), (0.71, 0.70), (0.72, 0.70)),
        1e-3: ((0.75, 0.74), (0.76, 0.75), (0.77, 0.75)),
        1e-2: ((0.80, 0.81), (0.81, 0.79), (0.82, 0.83)),
    },
}


def write_run(folder, method="lora", rate=1e-3, seed=0, validation=0.8, test=0.7, **more):
    """Write the folder of a run as `fit` and `test` leave it, with made numbers."""
    folder.mkdir(parents=True)
    sample = more.get("data", {"validation_size": 100, "max_length": 128, "batch_size": 8})
    config = {
        "seed_everything": seed,
        "trainer": {"max_steps": 4},
        "model": {
            "name": "model",
            "method": method,
            "adapter": {"r": more.get("r", 8)},
            "optimizer": {"class_path": "AdamW", "init_args": {"lr": rate, "eps": 1e-8}},
            "lr_scheduler_type": "linear",
        },
        "data": {"class_path": "data.Data", "init_args": sample},
        "init": {"gamma": 16.0} if method == "lora_one" else None,
        "output": {"name": folder.parent.name},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    step = more.get("step", 0.5)
    rows = [["step", "train/loss", "train/seconds", "val/accuracy"]]
    rows += [[i, 1 / (1 + i + seed), step * (i + 1), ""] for i in range(4)]
    rows += [[1, "", "", 0.6 + 0.01 * seed]]
    with (folder / "metrics.csv").open("w", newline="") as stream:
        csv.writer(stream).writerows(rows)
    metrics = {
        "zero_shot": {"accuracy": 0.5, "loss": 0.7},
        "after_init": {"accuracy": 0.55, "loss": 0.65},
        "final": {"accuracy": validation, "loss": 1 - validation},
    }
    if test is not None:
        metrics["test"] = {"accuracy": test, "loss": 1 - test}
    init = {"seconds": 2.0 + seed, "peak_bytes": [5 * 2**30]} if method == "lora_one" else {}
    summary = {
        "method": method,
        "model": {"name": "base/model", "fingerprint": "f", "trainable_parameters": 1234},
        "data": {"name": "glue/sst2", "rows": {"train": 32, "validation": 100, "test": 20}},
        "seed": seed,
        "metrics": metrics,
        "init": init,
        "train": {"steps": 4, "seconds": 4 * step, "peak_bytes": 3 * 2**30, "device": "cpu"},
    }
    (folder / "summary.json").write_text(json.dumps(summary))


def change(folder, **sections):
    """Change sections of a run's summary."""
    file = folder / "summary.json"
    summary = json.loads(file.read_text())
    for section, values in sections.items():
        summary[section] = {**summary[section], **values}
    file.write_text(json.dumps(summary))


def write_rows(folder, correct, losses=None, moment="test"):
    """Write the scores of rows of two classes; the run reports what they make."""
    correct = np.asarray(correct, dtype=int)
    target = np.arange(len(correct)) % 2
    losses = 1.0 - 0.5 * correct if losses is None else np.asarray(losses, dtype=float)
    rows = {
        "row": range(len(correct)),
        "loss": losses + 1,
        "tokens": np.arange(len(correct)) % 3 + 1,
        "task_loss": losses,
        "target": target,
        "predicted": np.where(correct, target, 1 - target),
        "correct": correct,
    }
    (folder / "row_scores").mkdir(exist_ok=True)
    pd.DataFrame(rows).to_csv(folder / "row_scores" / f"{moment}.csv", index=False)
    scores = {"accuracy": correct.mean(), "task_loss": losses.mean()}
    scores["loss"] = np.average(rows["loss"], weights=rows["tokens"])
    metrics = json.loads((folder / "summary.json").read_text())["metrics"]
    change(folder, metrics={moment: {**metrics.get(moment, {}), **scores}})


def manifest(folder, cells, **more):
    """Write compare.json as `compare` does, for the runs of `write_run`."""
    content = {"task": None, "methods": {}, "benchmarks": {}, "cells": cells, **more}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "compare.json").write_text(json.dumps(content))


def grid_run(folder, method, rate, seed, *scores, **more):
    """Write the run of a cell; return its folder."""
    run = folder / "cells" / Cell(method, rate, seed).name / "version_0"
    write_run(run, method, rate, seed, *scores, **more)
    return run


def fail(folder, method, rate, seed, message="no memory", diverged=False):
    """Write the cell of a run that failed."""
    cell = folder / "cells" / Cell(method, rate, seed).name
    cell.mkdir(parents=True, exist_ok=True)
    (cell / "failure.json").write_text(json.dumps({"message": message, "diverged": diverged}))


def main_rows(*folders, score=None):
    """Return the main tables of the runs in folders, as a row by method's label, and all their notes."""
    tables = [main_table(comparison) for comparison in comparisons(collect(folders), score)]
    rows = {label: row for table in tables for label, row in table.frame.T.to_dict().items()}
    return rows, [note for table in tables for note in table.notes]


@pytest.fixture
def runs(tmp_path):
    """Return a folder with the runs of SCORES."""
    for method, by_rate in SCORES.items():
        for rate, by_seed in by_rate.items():
            for seed, (validation, test) in enumerate(by_seed):
                folder = tmp_path / "runs" / f"{method}-{rate}-{seed}" / "version_0"
                write_run(folder, method, rate, seed, validation, test, step=0.5 + 0.1 * seed)
    return tmp_path / "runs"


@pytest.fixture
def report(tmp_path, capsys):
    """Return `report(*argv)`, which returns what `report` prints, with the report in tmp_path / "out"."""

    def run(*argv):
        capsys.readouterr()
        assert command.report([*map(str, argv), "--output", str(tmp_path / "out")]) == 0
        return capsys.readouterr().out

    return run


@pytest.fixture
def ranks(tmp_path):
    """Return a folder with two methods at two ranks, and full fine-tuning; by test rank 64 is best."""
    for r, gain in ((8, 0.0), (64, 0.1)):
        for method, validation in (("lora", 0.6), ("lora_one", 0.7)):
            for rate, more in ((1e-4, 0.01 if r == 8 else 0.0), (1e-3, 0.005)):
                score = validation + gain + more
                folder = tmp_path / "ranks" / f"{method}-{r}-{rate}"
                write_run(folder, method, rate, 0, score, score - 0.05, r=r)
    for seed in (0, 1):
        write_run(
            tmp_path / "ranks" / f"full-{seed}", "full", 1e-4, seed, 0.75, 0.5 + seed / 10, r=None
        )
    return tmp_path / "ranks"
