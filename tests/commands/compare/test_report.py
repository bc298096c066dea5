"""`python train.py report`: means, choices and pictures of hand-made runs, against numpy and a browser."""

import base64
import html.parser
import io
import json
import os
import re
import shutil
import subprocess

import matplotlib.image
import numpy as np
import pytest
import yaml

from app.commands.compare.collect import collect
from app.commands.compare.figures import mean_curve, run_curve
from app.commands.compare.selection import comparisons
from app.commands.compare.settings import method_settings
from tests.support.report_runs import SCORES, change, grid_run, plan, rows_of, write_run


def test_the_tables_numbers(report, runs, tmp_path, capsys):
    assert report(runs) == 0
    printed = capsys.readouterr().out
    [ours, lora] = rows_of(tmp_path / "out" / "table.csv")
    assert (ours["method"], lora["method"]) == ("lora_one", "lora")  # by test score
    for row, rate in ((ours, 1e-3), (lora, 1e-2)):
        values = 100 * np.array(SCORES[row["method"]][rate])
        mean, std = values.mean(axis=0), values.std(axis=0, ddof=1)
        assert row["validation accuracy, %"] == f"{mean[0]:.2f} ± {std[0]:.2f}"
        assert row["test accuracy, %"] == f"{mean[1]:.2f} ± {std[1]:.2f}"
        assert row["test accuracy, %"] in printed
        assert row["seeds"] == "3"
        assert row["trained parameters"] == "1,234"
        assert row["step, ms"] == f"{1000 * np.mean([0.5, 0.6, 0.7]):.0f}"
        assert row["training, s"] == f"{np.mean([2.0, 2.4, 2.8]):.0f}"
    assert (ours["learning rate"], lora["learning rate"]) == ("1e-3", "1e-2 †")
    assert "At the edge of the rates tried" in printed
    assert "lora (the highest rate tried)" in printed
    assert (ours["initialization, s"], lora["initialization, s"]) == ("3.0", "0.0")
    assert (ours["peak memory, GiB"], lora["peak memory, GiB"]) == ("5.00", "3.00")
    text = (tmp_path / "out" / "report.md").read_text()
    for rate, cell in ((1e-4, "{}"), (1e-3, "**{}**"), (1e-2, "{}")):
        values = 100 * np.array(SCORES["lora_one"][rate])
        mean, std = values.mean(axis=0), values.std(axis=0, ddof=1)
        for i in range(2):  # the whole curve, on validation and on test
            assert f"| {cell.format(f'{mean[i]:.2f} ± {std[i]:.2f}')} |" in text
    assert len(rows_of(tmp_path / "out" / "runs.csv")) == 18


def test_heat_maps_of_the_best_rates_first_seed(report, runs, tmp_path):
    assert report(runs) == 0
    assert "Alignment" not in (tmp_path / "out" / "report.md").read_text()
    drawn = {}
    for config in runs.rglob("config.yaml"):
        for measure in ("angle_A", "captured", "norm"):
            png = f"{config.parent} {measure}".encode()
            (config.parent / f"alignment_{measure}.png").write_bytes(png)
            drawn[png] = yaml.safe_load(config.read_text())
    assert report(runs) == 0
    out = tmp_path / "out"
    names = sorted(path.name for path in out.glob("alignment_*.png"))
    methods = ("lora", "lora_one")
    assert names == [
        f"alignment_{m}_{kind}.png" for m in methods for kind in ("angle_A", "captured")
    ]
    for name in names:
        shown = drawn[(out / name).read_bytes()]
        assert shown["seed_everything"] == 0
        best = 1e-3 if shown["model"]["method"] == "lora_one" else 1e-2
        assert shown["model"]["optimizer"]["init_args"]["lr"] == best
        assert f"alignment_{shown['model']['method']}_" in name
        assert f"({name})" in (out / "report.md").read_text()
    assert "lora_one: Angle between lora_A" in (out / "report.html").read_text()


def test_another_score(report, runs, tmp_path, capsys):
    assert report(runs, "--score", "loss") == 0
    [ours, _] = rows_of(tmp_path / "out" / "table.csv")
    values = [1 - test for _, test in SCORES["lora_one"][1e-3]]
    assert ours["test loss"] == f"{np.mean(values):.4f} ± {np.std(values, ddof=1):.4f}"
    assert report(runs, "--score", "bleu") == 2
    assert "'bleu', which no run has: expected one of accuracy, loss" in capsys.readouterr().err


