"""What the plots show, against numpy; heat maps are those of the run folders."""

import numpy as np
import pytest
import yaml

from app.commands.compare import figures
from app.commands.compare.collect import collect
from app.commands.compare.selection import by_rank, comparisons
from tests.support.report_runs import RATES, SCORES


def test_curves(runs):
    [comparison] = comparisons(collect([runs]))
    ours, lora = (list(own.run) for _, own in comparison.chosen.groupby("method"))
    run = next(run for run in ours if run.seed == 1)
    loss = figures.run_curve(run, "loss", "steps")
    np.testing.assert_allclose(loss, [(i + 1, 1 / (2 + i)) for i in range(4)])
    # Two seconds and one for the seed to initialize, 0.6 for a step.
    seconds = [3 + 0.6 * (i + 1) for i in range(4)]
    assert figures.run_curve(run, "loss", "seconds")[:, 0] == pytest.approx(seconds)
    accuracy = figures.run_curve(run, "accuracy", "steps")
    np.testing.assert_allclose(accuracy, [(0, 0.55), (2, 0.61), (4, 0.92)])
    assert figures.run_curve(run, "accuracy", "seconds")[:, 0] == pytest.approx([3, 4.2, 5.4])
    x, mean, std = figures.mean_curve(lora, "loss", "steps")
    table = np.array([[1 / (1 + i + seed) for i in range(4)] for seed in range(3)])
    assert x == pytest.approx([1, 2, 3, 4])
    assert mean == pytest.approx(table.mean(axis=0))
    assert std == pytest.approx(table.std(axis=0, ddof=1))


@pytest.fixture
def drawn(monkeypatch):
    """Return the points of each plot that is drawn with error bars, by its name and the method's label."""
    drawn = {}

    def watched(name, title, figure, axes):
        handles, labels = axes.get_legend_handles_labels()
        drawn[name] = {
            label: np.asarray(bars.lines[0].get_data())
            for bars, label in zip(handles, labels, strict=True)
            if hasattr(bars, "lines")
        }
        figures.plt.close(figure)
        return figures.Plot(name, title, b"")

    monkeypatch.setattr(figures, "_finish", watched)
    return drawn


def test_the_curves_over_learning_rates(runs, drawn):
    figures.comparison_plots(comparisons(collect([runs]))[0])
    for i, split in enumerate(("validation", "test")):
        for method, by_rate in SCORES.items():
            x, y = drawn[f"learning_rate_{split}"][method]
            assert tuple(x) == RATES
            means = [100 * np.mean([scores[i] for scores in by_rate[rate]]) for rate in RATES]
            assert y.tolist() == pytest.approx(means)


@pytest.mark.parametrize("sign", [1, -1])
def test_far_worse_means_leave_the_axis(sign):
    _, axes = figures.plt.subplots()
    near = [1.0, 1.1, 1.1, 1.2, 1.2, 1.2, 1.4]
    assert figures._show_best(axes, [sign * mean for mean in near], sign > 0) == ""
    far = [sign * mean for mean in [*near, 9.0]]
    axes.plot(far)
    assert figures._show_best(axes, far, sign > 0) == "; beyond the axis: 2 means"
    low, high = sorted(sign * end for end in axes.get_ylim())
    assert low < 1.0
    assert high == pytest.approx(1 + 1.5 * (np.quantile([*near, 9.0], 0.75) - 1))
    assert figures._show_best(axes, [], True) == figures._show_best(axes, [1.0], True) == ""
    figures.plt.close()


def test_there_is_no_half_step(runs, monkeypatch):
    ticks = {}

    def watched(name, title, figure, axes):
        ticks[name] = axes.get_xticks()
        figures.plt.close(figure)
        return figures.Plot(name, title, b"")

    monkeypatch.setattr(figures, "_finish", watched)
    figures.comparison_plots(comparisons(collect([runs]))[0])
    for name in ("loss_over_steps", "accuracy_over_steps"):
        assert len(ticks[name]) > 2
        assert not any(ticks[name] % 1), ticks[name]


def test_the_curves_over_ranks(ranks, drawn):
    parts = by_rank(comparisons(collect([ranks]))[0])
    assert figures.rank_plot(parts).title == "Test accuracy by rank"
    wanted = {"lora": (56.0, 65.5), "lora_one": (66.0, 75.5), "full": (55.0, 55.0)}
    for method, values in wanted.items():
        x, y = drawn["rank"][method]
        assert x.tolist() == [8, 64]
        assert y.tolist() == pytest.approx(values)
    names = [plot.name for part in parts for plot in figures.comparison_plots(part)]
    assert len(set(names)) == len(names)
    assert {name.rpartition("_")[2] for name in names} == {"r8", "r64"}


@pytest.mark.parametrize("name", ["alignment", "inside"])  # of this version and of earlier ones
def test_heat_maps_of_the_best_rates_first_seed(name, runs):
    assert figures.alignment_plots(comparisons(collect([runs]))[0]) == []
    drawn = {}
    for config in runs.rglob("config.yaml"):
        for measure in ("angle_A", "captured", "norm"):
            png = f"{config.parent} {measure}".encode()
            (config.parent / f"{name}_{measure}.png").write_bytes(png)
            drawn[png] = yaml.safe_load(config.read_text()), measure
    plots = figures.alignment_plots(comparisons(collect([runs]))[0])
    kinds = ("angle_A", "captured")
    wanted = [f"alignment_{method}_{kind}" for method in ("lora_one", "lora") for kind in kinds]
    assert [plot.name for plot in plots] == wanted
    for plot in plots:
        config, measure = drawn[plot.png]
        assert config["seed_everything"] == 0
        best = 1e-3 if config["model"]["method"] == "lora_one" else 1e-2
        assert config["model"]["optimizer"]["init_args"]["lr"] == best
        assert plot.name == f"alignment_{config['model']['method']}_{measure}"
    assert plots[0].title.startswith("lora_one: Angle between lora_A")
