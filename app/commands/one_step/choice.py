"""Choose eta on training rows that are in no gradient."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from app.commands.one_step.command import UNTOUCHED, Grid, Step
from app.commands.one_step.measurements import VALIDATION, Measurements, Rows, Scores
from app.utils.text import rate_text

TASK_LOSS = "task_loss"
"""The score that chooses."""


class Chosen(NamedTuple):
    """The step of a series that the training rows have chosen.

    Attributes:
        step: The step.
        gamma: The `init.gamma` of an adapter of its rank that begins there; None for the whole gradient.
        notes: What is to be said of the choice.
        training: Scores on the rows that chose it.
        validation: Scores on the validation set.
    """

    step: Step
    gamma: float | None
    notes: list[str]
    training: Scores
    validation: Scores


def chosen(measurements: Measurements, series: Sequence[Step], rows: Rows) -> Step:
    """Return the step of a series with the smallest task loss on the rows; of equal ones the smallest step."""
    return min(series, key=lambda step: (_task_loss(measurements, step, rows), step.eta))


def choices(measurements: Measurements, grid: Grid, adapter: Mapping[str, Any]) -> list[Chosen]:
    """Return the chosen step of every series of a grid that has been measured.

    Args:
        measurements: The scores.
        grid: The steps.
        adapter: `lora_alpha` and `use_rslora` of the adapter that `gamma` is for.
    """
    found, rows = [], grid.eta_rows
    for series in (series for samples in grid.samples for series in grid.series(samples)):
        step = chosen(measurements, series, rows)
        notes = []
        if _task_loss(measurements, step, rows) >= _task_loss(measurements, UNTOUCHED, rows):
            notes.append("no eta lowers the task loss")
        if len(series) > 1 and step.eta in (series[0].eta, series[-1].eta):
            notes.append("at the end of --etas")
        gamma = None
        if isinstance(step.rank, int):
            # gamma divides a product that is scaled by lora_alpha / sqrt(r), or lora_alpha / r.
            root = math.sqrt(step.rank) if adapter["use_rslora"] else step.rank
            gamma = adapter["lora_alpha"] / root / step.eta
        training, validation = (measurements[step, where] for where in (rows, VALIDATION))
        found.append(Chosen(step, gamma, notes, training, validation))
    return found


def _task_loss(measurements: Measurements, step: Step, rows: Rows) -> float:
    value = measurements[step, rows][TASK_LOSS]
    return math.inf if value is None else value


def step_text(step: Step) -> str:
    """Return a step in a few words."""
    if step == UNTOUCHED:
        return "untouched"
    return f"{series_text(step)}, eta {rate_text(step.eta)}"


def series_text(step: Step) -> str:
    """Return what a step shares with those that differ from it in eta alone."""
    rank = f"rank {step.rank}" if isinstance(step.rank, int) else step.rank
    return f"{step.samples} samples, {rank}, {step.scale}"
