"""Report the chosen steps of a grid: a table, a figure and a summary."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from app.commands.one_step.choice import TASK_LOSS, Chosen, choices
from app.commands.one_step.command import UNTOUCHED, Grid
from app.commands.one_step.figure import draw
from app.commands.one_step.measurements import VALIDATION, Measurements, Scores
from app.tracking.record import main_scores
from app.tracking.run_folder import SUMMARY_FILE
from app.utils.files import write_json
from app.utils.text import rate_text

TABLE_FILE = "table.md"
FIGURE_FILE = "one_step.png"


def write_report(
    folder: Path,
    measurements: Measurements,
    grid: Grid,
    adapter: Mapping[str, Any],
    about: Mapping[str, Any],
) -> str:
    """Write table.md, one_step.png and summary.json of a grid that has been measured; return the table.

    Args:
        folder: Where to.
        measurements: The scores.
        grid: The steps.
        adapter: `lora_alpha` and `use_rslora` of the adapter that `gamma` is for.
        about: The run's model, data and seed, for the summary.
    """
    found = choices(measurements, grid, adapter)
    text = table(measurements, grid, found)
    (folder / TABLE_FILE).write_text(text, encoding="utf-8")
    draw(folder / FIGURE_FILE, measurements, grid, found)
    before = {
        name: measurements[UNTOUCHED, rows]
        for name, rows in (("training", grid.eta_rows), ("validation", VALIDATION))
    }
    steps = [{**each.step._asdict(), **each._asdict()} for each in found]
    for values in steps:
        del values["step"]
    summary = {**about, "eta_rows": grid.eta_rows, "untouched": before, "steps": steps}
    write_json(folder / SUMMARY_FILE, summary)
    return text


def table(measurements: Measurements, grid: Grid, found: Sequence[Chosen]) -> str:
    """Return the untouched model and the chosen steps as a Markdown table."""
    before, untouched = (measurements[UNTOUCHED, rows] for rows in (grid.eta_rows, VALIDATION))
    names = _names(untouched)

    def line(words: Sequence[str], training: Scores, validation: Scores, notes: str) -> list[str]:
        scores = [training[TASK_LOSS], *(validation[name] for name in names)]
        return [*words, *map(_number, scores), notes]

    heads = [
        "samples",
        "rank",
        "scale",
        "eta",
        "gamma",
        f"{TASK_LOSS}, {grid.eta_rows} training rows",
    ]
    lines = [[*heads, *(f"validation {name}" for name in names), "notes"]]
    lines += [["---"] * 5 + ["---:"] * (1 + len(names)) + ["---"]]
    lines += [line(["none", "", "", "", ""], before, untouched, "")]
    for step, gamma, notes, training, validation in found:
        words = [str(step.samples), str(step.rank), step.scale, rate_text(step.eta)]
        words.append("" if gamma is None else f"{gamma:.4g}")
        lines.append(line(words, training, validation, "; ".join(notes)))
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def scores_text(scores: Scores) -> str:
    """Return the scores that are shown, in one line."""
    return ", ".join(f"{name} {_number(scores[name])}" for name in _names(scores))


def _names(scores: Scores) -> list[str]:
    """Return the names of the scores that are shown, the task loss first."""
    names = main_scores([{name: value or 0.0 for name, value in scores.items()}])
    return sorted(names, key=lambda name: name != TASK_LOSS)


def _number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4f}"
