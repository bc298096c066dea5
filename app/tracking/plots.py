"""Pictures of a run: loss, validation score, singular spectrum, captured energy."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from app.tracking.record import main_scores

matplotlib.use("Agg")

_SIZE = (6.4, 4.0)
COLUMNS = 3
"""Panels of scores side by side."""


def write_plots(
    folder: Path,
    curves: Mapping[str, list[tuple[int, float]]],
    metrics: Mapping[str, Mapping[str, float]],
    layers: Mapping[str, Mapping[str, Any]],
) -> list[Path]:
    """Draw whatever the run has data for.

    Args:
        folder: Where the PNG files go.
        curves: From `read_metrics`.
        metrics: Scores at `zero_shot`, `after_init`, `final`.
        layers: `init.layers` of the run record; empty without a gradient initialisation.

    Returns:
        The files written.
    """
    written = []
    if "train/loss" in curves:
        written.append(_loss(folder / "loss.png", curves["train/loss"]))
    if metrics:
        written.append(_validation(folder / "validation.png", curves, metrics))
    if layers:
        written.append(_spectrum(folder / "spectrum.png", layers))
        written.append(_energy(folder / "captured_energy.png", layers))
    return written


def _save(axes: Axes, path: Path) -> Path:
    figure = axes.figure
    figure.tight_layout()  # type: ignore[union-attr]
    figure.savefig(path, dpi=150)  # type: ignore[union-attr]
    plt.close(figure)  # type: ignore[arg-type]
    return path


def _loss(path: Path, curve: list[tuple[int, float]]) -> Path:
    _, axes = plt.subplots(figsize=_SIZE)
    steps, values = np.array(curve).T
    window = max(1, len(values) // 20)
    color = "0.7" if window > 1 else "C0"  # grey is what the mean stands out from
    axes.plot(steps, values, color=color, linewidth=1, label="each logged step")
    if window > 1:
        smooth = np.convolve(values, np.ones(window) / window, mode="valid")
        axes.plot(steps[window - 1 :], smooth, color="C0", label=f"mean of {window}")
        axes.legend()
    axes.set(
        xlabel="optimizer step", ylabel="training loss (nats per token)", title="Training loss"
    )
    axes.set_ylim(0, 1.05 * max(values))
    axes.grid(alpha=0.3)
    return _save(axes, path)


def _validation(
    path: Path,
    curves: Mapping[str, list[tuple[int, float]]],
    metrics: Mapping[str, Mapping[str, float]],
) -> Path:
    """Draw each score in a panel of its own: before training, meanwhile, and at the end."""
    names = main_scores(metrics.values())
    rows = -(-len(names) // COLUMNS)
    columns = min(len(names), COLUMNS)
    size = (max(_SIZE[0], 3.6 * columns), _SIZE[1] if rows == 1 else 3.0 * rows)
    figure, panels = plt.subplots(rows, columns, figsize=size, squeeze=False)
    for axes, name in zip(panels.flat, names, strict=False):
        _score(axes, name, curves, metrics)
    for axes in panels.flat[len(names) :]:
        axes.set_axis_off()
    figure.suptitle("Validation scores")
    return _save(panels[0, 0], path)


def _score(
    axes: Axes,
    name: str,
    curves: Mapping[str, list[tuple[int, float]]],
    metrics: Mapping[str, Mapping[str, float]],
) -> None:
    curve = curves.get(f"val/{name}", [])
    # Steps are logged from 0 on: the model after the last of them stands one further.
    logged = [step for step, _ in [*curves.get("train/loss", []), *curve]]
    last = max(logged, default=-1) + 1
    if curve:
        axes.plot(*np.array(curve).T, "o-", label="during training")
    marks = {"zero_shot": (0, "s", "0.5"), "after_init": (0, "D", "C1"), "final": (last, "*", "C2")}
    for moment, scores in metrics.items():
        if name not in scores:
            continue
        step, marker, color = marks[moment]
        axes.plot(
            [step],
            [scores[name]],
            marker,
            color=color,
            markersize=10,
            linestyle="none",
            label=f"{moment.replace('_', ' ')}: {scores[name]:.3f}",
        )
    label = "loss (nats per token)" if name == "loss" else name
    axes.set(xlabel="optimizer step", ylabel=label)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)


def _spectrum(path: Path, layers: Mapping[str, Mapping[str, Any]]) -> Path:
    _, axes = plt.subplots(figsize=_SIZE)
    kinds = sorted({name.rpartition(".")[2] for name in layers})
    for color, kind in enumerate(kinds):
        rows = [v["singular_values"] for k, v in layers.items() if k.rpartition(".")[2] == kind]
        rows = [row for row in rows if row[0] > 0]
        if not rows:
            continue
        ratios = np.array([np.array(row[: min(map(len, rows))]) / row[0] for row in rows])
        index = np.arange(1, ratios.shape[1] + 1)
        axes.plot(
            index, np.median(ratios, axis=0), "o-", markersize=3, color=f"C{color}", label=kind
        )
        low, high = np.percentile(ratios, [10, 90], axis=0)
        axes.fill_between(index, np.maximum(low, 1e-12), high, color=f"C{color}", alpha=0.1)
    axes.set(
        xlabel="i",
        ylabel="singular value i / singular value 1",
        yscale="log",
        title="Spectrum of the one-step gradient (median and 10-90 % of layers)",
    )
    axes.grid(alpha=0.3)
    axes.legend(ncols=2, fontsize=8)
    return _save(axes, path)


def _energy(path: Path, layers: Mapping[str, Mapping[str, Any]]) -> Path:
    kinds = list(dict.fromkeys(name.rpartition(".")[2] for name in layers))
    table: dict[str, list[float]] = {kind: [] for kind in kinds}
    for name, values in layers.items():
        table[name.rpartition(".")[2]].append(values["captured_energy"])
    depth = max(map(len, table.values()))
    grid = np.full((len(kinds), depth), np.nan)
    for row, kind in enumerate(kinds):
        grid[row, : len(table[kind])] = table[kind]
    _, axes = plt.subplots(figsize=(max(6.4, 0.22 * depth + 2.4), 0.35 * len(kinds) + 1.8))
    image = axes.imshow(grid, aspect="auto", vmax=1.0, cmap="viridis")
    axes.set_yticks(range(len(kinds)), kinds)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set(xlabel="layer of that kind, in order", title="Gradient energy captured by rank r")
    axes.figure.colorbar(image, ax=axes, label="|G_r|² / |G|²")
    return _save(axes, path)
