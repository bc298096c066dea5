"""How a figure is drawn."""

import matplotlib.pyplot as plt
import pytest

from app.commands.theory import figures
from app.commands.theory.figures import Axis, Curve, Picture


@pytest.fixture
def drawn(tmp_path, monkeypatch):
    """Return `drawn(curves, y)`: the figure that was written, before it is closed."""
    kept = []

    def run(curves, y=Axis("y")):  # noqa: B008 (frozen)
        with monkeypatch.context() as patch:
            patch.setattr(figures.plt, "close", kept.append)
            path = figures.draw(Picture("name", "Title", Axis("x"), y, curves), tmp_path)
        assert path == tmp_path / "name.png"
        assert path.read_bytes().startswith(b"\x89PNG")
        return kept[0]

    yield run
    for figure in kept:
        plt.close(figure)


def test_panels_curves_and_legend(drawn):
    """Panels with their titles, curves with their numbers, one legend entry for a name."""
    curves = [
        Curve("kappa = 1", "LoRA", [0, 1], [1.0, 0.5]),
        Curve("kappa = 2", "LoRA", [0, 1], [1.0, 0.25]),
        Curve("kappa = 2", "Delta", [0, 1], [2.0, 2.0], kind="bound"),
        Curve("kappa = 2", "mark", [0], [1e-9], kind="points"),
    ]
    figure = drawn(curves, Axis("loss", "log", 1e-3))
    one, two = figure.axes
    assert (one.get_title(), two.get_title()) == ("κ = 1", "κ = 2")
    assert [list(line.get_ydata()) for line in two.lines] == [[1, 0.25], [2, 2], [1e-9]]
    assert one.lines[0].get_color() == two.lines[0].get_color() != two.lines[1].get_color()
    assert one.get_yscale() == "log"
    assert one.get_ylim()[0] == two.get_ylim()[0] == 1e-3
    [legend] = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["LoRA", "Δ", "mark"]


def test_a_picture_of_nothing_is_drawn(drawn):
    """Where no descent arrives there is no step to show, on whatever scale."""
    drawn([Curve("panel", "LoRA", [1, 2], [float("nan")] * 2)], Axis("steps", "log", 1))


@pytest.mark.parametrize("many", [2, 6, 15])
def test_the_legend_is_inside_the_figure(many, drawn):
    labels = [f"{i} curves of some method" * (i % 3) for i in range(many)]
    figure = drawn([Curve("panel", label, [0, 1], [1, 2]) for label in labels])
    box, [legend] = figure.bbox, figure.legends
    inside = legend.get_window_extent()
    assert box.x0 <= inside.x0 < inside.x1 <= box.x1
    assert box.y0 <= inside.y0 < inside.y1 < figure.axes[0].get_window_extent().y0