def test_a_benchmark_is_reported_and_chosen_by_the_loss(tmp_path):
    """Questions of a benchmark are those of the reported set, so that the rows' loss chooses."""
    for rate, loss, score in ((1e-3, 0.4, 0.2), (1e-2, 0.5, 0.9)):
        folder = tmp_path / f"{rate}" / "version_0"
        write_run(folder, rate=rate)
        told = json.loads((folder / "summary.json").read_text())
        told["metrics"] = {
            "final": {"loss": loss, "gsm8k/strict": score},
            "test": {"gsm8k/strict": score},
        }
        (folder / "summary.json").write_text(json.dumps(told))
    [task] = comparisons(collect([tmp_path]))
    assert (task.score, task.selected_by) == ("gsm8k/strict", "loss")
    [method] = task.methods
    means = method.rates.xs("mean", axis=1, level=1).loc[method.best]
    assert (method.best, *means) == (1e-3, 0.4, 0.2)


def test_lost_runs_are_no_best_and_are_told(report, runs, tmp_path, capsys):
    # The best rate of lora_one loses a seed; a method has nothing but failures.
    cells = [["lora_one", 1e-3, 3], ["pissa", 1e-3, 0], ["pissa", 1e-2, 0]]
    (runs / "compare.json").write_text(json.dumps({"task": {}, "cells": cells}))
    for name, diverged in (("lora_one-lr1e-3-seed3", True), ("pissa-lr1e-3-seed0", False)):
        (runs / "cells" / name).mkdir(parents=True)
        told = {"diverged": diverged, "message": f"why {name}"}
        (runs / "cells" / name / "failure.json").write_text(json.dumps(told))
    assert report(runs) == 0
    printed = capsys.readouterr().out
    rows = {row["method"]: row for row in rows_of(tmp_path / "out" / "table.csv")}
    assert rows["lora_one"]["learning rate"] == "1e-2 †"
    told = "not chosen, since a run failed or diverged there: lora_one at 1e-3 (91.00 ± 1.00)"
    assert told in printed
    assert rows["pissa"]["learning rate"] == "none without a lost run"
    assert "Preliminary: 18 of 21 runs are finished, 1 are not." in printed
    states = {row["state"] for row in rows_of(tmp_path / "out" / "runs.csv")}
    assert states == {"finished", "diverged", "failed", "missing"}
    text = (tmp_path / "out" / "report.md").read_text()
    assert "91.00 ± 1.00, 1 diverged" in text
    for told in ("why lora_one-lr1e-3-seed3", "why pissa-lr1e-3-seed0", "it was not run"):
        assert told in text
        assert told in printed


def test_half_a_grid_says_something(report, tmp_path, capsys):
    """Seed 0 is whole and seed 1 has begun: rates are chosen on seed 0, which all of them have."""
    grid = tmp_path / "grid"
    for method, best in (("lora", 1e-3), ("lora_one", 1e-4)):
        for rate in (1e-4, 1e-3):
            grid_run(grid, method, rate, 0, 0.9 if rate == best else 0.8, 0.7)
    grid_run(grid, "lora", 1e-4, 1, 0.99, 0.6)  # a seed that the other rate has not
    cells = [[m, r, s] for s in (0, 1) for r in (1e-4, 1e-3) for m in ("lora", "lora_one")]
    plan(grid, cells)
    assert report(grid) == 0
    printed = capsys.readouterr().out
    assert "Preliminary: 5 of 8 runs are finished, 3 are not." in printed
    rows = {row["method"]: row for row in rows_of(tmp_path / "out" / "table.csv")}
    assert rows["lora"]["learning rate"].startswith("1e-3")
    assert rows["lora"]["test accuracy, %"] == "70.00"
    assert rows["lora_one"]["learning rate"].startswith("1e-4")
    assert "Rates were chosen on the seeds that they share: lora (0)." in printed
    assert "run failed" not in printed


