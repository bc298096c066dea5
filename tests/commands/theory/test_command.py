"""`python train.py theory`: what it writes, refuses and says."""

import csv
import json
import re

import pytest
import torch
import yaml

from app.commands.theory import command as theory
from app.commands.theory.theorems import THEOREMS, Check
from app.tracking.config_files import CONFIGS
from tests.support.paths import ROOT

SMALL = {
    "linear": {
        "problem": {"inputs": 14, "outputs": 12, "samples": 200, "true_rank": 2},
        "descent": {"steps": 5},
        "alignment": {"steps": 20, "sizes": [8, 10], "variances": [0.1]},
        "sweep": {"kappas": [1, 2], "many_kappas": [1, 2], "samples_per_input": [2, 4], "draws": 2},
    },
    "relu": {
        "problem": {"kind": "relu", "inputs": 14, "outputs": 12, "samples": 200, "true_rank": 2},
        "descent": {"steps": 5, "lr": 0.5},
        "sweep": {"kappas": [1, 2], "many_kappas": [1], "samples_per_input": [2, 4], "draws": 2},
    },
}


@pytest.fixture
def run(command, tmp_path, monkeypatch):
    """Return `run(kind, *argv)`: the exit status of a small run into tmp_path/runs/small."""
    monkeypatch.setattr(
        "app.commands.theory.alignment.hitting_times", lambda *_: ([1.0, 2.0], [2.0, 3.0])
    )

    def launch(kind, *argv):
        file = tmp_path / f"{kind}.yaml"
        output = {"name": "small", "root": str(tmp_path / "runs"), "instances": 4}
        file.write_text(yaml.safe_dump({**SMALL[kind], "output": output}))
        return command("theory", "--config", file, *argv)

    return launch


def read(folder):
    with (folder / "results.csv").open(newline="") as stream:
        rows = list(csv.reader(stream))
    assert rows[0] == ["figure", "panel", "curve", "x", "y"]
    return rows[1:]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["linear", "relu"])
def test_a_run(kind, run, command, tmp_path, capsys, monkeypatch):
    assert run(kind) == 0
    printed = capsys.readouterr().out
    folder = tmp_path / "runs" / "small" / "version_0"
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["kind"] == kind
    assert summary["holds"] is True
    pictures = {path.name for path in folder.glob("*.png")}
    assert pictures == set(summary["figures"])
    assert len(pictures) == {"linear": 11, "relu": 7}[kind]
    rows = read(folder)
    assert {f"{row[0]}.png" for row in rows} == pictures
    assert all(float(x) == float(x) for *_, x, _ in rows)
    # A line of progress for each part, and one of the table for each inequality.
    parts = len(THEOREMS[kind]) + len(theory.EXPERIMENTS[kind]) + 1
    assert re.findall(r"^(\d+)/(\d+) (?:theorem|figure): .*, [\d.]+ s$", printed, re.M) == [
        (str(i + 1), str(parts)) for i in range(parts)
    ]
    for row in summary["theorems"]:
        assert row["instances"] == 4
        ratio = f"{row['worst_measured_over_bound']:.3g}"
        assert re.search(
            rf"^{re.escape(row['theorem'])} +4 +{ratio} +yes +{re.escape(row['statement'])}$",
            printed,
            re.M,
        )
    # The resolved configuration runs again, to the same numbers.
    monkeypatch.setattr(theory, "draw", lambda *_: None)
    assert command("theory", "--config", folder / "config.yaml") == 0
    again = folder.with_name("version_1")
    assert read(again) == rows
    assert (again / "config.yaml").read_text() == (folder / "config.yaml").read_text()


def test_overrides(run, tmp_path, monkeypatch):
    monkeypatch.setattr(theory, "draw", lambda *_: None)
    assert run("linear", "--problem.kappa", "100", "--sweep.kappas=[3]", "--problem.seed=5") == 0
    assert run("linear", "--sweep.kappas=[3]") == 0
    folder = tmp_path / "runs" / "small" / "version_0"
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert config["problem"]["kappa"] == 100
    rows = read(folder)
    assert {panel for figure, panel, *_ in rows if figure == "loss_by_kappa"} == {"kappa = 3"}
    # The best rank-1 matrix misses the second singular value, 1 / kappa.
    [best] = {
        float(y) for f, p, c, _, y in rows if f == "error_by_rank" and "best" in c and "r = 1," in p
    }
    assert best == pytest.approx(1e-4)
    assert read(folder.with_name("version_1")) != rows


