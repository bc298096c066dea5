"""Which runs are found in folders, which of them count, and why the others do not."""

import json
import os

import pytest
import yaml

from app.commands.compare.cells import Cell
from app.commands.compare.collect import collect
from app.utils.errors import InputError
from tests.support.report_runs import change, fail, grid_run, main_rows, manifest, write_run


def excluded(*folders):
    """Return state and reason of each run that does not count, by its folder's name."""
    runs = [run for run in collect(folders) if run.state != "finished"]
    return {str(run.folder.relative_to(folders[-1])): (run.state, run.reason) for run in runs}


def test_damaged_runs_are_named(tmp_path):
    write_run(tmp_path / "good")
    for name in ("summary", "curves", "settings", "text"):
        write_run(tmp_path / name, rate="fast" if name == "settings" else 1e-2)
    file = tmp_path / "summary" / "summary.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "train": {"steps": "many"}}))
    (tmp_path / "curves" / "metrics.csv").write_text("step,train/loss\n0,much\n")
    (tmp_path / "text" / "config.yaml").write_bytes(b"\xff")
    runs = excluded(tmp_path)
    assert {state for state, _ in runs.values()} == {"unreadable"}
    reasons = {name: reason for name, (_, reason) in runs.items()}
    assert reasons["summary"] == "summary.json is damaged: train.steps is 'many'"
    assert reasons["curves"].startswith("metrics.csv is damaged")
    assert reasons["settings"].startswith("config.yaml is damaged: learning rate 'fast'")
    assert reasons["text"].startswith("config.yaml cannot be read")
    assert len(reasons) == 4


def test_other_files_of_the_same_names(tmp_path):
    write_run(tmp_path / "good")
    damaged = [[["lora", rate, 0]] for rate in (float("inf"), 0, -1e-3)]
    for number, cells in enumerate((3, ["a"], *damaged)):
        manifest(tmp_path / str(number), cells)
    (tmp_path / "list").mkdir()
    (tmp_path / "list" / "compare.json").write_text("[]")
    (tmp_path / "wandb" / "files").mkdir(parents=True)
    (tmp_path / "wandb" / "files" / "config.yaml").write_text("model: {value: {name: x}}")
    bare = tmp_path / "bare"
    write_run(bare, rate=1e-2)
    (bare / "metrics.csv").unlink()
    summary = json.loads((bare / "summary.json").read_text())
    del summary["metrics"]["after_init"]
    (bare / "summary.json").write_text(json.dumps(summary))
    assert [run.state for run in collect([tmp_path])] == ["finished"] * 2


def test_folders_that_hold_no_run(runs, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "config.yaml").write_text("problem: {kind: linear}")
    (tmp_path / "foreign" / "summary.json").write_text('{"theorems": []}')
    for name, message in (
        ("empty", "holds no run: expected config.yaml and summary.json"),
        ("foreign", "holds no run"),
        ("absent", "does not exist: expected a run folder"),
    ):
        for before in ((), (runs,)):  # nothing that was named is dropped silently
            with pytest.raises(InputError, match=f"{name}' {message}"):
                collect([*before, tmp_path / name])
    unfinished = tmp_path / "more" / "version_0"
    write_run(unfinished)
    (unfinished / "summary.json").unlink()
    with pytest.raises(
        InputError, match=r"no finished run to report: .*it has no summary.json yet"
    ):
        collect([unfinished])
    assert len(collect([runs, runs, tmp_path / "more"])) == 19


def test_a_cell_that_was_taken_out_of_the_manifest_counts_for_nothing(tmp_path):
    """Neither a run that was finished and best, nor one that had diverged."""
    for rate, validation in ((1e-4, 0.8), (1e-3, 0.95)):
        grid_run(tmp_path, "lora", rate, 0, validation)
    diverged = grid_run(tmp_path, "lora", 1e-2, 0)
    (diverged / "summary.json").unlink()
    fail(tmp_path, "lora", 1e-2, 0, "the loss is nan", diverged=True)
    manifest(tmp_path, [["lora", 1e-4, 0]])
    rows, notes = main_rows(tmp_path)
    assert rows["lora"]["learning rate"] == "1e-4 ‡"
    assert "Preliminary" not in " ".join(notes)
    withdrawn = ("withdrawn", "compare.json does not name its cell")
    assert list(excluded(tmp_path).values()) == [withdrawn] * 2


