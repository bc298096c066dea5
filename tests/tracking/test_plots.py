"""Pictures of a run: which ones there are, and that something is drawn in them."""

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
