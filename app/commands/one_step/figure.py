"""Draw the scores of steps over their size."""

from collections.abc import Sequence
from math import nan
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from app.commands.one_step.choice import TASK_LOSS, Chosen
from app.commands.one_step.command import UNTOUCHED, Grid, Scale
from app.commands.one_step.measurements import VALIDATION, Measurements
from app.tracking.plots import panels

ACCURACY = "accuracy"
PANEL = (5.2, 3.4)  # inches
SCALES = {"global": "one eta for all layers", "layer": "each layer's step over its own $S_1$"}
STYLES = ("-", "--", ":", "-.")


def draw(path: Path, measurements: Measurements, grid: Grid, found: Sequence[Chosen]) -> None:
    """Draw the task loss over eta, and the accuracy of rows with classes: a row of panels for each scale.

    Args:
        path: The PNG file.
        measurements: The scores.
        grid: The steps.
        found: The chosen steps, whose validation scores are drawn as stars.
    """
    names = [TASK_LOSS]
    if ACCURACY in measurements[UNTOUCHED, VALIDATION]:
        names.append(ACCURACY)
    rows, columns = len(grid.scales), len(names)
    size = (PANEL[0] * columns, PANEL[1] * rows + 0.7)
    with panels(path, size, rows, columns) as every:
        for place, axes in enumerate(every):
            row, column = divmod(place, columns)
            _panel(axes, names[column], grid.scales[row], measurements, grid, found)
        every[0].figure.legend(
            handles=_legend(grid), fontsize=8, loc="outside lower center", ncols=4
        )


def _panel(
    axes: Axes,
    name: str,
    scale: Scale,
    measurements: Measurements,
    grid: Grid,
    found: Sequence[Chosen],
) -> None:
    for where, style in ((grid.eta_rows, "--"), (VALIDATION, ":")):
        value = _drawn(measurements[UNTOUCHED, where].get(name))
        axes.axhline(value, color="0.4", linestyle=style)
    every = [series for samples in grid.samples for series in grid.series(samples)]
    for series, choice in zip(every, found, strict=True):
        step = series[0]
        if step.scale != scale:
            continue
        look = _look(grid, step.samples, step.rank)
        values = [_drawn(measurements[step, grid.eta_rows][name]) for step in series]
        axes.plot(grid.etas, values, **look)
        star = {"color": look["color"], "markersize": 12, "markeredgecolor": "black"}
        axes.plot(choice.step.eta, _drawn(choice.validation.get(name)), "*", **star)
    axes.set(
        xscale="log",
        yscale="log" if name == TASK_LOSS else "linear",
        xlabel="eta: spectral norm of the largest step",
        ylabel=f"{name.replace('_', ' ')}, {grid.eta_rows} training rows",
        title=SCALES[scale],
    )
    axes.title.set_fontsize(9)
    axes.grid(alpha=0.3)


def _look(grid: Grid, samples: int, rank: Any) -> dict[str, Any]:
    """Return colour by samples, line style by rank; lines may lie upon each other, later ones are thinner."""
    place, last = grid.ranks.index(rank), len(grid.ranks) - 1
    return {
        "color": f"C{grid.samples.index(samples)}",
        "linestyle": STYLES[place % len(STYLES)],
        "linewidth": 1.5 + 2 * (last - place) / max(last, 1),
        "alpha": 1.0 if place == last else 0.45,
    }


def _legend(grid: Grid) -> list[Line2D]:
    """Return what stands in the legend: samples by colour, ranks by style, the untouched model, stars."""
    handles = [
        Line2D([], [], color=f"C{i}", label=f"{samples} samples")
        for i, samples in enumerate(grid.samples)
    ]
    for rank in grid.ranks:
        look = _look(grid, grid.samples[0], rank) | {"color": "black"}
        label = rank if isinstance(rank, str) else f"rank {rank}"
        handles.append(Line2D([], [], label=label, **look))
    untouched: dict[Any, str] = {"--": "training rows", ":": "validation"}
    for style, where in untouched.items():
        handles.append(Line2D([], [], color="0.4", linestyle=style, label=f"untouched, {where}"))
    star: dict[str, Any] = {"color": "0.7", "markersize": 11, "markeredgecolor": "black"}
    handles.append(
        Line2D([], [], linestyle="", marker="*", label="validation at the chosen eta", **star)
    )
    return handles


def _drawn(value: float | None) -> float:
    """Return a score as it is drawn: none that is not finite."""
    return nan if value is None else value
