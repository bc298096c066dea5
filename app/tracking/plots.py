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
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    try:
        yield list(axes.flat)
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
    first, last = (np.mean(part) for part in (values[:window], values[-window:]))
    title = f"Training loss {_change(first, last)}"
    axes.set(xlabel="optimizer step", ylabel="training loss (nats per token)", title=title)
    axes.set_ylim(0, 1.05 * max(values))
    axes.grid(alpha=0.3)


def _validation(path: Path, curves: Curves, metrics: Mapping[str, Mapping[str, float]]) -> None:
    """Draw each score in a panel of its own: before training, meanwhile, and at the end."""
    names = main_scores(metrics.values())
    rows, columns = -(-len(names) // _COLUMNS), min(len(names), _COLUMNS)
    size = (max(_SIZE[0], 3.6 * columns), 4.6 if rows == 1 else 3.9 * rows)
    with panels(path, size, rows, columns) as every:
        every[0].figure.suptitle("Validation scores: before, during and after training")
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
            # At the edge of the panel the whole marker is to be seen.
            look: dict[str, Any] = {"color": color, "markersize": 9, "clip_on": False, "zorder": 3}
            axes.plot(step, scores[name], marker, label=label, **look)
    label = "loss (nats per token)" if name == "loss" else name
    before, after = (metrics.get(moment, {}).get(name) for moment in ("zero_shot", "final"))
    title = name if before is None or after is None else f"{name} {_change(before, after)}"
    axes.set(xlabel="optimizer step", ylabel=label)
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.3)
    # Below the axes, where it covers nothing.
    axes.legend(fontsize=7, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.2), frameon=False)


def _change(first: float, last: float) -> str:
    """Say how a value has changed, in three digits, such as `falls from 8.38 to 0.172`."""
    before, after = f"{first:#.3g}", f"{last:#.3g}"
    if before == after:
        return f"stays at {after}"
    return f"{'falls' if last < first else 'rises'} from {before} to {after}"


def _spectrum(axes: Axes, layers: Layers) -> None:
    spectra = median_spectra(layers)
    for kind, (low, median, high) in spectra.items():
        index = np.arange(1, len(median) + 1)
        [line] = axes.plot(index, median, "o-", markersize=3, label=kind)
        axes.fill_between(index, np.maximum(low, 1e-12), high, color=line.get_color(), alpha=0.1)
    axes.set(
        xlabel="i (median and 10-90 % of the layers of a kind)",
        ylabel="singular value i / singular value 1",
        yscale="log",
    )
    axes.set_title(_fall(spectra), fontsize=10)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    if spectra:
        axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)


def _fall(spectra: Mapping[str, np.ndarray]) -> str:
    """Say how far the last singular value that is kept lies below the first."""
    title = "Singular values of the one-step gradient"
    if not spectra:
        return f"{title}: all layers' are 0"
    last = {kind: median[-1] for kind, (_, median, _) in spectra.items()}
    slow, steep = max(last, key=last.__getitem__), min(last, key=last.__getitem__)
    if slow == steep:
        return f"{title}:\nthe last kept is {last[slow]:.2g} of the first"
    return f"{title}:\nthe last kept is {last[slow]:.2g} ({slow}) to {last[steep]:.2g} ({steep}) of the first"


def _energy(path: Path, layers: Layers) -> None:
    kinds: dict[str, list[float]] = {}
    for name, values in layers.items():
        kinds.setdefault(kind_of(name), []).append(values["captured_energy"])
    depth = max(map(len, kinds.values()))
    every = [value for row in kinds.values() for value in row]
    title = f"Rank r holds {np.mean(every):.1%} of the gradient's energy on average, {min(every):.1%} at least"
    grid = np.array([row + [np.nan] * (depth - len(row)) for row in kinds.values()])
    with panels(path, (max(6.4, 0.22 * depth + 2.4), 0.35 * len(kinds) + 1.8)) as [axes]:
        image = axes.imshow(grid, aspect="auto", vmax=1.0, cmap="viridis")
        axes.set_yticks(range(len(kinds)), list(kinds))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set(xlabel="layer of that kind, in order", ylabel="kind of layer")
        axes.set_title(title, fontsize=10)
        axes.figure.colorbar(image, ax=axes, label="|G_r|² / |G|²")
