"""What a figure shows, before it is drawn: curves in panels."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

Scale = Literal["linear", "log"]


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
    """An axis: its label with the unit, and its scale."""

    label: str
    scale: Scale = "linear"
    low: float | None = None
    """Where it begins at the lowest; None begins at the data."""


@dataclass(frozen=True)
class Picture:
    """One figure; its panels stand beside each other in the order of their first curves."""

    name: str
    title: str
    x: Axis
    y: Axis
    curves: list[Curve]
    share_y: bool = True
    """Whether all panels have the same y axis."""

    @property
    def panels(self) -> list[str]:
        """Return the titles of the panels."""
        return list(dict.fromkeys(curve.panel for curve in self.curves))

    def rows(self) -> Iterator[tuple[str, str, str, float, float]]:
        """Yield (picture, panel, curve, x, y) of every point."""
        for curve in self.curves:
            for x, y in zip(curve.x, curve.y, strict=True):
                yield self.name, curve.panel, curve.label, float(x), float(y)
