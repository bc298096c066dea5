"""Pictures of a run: which ones there are, and that something is drawn in them."""

import numpy as np
import pytest
from matplotlib import pyplot

from app.tracking import plots
from tests.support.pictures import check_picture


def test_a_run_without_gradient_pass_has_no_spectrum(tmp_path):
    metrics = {"zero_shot": {"accuracy": 0.5}, "final": {"accuracy": 1.0}}
    written = plots.write_plots(tmp_path, {"train/loss": [(0, 1.0), (1, 0.5)]}, metrics, {})
    assert [path.name for path in written] == ["loss.png", "validation.png"]
    assert plots.write_plots(tmp_path, {}, {}, {}) == []


def test_scores_of_any_name_get_a_panel(tmp_path, monkeypatch):
    """A run on free answers has no accuracy, but a loss and what its benchmarks score."""
    drawn = []
    original = plots._score
    monkeypatch.setattr(
        plots, "_score", lambda axes, name, *rest: (drawn.append(name), original(axes, name, *rest))
    )
    scores = {"gsm8k/strict": 0.1, "gsm8k/flexible": 0.2, "mmlu/anatomy/accuracy": 0.3, "loss": 1.0}
    metrics = {"zero_shot": scores, "final": scores}
    [written] = plots.write_plots(tmp_path, {"val/loss": [(3, 1.1)]}, metrics, {})
    assert drawn == ["loss", "gsm8k/strict", "gsm8k/flexible"]
    assert written.stat().st_size > 0


def test_many_layers_of_different_width_and_long_curves(tmp_path):
    layers = {
        f"layers.{i}.{kind}_proj": {"singular_values": [1.0, 0.1, 0.05], "captured_energy": i / 80}
        for i in range(80)
        for kind in ("q", "k", "v", "o", "gate", "up")
    }
    layers["layers.0.down_proj"] = {"singular_values": [4.0, 1.0], "captured_energy": 0.8}
    layers["layers.1.down_proj"] = {"singular_values": [0.0, 0.0], "captured_energy": 0.0}
    curve = [(step, 1 / (1 + step)) for step in range(2000)]
    metrics = {"final": {"accuracy": 0.9}}
    written = plots.write_plots(tmp_path, {"train/loss": curve}, metrics, layers)
    assert {path.name for path in written} >= {"loss.png", "spectrum.png", "captured_energy.png"}
    for path in written:
        assert check_picture(path).shape[1] < 4000


@pytest.fixture
def drawn(monkeypatch):
    """Return a list of the figures that are drawn, which stay open until the test ends."""
    figures = []
    monkeypatch.setattr(pyplot, "close", figures.append)
    yield figures
    monkeypatch.undo()
    pyplot.close("all")


def test_titles_say_how_values_change(tmp_path, drawn):
    moments = {"zero_shot": 8.3773, "after_init": 0.8245, "final": 0.1724}
    metrics = {name: {"loss": value, "mcc": 0.0} for name, value in moments.items()}
    layer = {"singular_values": [4.0, 1.0, 0.5], "captured_energy": 0.5}
    layers = {"0.q_proj": layer, "1.q_proj": {**layer, "captured_energy": 1.0}}
    curves = {"train/loss": [(0, 2.0), (1, 1.0)], "val/mcc": [(1, 0.0)]}
    plots.write_plots(tmp_path, curves, metrics, layers)
    titles = [axes.get_title() for figure in drawn for axes in figure.axes]
    assert titles == [
        "Training loss falls from 2.00 to 1.00",
        "mcc stays at 0.00",
        "loss falls from 8.38 to 0.172",
        "Singular values of the one-step gradient:\nthe last kept is 0.12 of the first",
        "Rank r holds 75.0% of the gradient's energy on average, 50.0% at least",
        "",  # of the colour bar
    ]
    named = [(axes.get_xlabel(), axes.get_ylabel()) for figure in drawn for axes in figure.axes]
    assert all(x and y for x, y in named[:-1])


def test_no_legend_covers_a_marker(tmp_path, drawn):
    scores = dict.fromkeys(("accuracy", "f1", "mcc", "loss", "task_loss"), 0.5)
    metrics = dict.fromkeys(("zero_shot", "after_init", "final"), scores)
    curves = {"train/loss": [(i, 1.0) for i in range(30)]}
    curves |= {f"val/{name}": [(i, 0.5) for i in range(0, 30, 5)] for name in scores}
    plots.write_plots(tmp_path, curves, metrics, {})
    panels = [axes for axes in drawn[1].axes if axes.get_legend()]
    assert len(panels) == 5
    for axes in panels:
        box = axes.get_legend().get_window_extent()
        points = [axes.transData.transform(np.transpose(line.get_data())) for line in axes.lines]
        assert not any(box.contains(x, y) for x, y in np.concatenate(points))
        assert box.y1 < axes.get_window_extent().y0
        assert drawn[1].bbox.y0 <= box.y0
