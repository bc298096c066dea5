"""What the notes below the main table say; those on the choice are in test_selection.py."""

from tests.support.report_runs import change, grid_run, main_rows, write_run


def test_runs_at_the_same_time_are_named(tmp_path):
    times = (("a", 0, 100), ("a", 90, 200), ("a", 95, 99), ("b", 0, 300), ("a", 200, 210))
    for seed, (host, began, ended) in enumerate(times):
        run = grid_run(tmp_path, "lora", 1e-3, seed)
        change(run, train={"host": host, "began": 1e9 + began, "ended": 1e9 + ended})
    assert any("Up to 3 of these runs trained at once" in note for note in main_rows(tmp_path)[1])
    alone = main_rows(tmp_path / "cells" / "lora-lr1e-3-seed0", run)[1]
    assert not any("at once" in note for note in alone)


def test_validation_on_the_reported_rows_is_said(tmp_path):
    data = {"test_split": "validation", "validation_size": None, "max_length": 128}
    write_run(tmp_path / "version_0", data=data, test=None)
    rows, notes = main_rows(tmp_path / "version_0")
    assert any("The validation rows are the reported rows" in note for note in notes)
    assert rows["lora"]["test accuracy, %"] == "not tested"
    command = f"`python train.py test --run {tmp_path / 'version_0'}`"
    assert f"1 of 1 runs at the chosen rates have no test accuracy: {command} scores one." in notes


def test_rows_set_aside_for_the_test_are_not_those_that_validate(tmp_path):
    """A table's, of which `validation_size` null sets a tenth aside."""
    write_run(tmp_path / "version_0", data={"test_size": 50, "validation_size": None})
    _, notes = main_rows(tmp_path / "version_0")
    assert not any("reported rows" in note for note in notes)
