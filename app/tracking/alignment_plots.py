"""Heat maps over layers and steps of what `callbacks.alignment_monitor` has measured."""

import csv
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import LogNorm, Normalize

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
    with table.open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    layers = list(dict.fromkeys(row["layer"] for row in rows))
    kinds = list(dict.fromkeys(name.rpartition(".")[2] for name in layers))
    layers.sort(key=lambda name: kinds.index(name.rpartition(".")[2]))  # stable: depth stays
    steps = sorted({int(row["step"]) for row in rows})
    line = {name: i for i, name in enumerate(layers)}
    column = {step: i for i, step in enumerate(steps)}
    written = []
    for measure, (title, unit) in MAPS.items():
        grid = np.full((len(layers), len(steps)), np.nan)
        for row in rows:
            grid[line[row["layer"]], column[int(row["step"])]] = float(row[measure])
        path = folder / f"alignment_{measure}.png"
        _draw(path, np.where(np.isfinite(grid), grid, np.nan), layers, steps, title, unit)
        written.append(path)
    return written


def _draw(
    path: Path, grid: np.ndarray, layers: list[str], steps: list[int], title: str, unit: str
) -> None:
    finite = grid[np.isfinite(grid)]
    spread = finite.size > 0 and finite.min() > 0 and finite.max() > 30 * finite.min()
    # Conditions and norms span decades.
    norm: Normalize | None = LogNorm(finite.min(), finite.max()) if spread else None
    if unit == "degrees":
        norm = Normalize(0, 90)
    if unit == "share":
        norm = Normalize(0, 1)
    height = min(12.0, max(2.8, 0.035 * len(layers) + 1.6))
    figure, axes = plt.subplots(figsize=(min(12.0, max(6.4, 0.25 * len(steps) + 2.4)), height))
    colors = plt.get_cmap("viridis").copy()
    colors.set_bad("0.85")
    image = axes.imshow(grid, aspect="auto", interpolation="nearest", cmap=colors, norm=norm)
    figure.colorbar(image, ax=axes, label=unit)
    kinds = [name.rpartition(".")[2] for name in layers]
    starts = [i for i, kind in enumerate(kinds) if i == 0 or kinds[i - 1] != kind]
    ends = [*starts[1:], len(layers)]
    axes.set_yticks(
        [(s + e - 1) / 2 for s, e in zip(starts, ends, strict=True)], [kinds[s] for s in starts]
    )
    for start in starts[1:]:
        axes.axhline(start - 0.5, color="white", linewidth=0.8)
    shown = np.unique(np.linspace(0, len(steps) - 1, min(len(steps), 9)).round().astype(int))
    axes.set_xticks(shown, [str(steps[i]) for i in shown])
    axes.set(xlabel="optimizer step", title=title)
    axes.title.set_fontsize(11)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)
