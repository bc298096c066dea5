"""The plots of a report."""

import io
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from app.commands.compare.collect import Run
from app.commands.compare.scores import Score
from app.commands.compare.selection import Comparison
from app.tracking.alignment_plots import MAPS
from app.utils.text import rate_text

# Okabe and Ito's colours, told apart with any colour vision; beyond them line style and marker change.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
STYLES = ("-", "--", ":")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
WIDTH, HEIGHT, LEGEND_ROW = 6.0, 3.6, 0.22  # inches; the legend stands below the axes
LABELS = {"steps": "optimizer step", "seconds": "seconds of initialization and training"}
POINTS = 200

ALIGNMENT_MEASURES = ("angle_A", "angle_B", "captured", "effective_rank")
"""The heat maps of a run that a report shows."""

ALIGNMENT_FILES = ("alignment_{}.png", "inside_{}.png")
"""Their files in a run folder, those of earlier versions last."""


@dataclass(frozen=True)
class Plot:
    """A plot in a report: its file's name without the ending, what it shows, and the file's content."""

    name: str
    title: str
    png: bytes


def alignment_plots(comparison: Comparison) -> list[Plot]:
    """Return the heat maps that `AlignmentMonitor` drew of each method's first seed at its best rate."""
    plots = []
    by_seed = comparison.chosen.sort_values("seed")
    for label, run in by_seed.groupby("method", observed=True).run.first().items():
        for measure in ALIGNMENT_MEASURES:
            files = [run.folder / name.format(measure) for name in ALIGNMENT_FILES]
            file = next((file for file in files if file.is_file()), None)
            if file is not None:
                name = re.sub(r"\W+", "_", f"alignment_{label}_{measure}")
                plots.append(Plot(name, f"{label}: {MAPS[measure][0]}", file.read_bytes()))
    return plots


def comparison_plots(comparison: Comparison) -> list[Plot]:
    """Draw the learning-rate curves, and loss and score over steps and seconds, as far as there are data.

    Names and titles have the rank of a comparison from `by_rank`.
    """
    plots = [_rates_plot(comparison, reported) for reported in (False, True)]
    for name in dict.fromkeys((Score("loss"), comparison.score)):
        plots += [_curves_plot(comparison, name, over) for over in ("steps", "seconds")]
    ending = "" if comparison.rank is None else f"_r{comparison.rank}"
    return [replace(plot, name=plot.name + ending) for plot in plots if plot is not None]


def rank_plot(parts: Sequence[Comparison]) -> Plot | None:
    """Draw the compared scores over ranks, at each rank's best learning rate; None for fewer than two.

    `parts` is from `by_rank`.
    """
    if len(parts) < 2:
        return None
    of, score, column = parts[0].compared
    figure, axes = plt.subplots(layout="constrained")
    rows = pd.concat([part.chosen.astype({"method": str}).assign(rank=part.rank) for part in parts])
    for label, look in _looks(dict.fromkeys(rows.method)).items():
        own = score.factor * rows[rows.method == label].groupby("rank")[column].agg(["mean", "std"])
        stats = own.dropna(subset="mean")
        if len(stats):
            look |= {"label": label, "markersize": 5, "capsize": 3}
            axes.errorbar(stats.index, stats["mean"], stats["std"].fillna(0), **look)
    _scale_log(axes, [part.rank or 0 for part in parts], lambda rank: f"{rank:.0f}")
    title = f"{of.capitalize()} {score} by rank"
    label = "rank r, at its best learning rate"
    axes.set(xlabel=label, ylabel=_score_label(of, score), title=title)
    return _finish("rank", title, figure, axes)


