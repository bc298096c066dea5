"""The pictures of a report."""

import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from app.commands.compare.runs import Run
from app.commands.compare.selection import Method, Task
from app.tracking.alignment_plots import MAPS
from app.utils.text import rate_text

# Okabe and Ito's colours, told apart with any colour vision; beyond them line style and marker change.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
STYLES = ("-", "--", ":")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
WIDTH, HEIGHT, LEGEND_ROW = 6.0, 3.6, 0.22  # inches; the legend stands below the axes
LABELS = {"steps": "optimizer step", "seconds": "seconds of initialisation and training"}
POINTS = 200


INSIDE = ("angle_A", "angle_B", "captured", "effective_rank")
"""The heat maps of a run that a report shows."""


@dataclass(frozen=True)
class Picture:
    """A picture in a report.

    Attributes:
        name: Of its file.
        title: What it shows.
        png: The file's content.
    """

    name: str
    title: str
    png: bytes


def inside_pictures(task: Task) -> list[Picture]:
    """Return what `AlignmentMonitor` has drawn of each method's first seed at its best rate."""
    found = []
    for method in task.methods:
        if method.best is None:
            continue
        run = min(method.best.runs, key=lambda run: run.seed)
        for measure in INSIDE:
            file = run.folder / f"inside_{measure}.png"
            if file.is_file():
                name = re.sub(r"\W+", "_", f"inside_{method.label}_{measure}")
                found.append(
                    Picture(name, f"{method.label}: {MAPS[measure][0]}", file.read_bytes())
                )
    return found


def draw(task: Task) -> list[Picture]:
    """Draw the learning-rate curves, and loss and score over steps and seconds."""
    looks = {
        method.label: i for i, method in enumerate(sorted(task.methods, key=lambda m: m.label))
    }
    pictures = []
    for reported in (False, True):
        drawn = _rates(task, looks, reported)
        pictures += [drawn] if drawn else []
    for name in dict.fromkeys(("loss", task.score)):
        for over in ("steps", "seconds"):
            drawn = _curves(task, looks, name, over)
            pictures += [drawn] if drawn else []
    return pictures


def _rates(task: Task, looks: dict[str, int], reported: bool) -> Picture | None:
    of, score = ("test", task.score) if reported else ("validation", task.selected_by)
    figure, axes = plt.subplots(layout="constrained")
    drawn = False
    lost = []
    for method in task.methods:
        look = _look(looks[method.label])
        points = [
            (rate, rate.test if reported else rate.validation)
            for rate in method.rates
            if not math.isnan(rate.learning_rate)
        ]
        found = [(rate, stat) for rate, stat in points if stat.n]
        lost += [(rate.learning_rate, look) for rate, _ in points if rate.spoilt]
        if not found:
            continue
        drawn = True
        x = [rate.learning_rate for rate, _ in found]
        y = np.array([stat.mean for _, stat in found]) * _factor(score)
        spread = [0 if math.isnan(stat.std) else stat.std for _, stat in found]
        error = np.array(spread) * _factor(score)
        axes.errorbar(x, y, error, capsize=3, label=method.label, markersize=5, **look)
        best = [i for i, (rate, _) in enumerate(found) if rate is method.best]
        ring: dict[str, Any] = {"markersize": 13, "markerfacecolor": "none", "linestyle": "none"}
        axes.plot([x[i] for i in best], y[best], "o", color=look["color"], **ring)
    if not drawn:
        plt.close(figure)
        return None
    ticks = sorted({r.learning_rate for m in task.methods for r in m.rates})
    ticks = [tick for tick in ticks if not math.isnan(tick)]
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(
        FuncFormatter(lambda value, _: rate_text(float(f"{value:.12g}")))
    )
    axes.tick_params(axis="x", labelrotation=30 if len(ticks) > 5 else 0)
    if len(ticks) == 1:
        axes.set_xlim(ticks[0] / 3, ticks[0] * 3)
    for rate, look in lost:
        blended = axes.get_xaxis_transform()
        axes.plot([rate], [0.02], "x", color=look["color"], transform=blended, clip_on=False)
    title = f"{of.capitalize()} {score} by learning rate"
    notes = "ring: the chosen rate" + ("; cross: a run failed or diverged" if lost else "")
    axes.set(xlabel=f"learning rate ({notes})", ylabel=_unit(f"{of} {score}", score), title=title)
    return _picture(f"learning_rate_{of}", title, figure, axes)


