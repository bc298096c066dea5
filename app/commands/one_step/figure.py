"""Draw the scores of steps over their size."""

from collections.abc import Sequence
from math import nan
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from app.commands.one_step.choice import TASK_LOSS, Chosen, series_text
from app.commands.one_step.command import UNTOUCHED, Grid
from app.commands.one_step.measurements import VALIDATION, Measurements
from app.tracking.plots import panels

ACCURACY = "accuracy"
PANEL = (5.2, 4.2)  # inches


def draw(path: Path, measurements: Measurements, grid: Grid, found: Sequence[Chosen]) -> None:
    """Draw the task loss over eta, and the accuracy of rows with classes, a line for each series.

    Args:
        path: The PNG file.
        measurements: The scores.
        grid: The steps.
        found: The chosen steps, whose validation scores are drawn as stars.
    """
    names = [TASK_LOSS]
    if ACCURACY in measurements[UNTOUCHED, VALIDATION]:
        names.append(ACCURACY)
    width, height = PANEL
    with panels(path, (width * len(names), height), columns=len(names)) as every:
        for axes, name in zip(every, names, strict=True):
            _panel(axes, name, measurements, grid, found)
        every[0].legend(fontsize=7)


def _panel(
    axes: Axes, name: str, measurements: Measurements, grid: Grid, found: Sequence[Chosen]
) -> None:
    rows = grid.eta_rows
    for where, style, label in (
        (rows, "--", f"{rows} training rows"),
        (VALIDATION, ":", "validation"),
    ):
        value = _drawn(measurements[UNTOUCHED, where][name])
        axes.axhline(value, color="0.4", linestyle=style, label=f"untouched, {label}")
    every = [series for samples in grid.samples for series in grid.series(samples)]
    # Lines may lie upon each other: each one is thinner than those below it.
    widths = np.linspace(5, 1, len(every)) if len(every) > 1 else [1.0]
    for series, choice, width in zip(every, found, widths, strict=True):
        values = [_drawn(measurements[step, rows][name]) for step in series]
        label = series_text(series[0])
        [line] = axes.plot(
            grid.etas, values, "o-", markersize=width + 2, linewidth=width, label=label
        )
        star: dict[str, Any] = {
            "color": line.get_color(),
            "markersize": 9 + 2 * width,
            "markeredgecolor": "black",
        }
        axes.plot(choice.step.eta, _drawn(choice.validation[name]), "*", **star)
    axes.set(
        xscale="log",
        yscale="log" if name == TASK_LOSS else "linear",
        xlabel="eta: spectral norm of the largest step",
        title=f"{name.replace('_', ' ')} on {rows} training rows; star: validation at the chosen eta",
    )
    axes.title.set_fontsize(9)
    axes.grid(alpha=0.3)


def _drawn(value: float | None) -> float:
    """Return a score as it is drawn: none that is not finite."""
    return nan if value is None else value