def test_cells_without_a_run(tmp_path):
    grid_run(tmp_path, "lora", 1e-3, 0)
    killed, again = Cell("lora", 1e-3, 1).name, Cell("lora", 1e-3, 2).name
    (tmp_path / "cells" / killed / "version_0").mkdir(parents=True)
    fail(tmp_path, "lora", 1e-3, 3)
    # A run that was finished by a later attempt, and one that a failed cell says more about.
    for number in (0, 1):
        write_run(tmp_path / "cells" / again / f"version_{number}", rate=1e-3, seed=2)
    (tmp_path / "cells" / again / "version_0" / "summary.json").unlink()
    failed = grid_run(tmp_path, "lora", 1e-3, 3)
    (failed / "summary.json").unlink()
    manifest(tmp_path, [["lora", 1e-3, seed] for seed in range(5)])
    assert excluded(tmp_path) == {
        f"cells/{killed}": ("unfinished", "it was ended as it began"),
        f"cells/{failed.parent.name}": ("failed", "no memory"),
        f"cells/{Cell('lora', 1e-3, 4).name}": ("missing", "it was not run"),
    }
    assert "**Preliminary**: 2 of 5 runs are finished, 2 are not." in main_rows(tmp_path)[1]


def test_scores_that_are_no_numbers_have_diverged(tmp_path):
    for rate, validation in ((1e-4, float("nan")), (1e-3, 0.9)):
        grid_run(tmp_path, "lora", rate, 0, validation, 0.7)
    assert main_rows(tmp_path)[0]["lora"]["learning rate"] == "1e-3 †"
    reason = "after training, the validation accuracy is nan"
    assert list(excluded(tmp_path).values()) == [("diverged", reason)]


def test_of_repeated_runs_the_one_trained_last_counts(tmp_path):
    """Also where the older one was tested later, which writes its summary again."""
    for name, ended, test in (("version_0", 100.0, 0.6), ("version_1", 200.0, 0.8)):
        write_run(tmp_path / name, test=test)
        change(tmp_path / name, train={"began": ended - 9, "ended": ended, "host": "a"})
    os.utime(tmp_path / "version_1" / "summary.json", (1e9, 1e9))
    assert main_rows(tmp_path)[0]["lora"]["test accuracy, %"] == "80.00"
    reason = f"the same settings were run again later: {tmp_path / 'version_1'}"
    assert excluded(tmp_path) == {"version_0": ("repeated", reason)}


def test_settings_that_compare_equal_are_the_same(tmp_path):
    """An earlier version wrote no settings that are null, and YAML tells 1 from 1.0."""
    for name, seed, clip, more in (
        *(("old_0", 0, 1, {}), ("old_1", 1, 1, {})),
        ("new_0", 0, 1.0, {"rank_pattern": None}),
    ):
        write_run(tmp_path / name, seed=seed)
        config = yaml.safe_load((tmp_path / name / "config.yaml").read_text())
        config["trainer"]["gradient_clip_val"] = clip
        config["model"]["adapter"] |= more
        (tmp_path / name / "config.yaml").write_text(yaml.safe_dump(config))
    change(tmp_path / "new_0", train={"ended": 4e9})
    assert main_rows(tmp_path)[0]["lora"]["seeds"] == "2"
    assert {name: state for name, (state, _) in excluded(tmp_path).items()} == {"old_0": "repeated"}


def test_runs_of_an_earlier_version(tmp_path):
    """Modules have moved since, and the record has more."""
    old, new = tmp_path / "old", tmp_path / "new"
    names = {old: "app.precond_adamw.PreconditionedAdamW", new: "PreconditionedAdamW"}
    for seed, (folder, name) in enumerate(names.items()):
        write_run(folder, seed=seed)
        config = yaml.safe_load((folder / "config.yaml").read_text())
        config["model"]["optimizer"]["class_path"] = name
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
    summary = json.loads((old / "summary.json").read_text())
    short = {name: summary[name] for name in ("method", "data", "metrics", "model")}
    (old / "summary.json").write_text(json.dumps(short))
    assert main_rows(tmp_path)[0]["lora"]["seeds"] == "2"