def test_unequal_seeds_are_told_and_choose_nothing(report, tmp_path, capsys):
    for seed in (0, 1, 2):
        grid_run(tmp_path / "runs", "lora", 1e-3, seed, 0.9, 0.5)
    grid_run(tmp_path / "runs", "lora", 1e-2, 0, 0.95, 0.6)
    grid_run(tmp_path / "runs", "pissa", 1e-2, 0, 0.8, 0.4)
    grid_run(tmp_path / "runs", "pissa", 1e-3, 1, 0.9, 0.4)
    grid_run(tmp_path / "runs", "pissa", 1e-3, 2, 0.9, 0.4)
    assert report(tmp_path / "runs") == 0
    printed = capsys.readouterr().out
    rows = {row["method"]: row for row in rows_of(tmp_path / "out" / "table.csv")}
    assert rows["lora"]["learning rate"] == "1e-2 †"  # better on seed 0, which both have
    assert rows["pissa"]["learning rate"] == "1e-3 †"  # no seed in common: that with more
    assert "The means are not over the same seeds: lora (0), pissa (1, 2)." in printed
    assert "lora (0), pissa (1, 2)." in printed.partition("chosen on the seeds")[2]


def test_scores_that_are_no_numbers_have_diverged(report, tmp_path, capsys):
    for rate, validation in ((1e-4, float("nan")), (1e-3, 0.9)):
        grid_run(tmp_path / "runs", "lora", rate, 0, validation, 0.7)
    assert report(tmp_path / "runs") == 0
    printed = capsys.readouterr().out
    [row] = rows_of(tmp_path / "out" / "table.csv")
    assert row["learning rate"] == "1e-3 †"
    assert "diverged: after training, the validation accuracy is nan" in printed


def test_lost_runs_of_others_change_no_choice(report, tmp_path, capsys):
    """An unfinished run of another task, and a failed one of another variant, at the best rate."""
    for rate, validation in ((1e-4, 0.8), (1e-3, 0.9), (1e-2, 0.7)):
        grid_run(tmp_path / "runs", "lora", rate, 0, validation, 0.7)
        grid_run(tmp_path / "more", "lora", rate, 0, validation, 0.7, r=64)
    other = {"validation_size": 100, "max_length": 64, "batch_size": 8}
    unfinished = grid_run(tmp_path / "runs" / "other", "lora", 1e-3, 0, data=other)
    (unfinished / "summary.json").unlink()
    config = tmp_path / "more" / "cells" / "lora-lr1e-3-seed0" / "version_0" / "config.yaml"
    settings = method_settings(yaml.safe_load(config.read_text()))
    cells = [["lora", rate, 0] for rate in (1e-4, 1e-3, 1e-2)]
    plan(tmp_path / "more", [*cells, ["lora", 1e-3, 7]], methods={"lora": settings})
    failed = tmp_path / "more" / "cells" / "lora-lr1e-3-seed7"
    failed.mkdir()
    (failed / "failure.json").write_text('{"message": "no memory"}')
    assert report(tmp_path / "runs", tmp_path / "more") == 0
    rows = {row["method"]: row for row in rows_of(tmp_path / "out" / "table.csv")}
    assert rows["lora (r=8)"]["learning rate"] == "1e-3"
    assert rows["lora (r=64)"]["learning rate"] == "1e-4 †"
    assert "run failed or diverged there: lora (r=64) at 1e-3" in capsys.readouterr().out


def test_a_score_of_one_of_two_tasks(report, tmp_path, capsys):
    write_run(tmp_path / "a" / "version_0")
    other = {"validation_size": 100, "max_length": 64, "batch_size": 8}
    write_run(tmp_path / "b" / "version_0", data=other)
    file = tmp_path / "b" / "version_0" / "summary.json"
    told = json.loads(file.read_text())
    told["metrics"] = {"final": {"loss": 0.4}, "test": {"gsm8k/strict": 0.2}}
    file.write_text(json.dumps(told))
    assert report(tmp_path / "a", tmp_path / "b", "--score", "gsm8k/strict") == 0
    columns = [list(rows_of(tmp_path / "out" / f"table_{i}.csv")[0])[1] for i in (1, 2)]
    assert sorted(columns) == ["test accuracy, %", "test gsm8k/strict, %"]