WRONG = """
--problem.kapa 3 => there is no setting problem.kapa; did you mean problem.kappa?
--problem.kind relo => problem.kind is relo: expected one of linear, relu; did you mean relu
--problem.inputs many => problem.inputs is many: expected a whole number
--problem.samples 14 => problem.samples is 14: expected more than problem.inputs (14)
--problem.true_rank 3 => problem.true_rank is 3: expected 1 to a sixth
--problem.kappa 0.5 => problem.kappa is 0.5: expected at least 1
--problem.true_rank 1 => problem.kappa is [4.0]: expected 1 where problem.true_rank is 1
--problem.seed -1 => problem.seed is -1: expected at least 0
--descent.lr 0 => descent.lr is 0.0: expected more than 0
--descent.steps 0 => descent.steps is 0: expected at least 1
--alignment.sizes [3, 8] => alignment.sizes is [3, 8]: expected sizes of at least 2
--alignment.variances [0] => alignment.variances is [0.0]: expected numbers of more than 0
--sweep.many_kappas [] => sweep.many_kappas is []: expected numbers of at least 1
--output.instances 0 => output.instances is 0: expected at least 1
--config theory/liner.yaml => did you mean theory/linear.yaml
--run x => there is no setting run for theory
""".strip()


@pytest.mark.parametrize("case", WRONG.splitlines())
def test_wrong_settings_are_one_line(case, run, tmp_path, capsys):
    arguments, _, message = case.partition(" => ")
    assert run("linear", *arguments.split(" ", 1)) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("error: ")
    assert message in printed
    assert printed.count("\n") == 1
    assert not (tmp_path / "runs").exists()


def test_an_inequality_that_fails_is_the_exit_status(run, tmp_path, monkeypatch, capsys):
    one = torch.ones(4)
    for ratio, written in ((1.5, 1.5), (float("nan"), None)):
        wrong = {"wrong": lambda *_, ratio=ratio: [Check("Thm 0", "1 < 0", ratio * one, one)]}
        monkeypatch.setitem(theory.THEOREMS, "linear", wrong)
        monkeypatch.setitem(theory.EXPERIMENTS, "linear", ())
        monkeypatch.setattr(theory.experiments, "convergence_bounds", lambda _: [])
        assert run("linear") == 1
        assert re.search(rf"^Thm 0 +4 +{ratio} +NO +1 < 0$", capsys.readouterr().out, re.M)
        newest = max((tmp_path / "runs" / "small").iterdir())
        summary = json.loads((newest / "summary.json").read_text())
        assert summary["holds"] is False
        assert summary["theorems"][0]["worst_measured_over_bound"] == written


@pytest.mark.parametrize("kind", ["linear", "relu"])
def test_shipped_configs(kind, command, monkeypatch, tmp_path):
    """A file runs by itself, and its first line says how."""
    launched = []
    monkeypatch.setattr(theory, "run", lambda settings, folder: launched.append(settings) or 0)
    file = CONFIGS / "theory" / f"{kind}.yaml"
    line = f"# python train.py theory --config theory/{kind}.yaml"
    assert file.read_text().splitlines()[0] == line
    assert command("theory", "--config", f"theory/{kind}.yaml", f"--output.root={tmp_path}") == 0
    [settings] = launched
    assert settings.problem.kind == kind
    assert settings.output.name == f"theory_{kind}"
    assert settings.output.instances == 100


def test_help(command, capsys):
    with pytest.raises(SystemExit, match=r"^0$"):
        command("theory", "--help")
    printed = capsys.readouterr().out
    for name in ("--problem.kappa", "--descent.damping", "--sweep.many_kappas", "condition number"):
        assert name.lower() in printed.lower()


def test_docs_show_every_figure():
    text = (ROOT / "docs" / "theory.md").read_text()
    shown = set(re.findall(r"\((theory/\S+\.png)\)", text))
    files = {
        str(path.relative_to(ROOT / "docs")) for path in (ROOT / "docs" / "theory").glob("*.png")
    }
    assert shown == files
    assert len(files) == 18
    for name in files:
        assert (ROOT / "docs" / name).stat().st_size < 150_000
