"""Draw pictures."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

from app.theory.picture import Curve, Picture

# Okabe and Ito's colours, told apart with any colour vision; line styles tell them apart in grey.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
STYLES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 1)))
MARKERS = ("o", "s", "^", "D", "v", "P")


def draw(picture: Picture, folder: Path) -> Path:
    """Write `folder`/NAME.png: panels beside each other, one legend below all of them."""
    panels = picture.panels
    labels = list(dict.fromkeys(c.label for c in picture.curves if c.kind != "bound"))
    bounds = list(dict.fromkeys(c.label for c in picture.curves if c.kind == "bound"))
    figure, grid = plt.subplots(
        1,
        len(panels),
        figsize=(max(5.6, 3.4 * len(panels)), 4.2),
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    handles = {}
    for axes, panel in zip(grid[0], panels, strict=True):
        for curve in picture.curves:
            if curve.panel == panel:
                place = (bounds if curve.kind == "bound" else labels).index(curve.label)
                handles[curve.label] = _plot(axes, curve, place)
        axes.set(title=panel, xscale=picture.x.scale, yscale=picture.y.scale)
        axes.title.set_fontsize(10)
        axes.set_xlabel(picture.x.label)
        axes.set_xlim(left=picture.x.low)
        axes.set_ylim(bottom=picture.y.low)
        axes.grid(alpha=0.3)
    grid[0][0].set_ylabel(picture.y.label)
    figure.suptitle(picture.title, fontsize=11)
    figure.legend(
        handles.values(),
        handles.keys(),
        loc="outside lower center",
        ncols=min(3 if len(panels) > 1 else 2, len(handles)),
        fontsize=8,
    )
    path = folder / f"{picture.name}.png"
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def _plot(axes: Axes, curve: Curve, place: int) -> object:
    x, y = np.asarray(curve.x, float), np.asarray(curve.y, float)
    if curve.kind == "bound":
        dashes = ((0, (4, 2)), (0, (1, 1.5)), (0, (6, 2, 1, 2)))[place % 3]
        return axes.plot(x, y, color="black", linewidth=1.2, linestyle=dashes, zorder=3)[0]
    color = COLORS[place % len(COLORS)]
    if curve.kind == "points":
        marker = MARKERS[place % len(MARKERS)]
        return axes.plot(x, y, marker, color=color, markersize=5, alpha=0.8, linestyle="none")[0]
    style = STYLES[place % len(STYLES)]
    marker = MARKERS[place % len(MARKERS)] if len(x) <= 12 else None
    return axes.plot(x, y, color=color, linestyle=style, marker=marker, markersize=5)[0]
