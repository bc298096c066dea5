"""Figures of curves in panels, and how they are drawn."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

matplotlib.use("Agg")

# Okabe and Ito's colours, which differ for any colour vision; line styles differ in grey too.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
STYLES = ("-", "--", "-.", (0, (2, 1)), (0, (5, 1, 1, 1, 1, 1)), ":")
BOUND_STYLES = ((0, (4, 2)), (0, (1, 1.5)))
MARKERS = ("o", "s", "^", "D", "v", "P")
GREEK = {"Delta": "Δ", "Sigma": "Σ", "kappa": "κ", "theta": "θ", "gamma": "γ"}


@dataclass(frozen=True)
class Curve:
    """One curve.

    Args:
        panel: Title of the panel that it belongs to.
        label: Its name; equal names look alike in all panels and share an entry of the legend.
        x: Positions.
        y: Values.
        kind: `line`, `points` (measured at few places), or `bound` (what theory says; dashed black).
    """

    panel: str
    label: str
    x: Sequence[float]
    y: Sequence[float]
    kind: Literal["line", "points", "bound"] = "line"


@dataclass(frozen=True)
class Axis:
    """An axis: its label with the unit, its scale, and where it begins at the lowest, if not at the data."""

    label: str
    scale: Literal["linear", "log"] = "linear"
    low: float | None = None


@dataclass(frozen=True)
class Picture:
    """One figure; its panels stand beside each other in the order of their first curves."""

    name: str
    title: str
    x: Axis
    y: Axis
    curves: list[Curve]
    share_y: bool = True

    def rows(self) -> Iterator[tuple[str, str, str, float, float]]:
        """Yield (picture, panel, curve, x, y) of every point."""
        for curve in self.curves:
            for x, y in zip(curve.x, curve.y, strict=True):
                yield self.name, curve.panel, curve.label, float(x), float(y)


def draw(picture: Picture, folder: Path) -> Path:
    """Write `folder`/NAME.png: panels beside each other, one legend below all of them."""
    panels = list(dict.fromkeys(curve.panel for curve in picture.curves))
    labels = list(dict.fromkeys(c.label for c in picture.curves if c.kind != "bound"))
    bounds = list(dict.fromkeys(c.label for c in picture.curves if c.kind == "bound"))
    figure = plt.figure(figsize=(max(5.6, 3.4 * len(panels)), 4.2), layout="constrained")
    grid = figure.subplots(1, len(panels), sharey=picture.share_y, squeeze=False)
    positive = any(value > 0 for curve in picture.curves for value in curve.y)
    handles = {}
    for axes, panel in zip(grid[0], panels, strict=True):
        for curve in picture.curves:
            if curve.panel == panel:
                place = (bounds if curve.kind == "bound" else labels).index(curve.label)
                handles[_greek(curve.label)] = _plot(axes, curve, place)
        axes.set(xscale=picture.x.scale, xlabel=_greek(picture.x.label))
        if positive:  # else there is nothing to draw on a logarithmic axis
            axes.set_yscale(picture.y.scale)
        axes.set_title(_greek(panel), fontsize=10)
        axes.grid(alpha=0.3)
    for axes in grid[0]:  # after all curves: a limit ends the axis's own choice
        low, high = axes.get_ylim()
        if picture.y.low is not None and low < picture.y.low < high:
            axes.set_ylim(bottom=picture.y.low)
    grid[0][0].set_ylabel(_greek(picture.y.label))
    figure.suptitle(_greek(picture.title), fontsize=11)
    for columns in range(len(handles), 0, -1):  # as many as fit beside each other
        legend = figure.legend(
            handles.values(), handles.keys(), loc="outside lower center", ncols=columns, fontsize=8
        )
        if columns == 1 or legend.get_window_extent().width < 0.98 * figure.bbox.width:
            break
        legend.remove()
    path = folder / f"{picture.name}.png"
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def _greek(text: str) -> str:
    for word, letter in GREEK.items():
        text = text.replace(word, letter)
    return text


def _plot(axes: Axes, curve: Curve, place: int) -> Line2D:
    x, y = np.asarray(curve.x, float), np.asarray(curve.y, float)
    if curve.kind == "bound":
        dashes = BOUND_STYLES[place % len(BOUND_STYLES)]
        return axes.plot(x, y, color="black", linewidth=1.3, linestyle=dashes, zorder=3)[0]
    color, marker = COLORS[place % len(COLORS)], MARKERS[place % len(MARKERS)]
    if curve.kind == "points":
        size = 9 if len(x) == 1 else 5
        return axes.plot(
            x, y, marker, color=color, markersize=size, alpha=0.8, linestyle="none", zorder=4
        )[0]
    style = STYLES[place % len(STYLES)]
    few = marker if len(x) <= 12 else None
    return axes.plot(x, y, color=color, linestyle=style, marker=few, markersize=5, linewidth=1.6)[0]