def _curves(task: Task, looks: dict[str, int], name: str, over: str) -> Picture | None:
    figure, axes = plt.subplots(layout="constrained")
    drawn = False
    for method in task.methods:
        if method.best is None:
            continue
        look = _look(looks[method.label])
        found = _mean_curve(method.best.runs, name, over)
        if found is None:
            continue
        drawn = True
        x, mean, std = found
        mean, std = mean * _factor(name), std * _factor(name)
        if name == "loss" or len(x) > 40:
            look.pop("marker")
        axes.plot(x, mean, label=_named(method), **look)
        if len(method.best.runs) > 1:
            axes.fill_between(
                x, mean - std, mean + std, color=look["color"], alpha=0.15, linewidth=0
            )
    if not drawn:
        plt.close(figure)
        return None
    what = "Training loss" if name == "loss" else f"Validation {name}"
    title = f"{what} over {over}"
    label = "nats per token" if name == "loss" else _unit(f"validation {name}", name)
    axes.set(xlabel=LABELS[over], ylabel=label, title=title)
    axes.set_xlim(left=0)
    return _picture(f"{name.replace('/', '_')}_over_{over}", title, figure, axes)


def _mean_curve(
    runs: Sequence[Run], name: str, over: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """Return x, mean and standard deviation over the runs, as far as all of them reach.

    Runs of other seeds take other times for a step: over seconds, values lie at a common grid of seconds.
    A long curve of losses is smoothed by a running mean of a twentieth of it.
    """
    curves = [run.curve(name, over) for run in runs]
    curves = [curve for curve in curves if len(curve) > 1]
    if not curves:
        return None
    first = max(curve[0][0] for curve in curves)
    last = min(curve[-1][0] for curve in curves)
    if last <= first:
        return None
    x = np.array([point for point, _ in curves[0] if first <= point <= last])
    if over == "seconds" or any([p for p, _ in c] != [p for p, _ in curves[0]] for c in curves):
        x = np.linspace(first, last, min(POINTS, max(map(len, curves))))
    rows = []
    for curve in curves:
        points, values = np.array(curve).T
        window = max(1, len(values) // 20) if name == "loss" else 1
        if window > 1:  # at each point the mean of the points up to it
            sums = np.concatenate([[0.0], np.cumsum(values)])
            ends = np.arange(1, len(values) + 1)
            starts = np.maximum(0, ends - window)
            values = (sums[ends] - sums[starts]) / (ends - starts)
        rows.append(np.interp(x, points, values))
    values = np.array(rows)
    std = values.std(axis=0, ddof=1) if len(rows) > 1 else np.zeros(len(x))
    return x, values.mean(axis=0), std


def _look(place: int) -> dict[str, Any]:
    turn, color = divmod(place, len(COLORS))
    marker = MARKERS[(color + 3 * turn) % len(MARKERS)]
    return {"color": COLORS[color], "linestyle": STYLES[turn % len(STYLES)], "marker": marker}


def _named(method: Method) -> str:
    rate = method.best.learning_rate if method.best else math.nan
    return method.label if math.isnan(rate) else f"{method.label}, {rate_text(rate)}"


def _factor(score: str) -> int:
    return 1 if score.rpartition("/")[2] == "loss" else 100


def _unit(label: str, score: str) -> str:
    return label if _factor(score) == 1 else f"{label}, %"


def _picture(name: str, title: str, figure: Figure, axes: Axes) -> Picture:
    axes.grid(alpha=0.3)
    handles, labels = axes.get_legend_handles_labels()
    columns = min(len(labels), 3 if max(map(len, labels)) < 24 else 2)
    figure.set_size_inches(WIDTH, HEIGHT + LEGEND_ROW * math.ceil(len(labels) / columns))
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, fontsize=9)
    stream = io.BytesIO()
    figure.savefig(stream, dpi=150)
    plt.close(figure)
    return Picture(name, title, stream.getvalue())