def test_watching_the_inside_makes_no_other_method(report, tmp_path):
    watcher = {"class_path": "callbacks.alignment_monitor.AlignmentMonitor", "init_args": {}}
    actor = {"class_path": "my.Callback"}
    for seed, callbacks in enumerate((None, [watcher], [actor], [actor, watcher])):
        file = grid_run(tmp_path / "runs", "lora", 1e-3, seed) / "config.yaml"
        config = yaml.safe_load(file.read_text())
        config["trainer"]["callbacks"] = callbacks
        file.write_text(yaml.safe_dump(config))
    assert report(tmp_path / "runs") == 0
    assert [row["seeds"] for row in rows_of(tmp_path / "out" / "table.csv")] == ["2", "2"]


@pytest.mark.parametrize(
    ("part", "value"),
    [
        ("metrics", None),
        ("metrics", {"final": None}),
        ("metrics", {"final": {"accuracy": "high"}}),
        ("metrics", {"final": {"accuracy": None}}),
        *((name, None) for name in ("data", "train", "init", "model")),
        ("train", {"steps": "many"}),
        ("init", {"peak_bytes": 5}),
        ("seed", "x"),
        ("data", {"rows": 3}),
    ],
)
def test_damaged_summaries_are_told(part, value, report, tmp_path, capsys):
    write_run(tmp_path / "good" / "version_0")
    write_run(tmp_path / "bad" / "version_0", rate=1e-2)
    file = tmp_path / "bad" / "version_0" / "summary.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), part: value}))
    assert report(tmp_path / "good", tmp_path / "bad") == 0
    assert "unreadable: summary.json is damaged: " in capsys.readouterr().out
    assert len(rows_of(tmp_path / "out" / "table.csv")) == 1


def test_other_files_of_the_same_names(report, tmp_path, capsys):
    write_run(tmp_path / "good" / "version_0")
    for number, content in enumerate(('{"cells": ["a"]}', "[]", '{"cells": 3, "methods": []}')):
        (tmp_path / "good" / str(number)).mkdir()
        (tmp_path / "good" / str(number) / "compare.json").write_text(content)
    rate = tmp_path / "good" / "x" / "version_0"
    write_run(rate, rate="fast")
    bare = tmp_path / "good" / "y" / "version_0"
    write_run(bare, rate=1e-2)
    (bare / "metrics.csv").unlink()
    told = json.loads((bare / "summary.json").read_text())
    del told["metrics"]["after_init"]
    (bare / "summary.json").write_text(json.dumps(told))
    assert report(tmp_path / "good") == 0
    assert "config.yaml is damaged: learning rate 'fast'" in capsys.readouterr().out
    assert len(rows_of(tmp_path / "out" / "runs.csv")) == 3


def test_runs_at_the_same_time_are_told(report, tmp_path, capsys):
    times = (("a", 0, 100), ("a", 90, 200), ("a", 95, 99), ("b", 0, 300), ("a", 200, 210))
    for seed, (host, began, ended) in enumerate(times):
        run = grid_run(tmp_path / "runs", "lora", 1e-3, seed)
        change(run, train={"host": host, "began": 1e9 + began, "ended": 1e9 + ended})
    assert report(tmp_path / "runs") == 0
    assert "Up to 3 of these runs trained at once" in capsys.readouterr().out
    assert report(tmp_path / "runs" / "cells" / "lora-lr1e-3-seed0", run) == 0
    assert "at once" not in capsys.readouterr().out


def test_a_cell_that_was_killed_as_it_began(report, tmp_path, capsys):
    grid = tmp_path / "grid"
    grid_run(grid, "lora", 1e-3, 0)
    plan(grid, [["lora", 1e-3, 0], ["lora", 1e-3, 1]])
    (grid / "cells" / "lora-lr1e-3-seed1" / "version_0").mkdir(parents=True)
    assert report(grid) == 0
    printed = capsys.readouterr().out
    assert "unfinished: it was ended as it began" in printed
    assert "Preliminary: 1 of 2" in printed


