"""Draw heat maps over layers and steps of what `callbacks.alignment_monitor` has measured."""

from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, Normalize

from app.tracking.plots import kind_of, panels

if TYPE_CHECKING:
    import pandas as pd

MAPS = {
    "angle_A": ("Angle between lora_A and the one-step gradient, input side", "degrees"),
    "angle_B": ("Angle between lora_B and the one-step gradient, output side", "degrees"),
    "captured": ("Energy of the one-step gradient inside both factors' spans", "share"),
    "norm": ("Frobenius norm of scaling · lora_B lora_A", "norm"),
    "effective_rank": ("Effective rank of lora_B lora_A", "rank"),
    "condition_A": ("Condition of lora_A lora_Aᵀ", "condition number"),
    "condition_B": ("Condition of lora_Bᵀ lora_B", "condition number"),
}
"""Title and unit of each measure."""


def write_heat_maps(table: Path, folder: Path) -> list[Path]:
    """Draw a heat map for each measure.

    Layers of one kind (q_proj, ...) stand together, the first block on top; a cell without a value (the
    span of a zero factor) is grey.

    Args:
        table: `alignment.csv`.
        folder: Where `alignment_MEASURE.png` go.

    Returns:
        The files written.
    """
    import pandas as pd  # slow, and of no use to a run without AlignmentMonitor

    rows = pd.read_csv(table)
    names = pd.Series(rows["layer"].unique())
    kinds = pd.factorize(names.map(kind_of))[0]
    layers = names[np.argsort(kinds, kind="stable")]  # within a kind by depth
    written = []
    for measure in MAPS:
        grid = rows.pivot_table(measure, "layer", "step", aggfunc="last", dropna=False)
        path = folder / f"alignment_{measure}.png"
        height = min(12.0, max(2.8, 0.035 * len(layers) + 1.6))
        width = min(12.0, max(6.4, 0.25 * grid.shape[1] + 2.4))
        with panels(path, (width, height)) as [axes]:
            _draw(axes, grid.loc[layers].where(np.isfinite), measure)
        written.append(path)
    return written


def _draw(axes: Axes, grid: "pd.DataFrame", measure: str) -> None:
    title, unit = MAPS[measure]
    ends = [grid[step].median() for step in (grid.columns[0], grid.columns[-1])]
    known = [f"{median:.3g}" for median in ends if np.isfinite(median)]
    medians = f"median over layers {' to '.join(known)}" if known else "no layer has a value"
    low, high = grid.min().min(), grid.max().max()  # without the cells that have no value
    # Conditions and norms span decades.
    norm: Normalize | None = LogNorm(low, high) if 0 < 30 * low < high else None
    if unit == "degrees":
        norm = Normalize(0, 90)
    if unit == "share":
        norm = Normalize(0, 1)
    colors = plt.get_cmap("viridis").with_extremes(bad="0.85")
    image = axes.imshow(grid, aspect="auto", interpolation="nearest", cmap=colors, norm=norm)
    axes.figure.colorbar(image, ax=axes, label=unit)
    kinds = [kind_of(name) for name in grid.index]
    first = {kind: kinds.index(kind) for kind in kinds}
    axes.set_yticks([i + (kinds.count(kind) - 1) / 2 for kind, i in first.items()], list(first))
    for i in list(first.values())[1:]:
        axes.axhline(i - 0.5, color="white", linewidth=0.8)
    shown = np.unique(np.linspace(0, grid.shape[1] - 1, min(grid.shape[1], 9)).round().astype(int))
    axes.set_xticks(shown, [str(grid.columns[i]) for i in shown])
    axes.set(xlabel="optimizer step", ylabel="layers by kind, the first block on top")
    axes.yaxis.label.set_fontsize(8)
    axes.set_title(f"{title}\n{medians}", fontsize=10)
