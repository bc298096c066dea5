"""The plot of the differences to a reference, with their intervals."""

import io

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import MaxNLocator

from app.commands.compare.differences import SHOWN_NOT, Differences
from app.commands.compare.figures import COLORS, Plot

WIDTH, LINE, MARGIN = 8.0, 0.28, 1.1  # inches: of the figure, of a method, of title and axis
LOOKS = {"better": COLORS[0], "worse": COLORS[1], SHOWN_NOT: "#777777"}


def differences_plot(differences: Differences) -> Plot | None:
    """Draw each method's difference and interval on a line of its own, a panel a score; None without any."""
    if not differences.found:
        return None
    methods = list(dict.fromkeys(each.method for each in differences.found))
    scores = differences.scores
    size = (WIDTH, MARGIN + LINE * len(methods))
    figure, panels = plt.subplots(
        1, len(scores), sharey=True, squeeze=False, figsize=size, layout="constrained"
    )
    for axes, score in zip(panels[0], scores, strict=True):
        for each in (each for each in differences.found if each.score == score):
            middle, low, high = score.factor * np.array(each.interval)
            line, color = methods.index(each.method), LOOKS[each.verdict]
            axes.plot([low, high], [line, line], color=color, linewidth=2)
            axes.plot([middle], [line], "o", color=color, markersize=5)
        axes.axvline(0, color="black", linewidth=0.8)
        unit = "points, " if score.is_fraction else ""
        unit += "less is better" if score.less_is_better else "more is better"
        axes.set_xlabel(f"{differences.of} {score} ({unit})")
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.grid(axis="x", alpha=0.3)
    panels[0, 0].set_yticks(range(len(methods)), methods)
    panels[0, 0].set_ylim(len(methods) - 0.5, -0.5)
    rank = "" if differences.rank is None else f", rank {differences.rank}"
    title = f"Difference to {differences.reference}, with its 95 % interval{rank}"
    figure.suptitle(title, fontsize=11)
    stream = io.BytesIO()
    figure.savefig(stream, dpi=150)
    plt.close(figure)
    ending = "" if differences.rank is None else f"_r{differences.rank}"
    return Plot(f"differences{ending}", title, stream.getvalue())