def test_tasks_share_no_table(report, runs, tmp_path, capsys):
    other = {"validation_size": 100, "max_length": 64, "batch_size": 8}
    write_run(tmp_path / "other" / "version_0", "lora", data=other)
    assert report(runs, tmp_path / "other") == 0
    printed = capsys.readouterr().out
    assert "Task 2: glue/sst2" in printed
    assert len(rows_of(tmp_path / "out" / "table_1.csv")) == 2
    assert len(rows_of(tmp_path / "out" / "table_2.csv")) == 1
    page = (tmp_path / "out" / "report.html").read_text()
    assert "data.init_args.max_length (128, 64)" in page
    [first, second] = comparisons(collect([runs, tmp_path / "other"]))
    assert (len(first.runs), len(second.runs)) == (18, 1)


def test_variants_of_a_method_and_repeated_runs(report, tmp_path, capsys):
    for name, more in (("a", {"r": 8}), ("b", {"r": 64}), ("c", {"r": 64, "test": 0.9})):
        write_run(tmp_path / "runs" / name / "version_0", **more)
        stamp = 1_700_000_000 + ord(name)
        os.utime(tmp_path / "runs" / name / "version_0" / "summary.json", (stamp, stamp))
    assert report(tmp_path / "runs") == 0
    rows = rows_of(tmp_path / "out" / "table.csv")
    assert [(row["method"], row["test accuracy, %"]) for row in rows] == [
        ("lora (r=64)", "90.00"),
        ("lora (r=8)", "70.00"),
    ]
    printed = capsys.readouterr().out
    assert "repeated: the same settings were run again later" in printed
    assert "No other learning rate was tried" in printed
    assert "One seed says nothing" in printed


def test_validation_on_the_reported_rows_is_said(report, tmp_path, capsys):
    data = {"validation_size": None, "max_length": 128, "batch_size": 8}
    write_run(tmp_path / "runs" / "version_0", data=data, test=None)
    assert report(tmp_path / "runs" / "version_0") == 0
    printed = capsys.readouterr().out
    assert "The validation rows are the reported rows" in printed
    assert "not tested" in printed


def test_folders_that_hold_no_run(report, runs, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "config.yaml").write_text("problem: {kind: linear}")
    (tmp_path / "foreign" / "summary.json").write_text('{"theorems": []}')
    for name, told in (
        ("empty", "holds no run: expected config.yaml and summary.json"),
        ("foreign", "holds no run"),
        ("absent", "does not exist: expected a run folder"),
    ):
        assert report(tmp_path / name) == 2
        assert told in capsys.readouterr().err
        assert report(runs, tmp_path / name) == 2  # nothing that was named is dropped silently
        assert name in capsys.readouterr().err
    unfinished = tmp_path / "runs2" / "version_0"
    write_run(unfinished)
    (unfinished / "summary.json").unlink()
    assert report(unfinished) == 2
    assert "no finished run to report" in capsys.readouterr().err
    write_run(tmp_path / "runs3" / "version_0")
    (tmp_path / "runs3" / "version_0" / "summary.json").write_text("{")
    broken = tmp_path / "runs4" / "version_0"
    write_run(broken)
    (broken / "metrics.csv").write_text("step,train/loss\n0,much\n")
    (runs / "wandb" / "files").mkdir(parents=True)
    (runs / "wandb" / "files" / "config.yaml").write_text("model: {value: {name: x}}")
    assert report(runs, tmp_path / "runs2", tmp_path / "runs3", tmp_path / "runs4") == 0
    printed = capsys.readouterr().out
    for told in ("unfinished: it has no summary.json", "summary.json is damaged", "metrics.csv is"):
        assert told in printed
    assert len(rows_of(tmp_path / "out" / "runs.csv")) == 21


def test_curves(runs):
    [task] = comparisons(collect([runs]))
    [ours, lora] = task.methods
    run = next(run for run in ours.best_rows.run if run.seed == 1)
    np.testing.assert_allclose(
        run_curve(run, "loss", "steps"), [(i + 1, 1 / (2 + i)) for i in range(4)]
    )
    # Two seconds and one for the seed to initialise, 0.6 for a step.
    seconds = [3 + 0.6 * (i + 1) for i in range(4)]
    assert [x for x, _ in run_curve(run, "loss", "seconds")] == pytest.approx(seconds)
    np.testing.assert_allclose(
        run_curve(run, "accuracy", "steps"), [(0, 0.55), (2, 0.61), (4, 0.92)]
    )
    assert [x for x, _ in run_curve(run, "accuracy", "seconds")] == pytest.approx([3, 4.2, 5.4])
    x, mean, std = mean_curve(list(lora.best_rows.run), "loss", "steps")
    table = np.array([[1 / (1 + i + seed) for i in range(4)] for seed in range(3)])
    assert x == pytest.approx([1, 2, 3, 4])
    assert mean == pytest.approx(table.mean(axis=0))
    assert std == pytest.approx(table.std(axis=0, ddof=1))


