"""The choice of eta on measurements made up by hand, and the file that they are kept in."""

from math import inf, nan

import pytest

from app.commands.one_step.choice import choices, step_text
from app.commands.one_step.command import UNTOUCHED, Grid, Step
from app.commands.one_step.figure import draw
from app.commands.one_step.measurements import VALIDATION, Measurements
from app.commands.one_step.report import table
from app.utils.errors import InputError
from tests.support.pictures import check_picture

GRID = Grid((8,), (4, "full"), ("global",), (0.1, 1.0, 10.0), 5)


def measured(path, losses):
    """Return measurements of GRID, of which each series has these task losses."""
    made = Measurements(path)
    for rows in (5, VALIDATION):
        made.add(UNTOUCHED, rows, {"task_loss": 2.0, "accuracy": 0.5})
    for rank, values in losses.items():
        for eta, value in zip(GRID.etas, values, strict=True):
            step = Step(8, rank, "global", eta)
            made.add(step, 5, {"task_loss": value, "accuracy": 0.25})
            made.add(step, VALIDATION, {"task_loss": 10 * eta, "accuracy": 0.75})
    return made


@pytest.mark.parametrize(
    ("losses", "eta", "notes"),
    [
        ((1.9, 1.5, 1.6), 1.0, []),
        ((1.9, 1.5, 1.4), 10.0, ["at the end of --etas"]),
        ((1.5, 1.5, nan), 0.1, ["at the end of --etas"]),  # of equal ones the smaller step
        ((inf, 2.0, 2.5), 1.0, ["no eta lowers the task loss"]),
        ((nan, nan, nan), 0.1, ["no eta lowers the task loss", "at the end of --etas"]),
    ],
)
def test_the_smallest_task_loss_on_the_training_rows_chooses(losses, eta, notes, tmp_path):
    made = measured(tmp_path / "lines.jsonl", {4: losses, "full": (3.0, 1.0, 3.0)})
    first, whole = choices(made, GRID, {"lora_alpha": 16, "use_rslora": True})
    assert first.step == (8, 4, "global", eta)
    assert first.notes == notes
    assert first.gamma == pytest.approx(16 / 2 / eta)
    assert first.validation["task_loss"] == 10 * eta
    assert (whole.step.eta, whole.gamma, whole.notes) == (1.0, None, [])
    plain = choices(made, GRID, {"lora_alpha": 16, "use_rslora": False})
    assert plain[0].gamma == pytest.approx(16 / 4 / eta)


def test_the_table_has_the_untouched_model_and_each_choice(tmp_path):
    made = measured(tmp_path / "lines.jsonl", {4: (nan, nan, nan), "full": (3.0, 1.0, 3.0)})
    found = choices(made, GRID, {"lora_alpha": 16, "use_rslora": True})
    assert table(made, GRID, found).splitlines() == [
        "| samples | rank | scale | eta | gamma | task_loss, 5 training rows | validation task_loss "
        "| validation accuracy | notes |",
        "| --- | --- | --- | --- | --- | ---: | ---: | ---: | --- |",
        "| none |  |  |  |  | 2.0000 | 2.0000 | 0.5000 |  |",
        "| 8 | 4 | global | 1e-1 | 80 | not finite | 1.0000 | 0.7500 | no eta lowers the task loss; at the "
        "end of --etas |",
        "| 8 | full | global | 1e0 |  | 1.0000 | 10.0000 | 0.7500 |  |",
    ]
    assert step_text(found[0].step) == "8 samples, rank 4, global, eta 1e-1"


def test_measurements_are_read_as_they_were_added(tmp_path):
    path = tmp_path / "lines.jsonl"
    made = measured(path, {4: (1.0, nan, inf), "full": (3.0, 1.0, 3.0)})
    again = Measurements(path)
    for step in (Step(8, rank, "global", eta) for rank in (4, "full") for eta in GRID.etas):
        for rows in (5, VALIDATION):
            assert again[step, rows] == made[step, rows]
    assert again[Step(8, 4, "global", 1.0), 5] == {"task_loss": None, "accuracy": 0.25}
    assert (Step(8, 5, "global", 1.0), 5) not in again
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"samples": 8, "rank": 4, "sc')
    assert (Step(8, "full", "global", 10.0), VALIDATION) in Measurements(path)
    assert path.read_bytes() == whole
    path.write_bytes(whole + b"[3]\n")
    with pytest.raises(
        InputError, match=f"line {len(whole.splitlines()) + 1} of .* is no measurement"
    ):
        Measurements(path)


def test_every_series_is_drawn(tmp_path):
    made = measured(tmp_path / "lines.jsonl", {4: (1.9, nan, 2.5), "full": (3.0, 1.0, 3.0)})
    found = choices(made, GRID, {"lora_alpha": 16, "use_rslora": True})
    draw(tmp_path / "steps.png", made, GRID, found)
    check_picture(tmp_path / "steps.png")


def test_without_validation_rows_the_training_rows_are_drawn(tmp_path):
    made = measured(tmp_path / "lines.jsonl", {4: (1.9, 1.5, 2.5), "full": (3.0, 1.0, 3.0)})
    for (_, rows), scores in made._scores.items():
        if rows == VALIDATION:  # those of a benchmark alone
            scores.clear()
            scores["gsm8k/strict"] = 0.5
    found = choices(made, GRID, {"lora_alpha": 16, "use_rslora": True})
    draw(tmp_path / "steps.png", made, GRID, found)
    check_picture(tmp_path / "steps.png")