def _looks(labels: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Return colour, line style and marker of each method, in the order of the report."""
    looks = {label: dict[str, Any]() for label in labels}
    for place, label in enumerate(sorted(looks)):
        turn, color = divmod(place, len(COLORS))
        marker = MARKERS[(color + 3 * turn) % len(MARKERS)]
        style = STYLES[turn % len(STYLES)]
        looks[label] |= {"color": COLORS[color], "linestyle": style, "marker": marker}
    return looks


def _rates_plot(comparison: Comparison, reported: bool) -> Plot | None:
    of, score, column = "validation", comparison.selected_by, "selection_score"
    if reported:
        of, score, column = "test", comparison.score, "reported_score"
    figure, axes = plt.subplots(layout="constrained")
    means: list[float] = []
    for label, look in _looks(comparison.choices).items():
        own = comparison.finished[comparison.finished.method == label].copy()
        own[column] *= score.factor
        # The choice's ring is drawn from the rows at that rate.
        stats, ring = (
            rows.groupby("learning_rate")[column].agg(["mean", "std"]).dropna(subset="mean")
            for rows in (own, own[own.chosen])
        )
        if len(stats):
            look |= {"label": label, "markersize": 5, "capsize": 3}
            axes.errorbar(stats.index, stats["mean"], stats["std"].fillna(0), **look)
            means += stats["mean"].tolist()
            empty: dict[str, Any] = {"markerfacecolor": "none", "linestyle": "none"}
            axes.plot(ring.index, ring["mean"], "o", color=look["color"], markersize=13, **empty)
        failed = comparison.failed.learning_rate[comparison.failed.method == label].unique()
        bottom = axes.get_xaxis_transform()
        for rate in failed:
            axes.plot([rate], [0.02], "x", color=look["color"], transform=bottom, clip_on=False)
    _scale_log(axes, sorted(comparison.rows.learning_rate.dropna().unique()), rate_text)
    title = f"{of.capitalize()} {score} by learning rate{_at_rank(comparison)}"
    notes = "ring: the chosen rate"
    notes += "" if comparison.failed.empty else "; cross: a run failed or diverged"
    notes += _show_best(axes, means, score.less_is_better)
    axes.set(xlabel=f"learning rate ({notes})", ylabel=_score_label(of, score), title=title)
    return _finish(f"learning_rate_{of}", title, figure, axes)


def _show_best(axes: Axes, means: Sequence[float], less_is_better: bool) -> str:
    """End the y axis where far worse means would flatten the curves; return what is to be said of that.

    It ends 1.5 times as far from the best mean as three quarters of all means reach, where some lie beyond
    twice that distance.
    """
    worse = np.sort((1 if less_is_better else -1) * np.array(means))
    reach = 1.5 * (np.quantile(worse, 0.75) - worse[0]) if len(worse) else 0.0
    if not 0 < 2 * reach < worse[-1] - worse[0]:
        return ""
    low, high = worse[0] - 0.1 * reach, worse[0] + reach
    axes.set_ylim((low, high) if less_is_better else (-high, -low))
    return f"; beyond the axis: {int(np.sum(worse > high))} means"


def _at_rank(comparison: Comparison) -> str:
    return "" if comparison.rank is None else f", rank {comparison.rank}"


def _scale_log(axes: Axes, ticks: Sequence[float], text: Callable[[float], str]) -> None:
    """Scale the x axis by the logarithm, and mark the values that were tried."""
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_minor_locator(NullLocator())
    names = FuncFormatter(lambda value, _: text(float(f"{value:.12g}")))
    axes.xaxis.set_major_formatter(names)
    axes.tick_params(axis="x", labelrotation=30 if len(ticks) > 5 else 0)
    if len(ticks) == 1:
        axes.set_xlim(ticks[0] / 3, ticks[0] * 3)


def _curves_plot(comparison: Comparison, name: Score, over: str) -> Plot | None:
    figure, axes = plt.subplots(layout="constrained")
    for label, look in _looks(comparison.choices).items():
        rows = comparison.chosen[comparison.chosen.method == label]
        curve = mean_curve(list(rows.run), name, over)
        if curve is None:
            continue
        x, mean, std = curve[0], curve[1] * name.factor, curve[2] * name.factor
        if name == "loss" or len(x) > 40:
            look.pop("marker")
        has_rate = rows.learning_rate.notna().all()
        named = f"{label}, {comparison.choices[label].rate}" if has_rate else label
        axes.plot(x, mean, label=named, **look)
        if len(rows) > 1:
            band: dict[str, Any] = {"color": look["color"], "alpha": 0.15, "linewidth": 0}
            axes.fill_between(x, mean - std, mean + std, **band)
    what = "Training loss" if name == "loss" else f"Validation {name}"
    title = f"{what} over {over}{_at_rank(comparison)}"
    label = "nats per token" if name == "loss" else _score_label("validation", name)
    axes.set(xlabel=LABELS[over], ylabel=label, title=title)
    axes.set_xlim(left=0)
    if over == "steps":
        axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True, steps=[1, 2, 5, 10]))
    return _finish(f"{name.replace('/', '_')}_over_{over}", title, figure, axes)


def mean_curve(
    runs: Sequence[Run], name: str, over: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """Return x, mean and standard deviation of the runs' `run_curve`, as far as all of them reach.

    Runs of other seeds take other times for a step: over seconds, values lie at a common grid of seconds.
    A long curve of losses is smoothed by a running mean of a twentieth of it.
    """
    curves = [run_curve(run, name, over) for run in runs]
    curves = [curve for curve in curves if len(curve) > 1]
    if not curves:
        return None
    first = max(curve[0, 0] for curve in curves)
    last = min(curve[-1, 0] for curve in curves)
    if last <= first:
        return None
    x = curves[0][:, 0]
    x = x[(first <= x) & (x <= last)]
    if over == "seconds" or any(not np.array_equal(c[:, 0], curves[0][:, 0]) for c in curves):
        x = np.linspace(first, last, min(POINTS, max(map(len, curves))))
    rows = []
    for points, values in (curve.T for curve in curves):
        window = max(1, len(values) // 20) if name == "loss" else 1
        sums = np.concatenate([[0.0], np.cumsum(values)])
        ends = np.arange(1, len(values) + 1)
        begins = np.maximum(0, ends - window)  # at each point the mean of the points up to it
        smooth = (sums[ends] - sums[begins]) / (ends - begins) if window > 1 else values
        rows.append(np.interp(x, points, smooth))
    std = np.std(rows, axis=0, ddof=1) if len(rows) > 1 else np.zeros(len(x))
    return x, np.mean(rows, axis=0), std


def run_curve(run: Run, name: str, over: str) -> np.ndarray:
    """Return a curve over optimizer steps made or over seconds of initialization and training.

    Args:
        run: The run.
        name: "loss" of training, or a score on the validation rows.
        over: "steps" or "seconds".

    Returns:
        Points, n x 2, float64.
    """
    train = run.record.train
    column = "train/loss" if name == "loss" else f"val/{name}"
    points = [(step + 1.0, value) for step, value in run.curves.get(column, [])]
    if name != "loss":
        before, final = run.scores("after_init").get(name), run.scores("final").get(name)
        points = [(0.0, before), *points] if before is not None else points
        if train.steps and final is not None and (not points or points[-1][0] < train.steps):
            points.append((float(train.steps), final))
    curve = np.array(points, dtype=float).reshape(-1, 2)
    if over == "seconds":
        # The clock is read after a step; between its readings time goes evenly.
        clock = [(0.0, 0.0)]
        clock += [(step + 1.0, seconds) for step, seconds in run.curves.get("train/seconds", [])]
        if train.steps > clock[-1][0]:
            clock.append((float(train.steps), run.train_seconds))
        curve[:, 0] = run.init_seconds + np.interp(curve[:, 0], *np.array(clock).T)
    return curve


def _score_label(of: str, score: Score) -> str:
    return f"{of} {score}{', %' if score.is_fraction else ''}"


def _finish(name: str, title: str, figure: Figure, axes: Axes) -> Plot | None:
    """Return a figure as a plot; None if nothing was drawn that has a label."""
    handles, labels = axes.get_legend_handles_labels()
    stream = io.BytesIO()
    if labels:
        axes.grid(alpha=0.3)
        columns = min(len(labels), 3 if max(map(len, labels)) < 24 else 2)
        figure.set_size_inches(WIDTH, HEIGHT + LEGEND_ROW * math.ceil(len(labels) / columns))
        figure.legend(handles, labels, loc="outside lower center", ncols=columns, fontsize=9)
        figure.savefig(stream, dpi=150)
    plt.close(figure)
    return Plot(name, title, stream.getvalue()) if labels else None