class Reader(html.parser.HTMLParser):
    """Checks nesting, and notes what a page refers to and shows."""

    VOID = ("meta", "link", "img", "br")

    def __init__(self):
        super().__init__()
        self.open, self.links, self.tags, self.cells = [], [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value for name, value in attrs if name in ("src", "href", "srcset")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in ("td", "b"):
            self.cells.append(data)


def test_the_page(report, runs, tmp_path):
    write_run(runs / "x" / "version_0", "<script>alert(1)</script>")
    assert report(runs) == 0
    page = (tmp_path / "out" / "report.html").read_text()
    reader = Reader()
    reader.feed(page)
    reader.close()
    assert reader.open == []
    assert "script" not in reader.tags
    assert all(link.startswith("data:") for link in reader.links)
    assert not re.search(r"https?://|url\(", page)
    assert "91.00 ± 1.00" in reader.cells
    pictures = [link for link in reader.links if link.startswith("data:image/png;base64,")]
    names = {path.stem for path in (tmp_path / "out").glob("*.png")}
    curves = {
        f"{what}_over_{over}" for what in ("loss", "accuracy") for over in ("steps", "seconds")
    }
    assert names == {"learning_rate_validation", "learning_rate_test", *curves}
    assert len(pictures) == len(names)
    for link in pictures:
        pixels = matplotlib.image.imread(io.BytesIO(base64.b64decode(link.partition(",")[2])))
        assert pixels[..., :3].std() > 0.02
    for link in re.findall(r"!\[.*?\]\((.*?)\)", (tmp_path / "out" / "report.md").read_text()):
        assert (tmp_path / "out" / link).is_file()


BROWSER = (
    shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
)


@pytest.mark.skipif(BROWSER is None, reason="there is no Chromium or Chrome to open the page in")
@pytest.mark.parametrize("width", [390, 1280])
def test_in_a_browser(width, report, runs, tmp_path):
    """Wide tables scroll in their own boxes: the page is as wide as the window, and nothing is amiss."""
    assert report(runs) == 0
    report_file = tmp_path / "out" / "report.html"
    # A headless window is never as narrow as a phone; a frame is. The frame tells what it measures.
    probe = tmp_path / "probe.html"
    probe.write_text(
        f'<body style="margin:0"><iframe id=f src="{report_file.as_uri()}" style="width:{width}px;height:900px;'
        'border:0"></iframe><script>f.onload = () => { const d = f.contentDocument, e = d.documentElement;'
        "const broken = [...d.images].filter(i => !i.naturalWidth).length;"
        "document.title = JSON.stringify([e.scrollWidth, e.clientWidth, d.images.length, broken,"
        "[...d.querySelectorAll('.table')].filter(t => t.scrollWidth > t.clientWidth).length]) }</script>"
    )
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    options += ["--allow-file-access-from-files"]
    options += ["--enable-logging=stderr", "--v=0", f"--user-data-dir={tmp_path / 'profile'}"]
    options += ["--window-size=1400,1000", "--virtual-time-budget=5000", "--dump-dom"]
    options += ["--proxy-server=127.0.0.1:9"]  # no network
    done = subprocess.run(
        [BROWSER, *options, probe.as_uri()], capture_output=True, text=True, timeout=120, check=True
    )
    assert ":CONSOLE" not in done.stderr
    told = re.search(r"<title>(\[.*?\])</title>", done.stdout)
    scroll, client, images, broken, scrolling = json.loads(told[1])
    assert (scroll, client) == (width, width)
    assert (images, broken) == (6, 0)
    assert (scrolling > 0) is (width == 390)
