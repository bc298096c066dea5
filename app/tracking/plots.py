"""Draw a run: loss, validation scores, spectra and captured energy of the one-step gradient."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from app.tracking.record import main_scores
from app.utils.files import atomic_write

matplotlib.use("Agg")

Curves = Mapping[str, Sequence[tuple[int, float]]]
"""(step, value) pairs by name, as `read_metrics` returns them."""
Layers = Mapping[str, Mapping[str, Any]]
"""`init.layers` of the run record."""

_SIZE = (6.4, 4.0)
_COLUMNS = 3  # panels of scores side by side


def write_plots(
    folder: Path, curves: Curves, metrics: Mapping[str, Mapping[str, float]], layers: Layers
) -> list[Path]:
    """Draw whatever the run has data for.

    Args:
        folder: Where the PNG files go.
        curves: Logged values.
        metrics: Scores at `zero_shot`, `after_init`, `final`.
        layers: Singular values and captured energy by layer; empty without a gradient initialization.

    Returns:
        The files written.
    """
    written = []
    if "train/loss" in curves:
        written.append(folder / "loss.png")
        with panels(written[-1]) as [axes]:
            _loss(axes, curves["train/loss"])
    if main_scores(metrics.values()):
        written.append(folder / "validation.png")
        _validation(written[-1], curves, metrics)
    if layers:
        written += [folder / "spectrum.png", folder / "captured_energy.png"]
        with panels(written[-2]) as [axes]:
            _spectrum(axes, layers)
        _energy(written[-1], layers)
    return written


@contextmanager
def panels(
    path: Path, size: tuple[float, float] = _SIZE, rows: int = 1, columns: int = 1
) -> Iterator[list[Axes]]:
    """Yield the panels of a figure, row by row, which becomes a PNG file when the block ends."""
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False)
    try:
        yield list(axes.flat)
        figure.tight_layout()
        with atomic_write(path) as stream:
            figure.savefig(stream, dpi=150, format="png")
    finally:
        plt.close(figure)


def kind_of(layer: str) -> str:
    """Return the last part of a layer's name, such as q_proj."""
    return layer.rpartition(".")[2]


def median_spectra(layers: Layers) -> dict[str, np.ndarray]:
    """Return the singular values over the first for each kind of layer: 10th, 50th and 90th percentile, (3, r).

    Layers without a gradient have no spectrum to scale and are left out.
    """
    kinds: dict[str, list[list[float]]] = {}
    for name, values in layers.items():
        if values["singular_values"][0] > 0:
            kinds.setdefault(kind_of(name), []).append(values["singular_values"])
    spectra = {}
    for kind, rows in sorted(kinds.items()):
        shortest = min(map(len, rows))
        ratios = [np.divide(row[:shortest], row[0]) for row in rows]
        spectra[kind] = np.percentile(ratios, [10, 50, 90], axis=0)
    return spectra


def _loss(axes: Axes, curve: Sequence[tuple[int, float]]) -> None:
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


def _validation(path: Path, curves: Curves, metrics: Mapping[str, Mapping[str, float]]) -> None:
    """Draw each score in a panel of its own: before training, meanwhile, and at the end."""
    names = main_scores(metrics.values())
    rows, columns = -(-len(names) // _COLUMNS), min(len(names), _COLUMNS)
    size = (max(_SIZE[0], 3.6 * columns), _SIZE[1] if rows == 1 else 3.0 * rows)
    with panels(path, size, rows, columns) as every:
        every[0].figure.suptitle("Validation scores")
        for axes, name in zip(every, names, strict=False):
            _score(axes, name, curves, metrics)
        for axes in every[len(names) :]:
            axes.set_axis_off()


def _score(
    axes: Axes, name: str, curves: Curves, metrics: Mapping[str, Mapping[str, float]]
) -> None:
    curve = curves.get(f"val/{name}", [])
    if curve:
        axes.plot(*np.array(curve).T, "o-", label="during training")
    # Steps are logged from 0 on: the model after the last of them stands one further.
    last = max((step for step, _ in [*curves.get("train/loss", []), *curve]), default=-1) + 1
    marks = {"zero_shot": (0, "s", "0.5"), "after_init": (0, "D", "C1"), "final": (last, "*", "C2")}
    for moment, scores in metrics.items():
        if name in scores:
            step, marker, color = marks[moment]
            label = f"{moment.replace('_', ' ')}: {scores[name]:.3f}"
            axes.plot(step, scores[name], marker, color=color, markersize=10, label=label)
    label = "loss (nats per token)" if name == "loss" else name
    axes.set(xlabel="optimizer step", ylabel=label)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)


def _spectrum(axes: Axes, layers: Layers) -> None:
    for kind, (low, median, high) in median_spectra(layers).items():
        index = np.arange(1, len(median) + 1)
        [line] = axes.plot(index, median, "o-", markersize=3, label=kind)
        axes.fill_between(index, np.maximum(low, 1e-12), high, color=line.get_color(), alpha=0.1)
    axes.set(
        xlabel="i",
        ylabel="singular value i / singular value 1",
        yscale="log",
        title="Spectrum of the one-step gradient (median and 10-90 % of layers)",
    )
    axes.grid(alpha=0.3)
    axes.legend(ncols=2, fontsize=8)


def _energy(path: Path, layers: Layers) -> None:
    kinds: dict[str, list[float]] = {}
    for name, values in layers.items():
        kinds.setdefault(kind_of(name), []).append(values["captured_energy"])
    depth = max(map(len, kinds.values()))
    grid = np.array([row + [np.nan] * (depth - len(row)) for row in kinds.values()])
    with panels(path, (max(6.4, 0.22 * depth + 2.4), 0.35 * len(kinds) + 1.8)) as [axes]:
        image = axes.imshow(grid, aspect="auto", vmax=1.0, cmap="viridis")
        axes.set_yticks(range(len(kinds)), list(kinds))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set(xlabel="layer of that kind, in order", title="Gradient energy captured by rank r")
        axes.figure.colorbar(image, ax=axes, label="|G_r|² / |G|²")
