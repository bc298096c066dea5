"""`python train.py compare`: the grid, what is resumed, what is refused, what the launchers' files run."""

import csv
import gzip
import json
import os
import shlex
import stat
import subprocess
import sys

import numpy as np
import pytest
import yaml

import app.commands.compare.command
from app.cli.main import main
from app.cli.resolve import resolve_run
from app.commands.compare.cells import Cell, grid, parse_rates
from app.commands.compare.manifest import GridManifest, read_manifest, update_manifest
from app.commands.compare.resolve import (
    RunOptions,
    check_validation,
    resolve_methods,
    rows_to_set_aside,
)
from app.utils.command_parser import CommandParser
from app.utils.errors import InputError
from app.utils.text import rate_text
from tests.support.paths import ROOT

REAL = ROOT.parent / "shared" / "data" / "glue" / "SST-2"
OPTIONS = (
    "--trainer.max_steps=2",
    "--data.validation_size=20",
    "--init.num_samples=4",
)


@pytest.fixture
def started(monkeypatch):
    """Run each cell's commands in this process; return the list of them."""
    commands = []

    class Ended:
        def __init__(self, status):
            self.status = status

        def poll(self):
            return self.status

    def start(argv, log, lock):
        assert argv[:2] == [sys.executable, str(ROOT / "train.py")]
        commands.append(argv[2:])
        os.fstat(lock)
        saved = sys.stdout, sys.stderr
        sys.stdout = sys.stderr = open(log.fileno(), "w", closefd=False)  # noqa: SIM115
        try:
            return Ended(main(argv[2:]))
        finally:
            sys.stdout.flush()
            sys.stdout, sys.stderr = saved

    monkeypatch.setattr(app.commands.compare.command, "start_process", start)
    return commands


@pytest.fixture
def compare(command, started, tiny_run, monkeypatch):
    """Return `compare(*argv)`, which compares on the tiny run and returns the exit status."""
    from app.cli.lora_cli import LoraCLI

    commands = LoraCLI.subcommands()
    two = {name: commands[name] for name in ("fit", "test")}
    monkeypatch.setattr(LoraCLI, "subcommands", staticmethod(lambda: two))

    def run(*argv, options=OPTIONS):
        return command("compare", "--config", tiny_run, *options, *argv)

    return run


@pytest.fixture
def refused(compare, capsys, started):
    """Return `refused(*argv)`: the one line that refuses, before anything was started."""

    def run(*argv, options=OPTIONS):
        capsys.readouterr()
        assert compare(*argv, options=options) == 2
        assert started == []
        return capsys.readouterr().err.removeprefix("error: ").strip()

    return run


@pytest.fixture
def sst2_rows(sst2_folder, tmp_path):
    """Return a GLUE folder with real rows of SST-2; with made ones where the files are not there."""
    if not REAL.is_dir():
        return sst2_folder
    (tmp_path / "SST-2").mkdir()
    for split, lines in (("train", 81), ("dev", 41)):
        [file, *_] = sorted(REAL.glob(f"{split}.tsv*"))
        opened = gzip.open if file.suffix == ".gz" else open
        with opened(file, "rt") as stream:
            head = [next(stream) for _ in range(lines)]
        (tmp_path / "SST-2" / f"{split}.tsv").write_text("".join(head))
    return tmp_path


def rows_of(path):
    with path.open(newline="") as stream:
        return list(csv.DictReader(stream))


def test_a_grid_from_end_to_end_and_again(compare, started, sst2_rows, tmp_path, capsys):
    folder = tmp_path / "runs" / "compare_tiny"
    wanted = ("--methods=lora,lora_one", "--learning_rates=0.01,1e-1", "--seeds=0,1")
    assert compare(*wanted, f"--data.path={sst2_rows}") == 0
    assert [argv[0] for argv in started] == ["fit", "test"] * 8
    assert "[8/8 finished]" in capsys.readouterr().out

    # Every number of the report is that of the runs.
    found = {}
    for row in rows_of(folder / "runs.csv"):
        told = json.loads((tmp_path / row["folder"] / "summary.json").read_text())
        config = yaml.safe_load((tmp_path / row["folder"] / "config.yaml").read_text())
        assert (told["method"], told["seed"]) == (row["method"], int(row["seed"]))
        rate = config["model"]["optimizer"]["init_args"]["lr"]
        assert rate == float(row["learning_rate"])
        assert config["trainer"]["max_steps"] == told["train"]["steps"] == 2
        assert float(row["reported_score"]) == told["metrics"]["test"]["accuracy"]
        assert float(row["peak_bytes"]) >= told["train"]["peak_bytes"] > 2**20
        assert row["device"] == "cpu"
        assert float(row["step_seconds"]) == pytest.approx(told["train"]["seconds"] / 2)
        key = (row["method"], rate)
        found.setdefault(key, []).append((float(row["selection_score"]), told["metrics"]["test"]))
    assert len(found) == 4
    for line in rows_of(folder / "table.csv"):
        means = {
            rate: np.mean([chosen for chosen, _ in scores])
            for (method, rate), scores in found.items()
            if method == line["method"]
        }
        best = max(means, key=means.get)
        assert line["learning rate"].removesuffix(" †") == rate_text(best)
        values = [100 * test["accuracy"] for _, test in found[line["method"], best]]
        wanted_text = f"{np.mean(values):.2f} ± {np.std(values, ddof=1):.2f}"
        assert line["test accuracy, %"] == wanted_text
        assert line["seeds"] == "2"

    # Again nothing is trained; a wider grid trains what is new, in any spelling of the rates.
    started.clear()
    assert compare(*wanted, f"--data.path={sst2_rows}") == 0
    assert started == []
    wider = ("--methods=lora", "--learning_rates=1e-2,2e-2", "--seeds=1")
    assert compare(*wider, f"--data.path={sst2_rows}") == 0
    assert [argv[0] for argv in started] == ["fit", "test"]
    assert "--output.name=lora-lr2e-2-seed1" in started[0]
    assert len(rows_of(folder / "runs.csv")) == 9

    # Another task, and another method of the same name, do not get into the same folder, also with cells
    # that are new; what is refused leaves no trace.
    started.clear()
    capsys.readouterr()
    plan = (folder / "compare.json").read_bytes()
    newer = ("--methods=lora", "--learning_rates=5e-2", "--seeds=9")
    for changed, told in (
        ("--data.max_length=64", "comparison of another task: data.init_args.max_length (128, 64)"),
        ("--model.adapter.r=2", "other settings of the method lora: model.adapter.r (4, 2)"),
    ):
        for cells in (wider, newer):
            assert compare(*cells, f"--data.path={sst2_rows}", changed) == 2
            assert told in capsys.readouterr().err
            assert (folder / "compare.json").read_bytes() == plan
    assert started == []


def test_a_failed_cell_is_reported_and_the_others_go_on(compare, started, tmp_path, capsys):
    # 1e30 lets the loss overflow; the broken seed is a cell that fails for another reason.
    folder = tmp_path / "runs" / "compare_tiny"
    broken = folder / "cells" / "lora-lr1e-2-seed1" / "version_0"
    broken.parent.mkdir(parents=True)
    broken.write_text("a file where a folder belongs")
    wanted = ("--methods=lora", "--learning_rates=1e-2,1e30", "--seeds=0,1")
    options = ("--trainer.max_steps=3", *OPTIONS[1:2], "--init=null")
    assert compare(*wanted, options=options) == 1
    printed = capsys.readouterr().out
    assert "[1/4 finished, 3 failed" in printed
    states = {row["folder"].rpartition("/")[2]: row for row in rows_of(folder / "runs.csv")}
    assert states["lora-lr1e-2-seed1"]["state"] == "failed"
    assert "is a file: set output.name" in states["lora-lr1e-2-seed1"]["reason"]
    for seed in (0, 1):
        diverged = states[f"lora-lr1e30-seed{seed}"]
        assert diverged["state"] == "diverged"
        assert "lower model.optimizer.lr" in diverged["reason"]
    page = (folder / "report.html").read_text()
    assert "2 diverged" in page
    assert "Runs in no mean" in page
    # The failed cell is tried again, the diverged ones are results.
    broken.unlink()
    started.clear()
    assert compare(*wanted, options=options) == 0
    assert [argv[0] for argv in started] == ["fit", "test"]
    assert "--output.name=lora-lr1e-2-seed1" in started[0]


def test_refusals(refused, tmp_path):
    rates = "--learning_rates=1e-3"
    assert "there is no method 'lorra': expected some of" in refused("--methods=lorra", rates)
    assert "lora_one_adamw" in refused("--methods=lorra", rates)
    assert "names lora twice" in refused("--methods=lora,lora", rates)
    assert refused("--methods=lora,", rates).startswith("--methods is 'lora,': expected names")
    for wrong in ("fast", "0", "-1e-3", "nan", "inf"):
        told = refused("--methods=lora", f"--learning_rates={wrong}")
        assert told.startswith(f"--learning_rates has '{wrong}': expected numbers above 0")
    assert "names 0.001 twice" in refused("--methods=lora", "--learning_rates=1e-3,0.001")
    for wrong in ("one", "1.5", "-1", "4294967296"):
        told = refused("--methods=lora", rates, f"--seeds={wrong}")
        assert told.startswith(f"--seeds has '{wrong}': expected whole numbers")
    assert "--jobs is 0" in refused("--methods=lora", rates, "--jobs=0")
    assert "expected accuracy, f1" in refused("--methods=lora", rates, "--score=bleu")
    told = refused("--methods=lora", rates, "--score=gsm8k/strict")
    assert "the runs are asked no benchmark: name its overlay with --test_config" in told
    assert "did you mean --learning_rates?" in refused("--methods=lora", rates, "--learning_rate=1")
    assert "give --learning_rates" in refused("--methods=lora", rates, "--model.optimizer.lr=1")
    assert "give --seeds" in refused("--methods=lora", rates, "--seed_everything=1")
    assert "arguments are required: --learning_rates" in refused("--methods=lora")
    told = refused("--methods=lora", rates, "--data.btch_size=3")
    assert told == "method lora: there is no setting data.btch_size; did you mean data.batch_size?"
    told = refused("--methods=adalora,lora", rates, "--model.adapter.use_dora=true")
    assert told.startswith("method adalora: model.adapter has use_dora: true and adalora")
    endless = ("--trainer.max_steps=-1", "--trainer.max_epochs=-1")
    for launch in ((), ("--launch=wandb",)):
        told = refused("--methods=lora", rates, *endless, *launch)
        assert told.startswith("method lora: trainer.max_steps and trainer.max_epochs are both -1")
    adalora = ("--methods=lora,adalora", "--model.adapter.adalora.init_r=6", rates)
    told = refused(*adalora, "--trainer.max_steps=1")
    assert told.startswith("method adalora: AdaLoRA prunes between step")
    told = refused("--methods=lora", rates, "--launch=slurm", "--trainer.num_nodes=2")
    assert "a task of the Slurm array has one device" in told
    assert not (tmp_path / "runs").exists()


def test_only_the_run_that_is_meant_is_checked(tiny_run, tmp_path):
    """Not a method's configuration without its own options, nor that of a method nobody asked for."""
    file = tmp_path / "wide.yaml"
    file.write_text("model: {adapter: {r: 16}}")  # above AdaLoRA's usual init_r
    for method in ("adalora", "lora"):
        options = RunOptions(
            [str(tiny_run), str(file)], ["--model.adapter.adalora.init_r=20"], resolve_run
        )
        found = resolve_methods([method], ["lora", "adalora"], options)[method].resolved
        assert found["model"]["adapter"]["r"] == 16
        if method == "adalora":
            assert found["model"]["adapter"]["adalora"]["init_r"] == 20


def test_a_plan_of_which_nothing_was_trained_gives_way(tmp_path):
    def manifest(steps, *cells):
        return GridManifest(task={"trainer.max_steps": steps}, cells=cells)

    cell = Cell("lora", 1e-3, 0)
    update_manifest(tmp_path, manifest(1, cell, Cell("dora", 1e-3, 0)))
    update_manifest(tmp_path, manifest(2, cell))
    assert read_manifest(tmp_path) == manifest(2, cell)
    (tmp_path / "cells" / cell.name / "version_0").mkdir(parents=True)
    with pytest.raises(InputError, match=r"another task: trainer.max_steps \(2, 3\)"):
        update_manifest(tmp_path, manifest(3, cell))


def test_options_of_a_method_go_to_those_that_have_them(
    refused, compare, started, tmp_path, capsys
):
    """None brings back the start that an overlay has switched off."""
    wanted = ("--methods=lora,pissa,lora_one,full", "--learning_rates=1e-3")
    options = (*OPTIONS, "--model.adapter.r", "2", "--model.optimizer.init_args.damping=1e-3")
    assert compare(*wanted, options=options) == 0
    printed = capsys.readouterr().out
    assert "init.num_samples goes to lora_one; lora, pissa, full: no such setting" in printed
    assert "model.adapter.r goes to lora, pissa, lora_one; full: no such setting" in printed
    assert "model.optimizer.damping goes to lora_one; lora, pissa, full" in printed
    models, starts = {}, {}
    for method in ("lora", "pissa", "lora_one", "full"):
        run = tmp_path / "runs" / "compare_tiny" / "cells" / f"{method}-lr1e-3-seed0" / "version_0"
        config = yaml.safe_load((run / "config.yaml").read_text())
        models[method], starts[method] = config["model"], config["init"]
    assert starts["lora"] is starts["full"] is models["full"]["adapter"] is None
    assert starts["pissa"]["class_path"] == "PissaInit"
    assert starts["lora_one"]["init_args"]["num_samples"] == 4
    assert models["lora_one"]["optimizer"]["init_args"]["damping"] == 1e-3
    assert {models[m]["adapter"]["r"] for m in ("lora", "pissa", "lora_one")} == {2}
    # A task of an array may have no method with the setting; a misspelt one no method at all has.
    started.clear()
    assert compare(*wanted[1:], "--methods=lora", "--launch=slurm", "--name=other") == 0
    assert "init.num_samples: lora: no such setting" in capsys.readouterr().out
    told = refused("--methods=lora,pissa", wanted[1], options=("--init.gama=1",))
    assert "there is no setting init.gama; did you mean init.gamma?" in told


def test_validation_on_the_reported_rows_is_refused(refused, monkeypatch):
    monkeypatch.setattr("app.commands.compare.resolve.rows_to_set_aside", lambda run: None)
    options = (*OPTIONS[:1], "--data.validation_size=null")
    told = refused("--methods=lora", "--learning_rates=1e-3", options=options)
    assert "are the rows that the test reports" in told


def test_finished_runs_are_asked_a_benchmark_that_is_added(compare, started, tmp_path, capsys):
    wanted = ("--methods=lora", "--learning_rates=1e-3")
    assert compare(*wanted) == 0
    overlay = tmp_path / "toy.yaml"
    toy = {"class_path": "tests.support.toy_benchmarks.Writing", "init_args": {"size": 3}}
    content = {
        "model": {"adapter": None},
        "data": {
            "class_path": "data_modules.benchmark_data.BenchmarkDataModule",
            "init_args": {"evals": [toy]},
        },
    }
    overlay.write_text(yaml.safe_dump(content))
    started.clear()
    asked = (*wanted, f"--test_config={overlay}")
    assert compare(*asked, "--score=writing/has_e") == 0
    assert [argv[0] for argv in started] == ["test"]
    [row] = rows_of(tmp_path / "runs" / "compare_tiny" / "table.csv")
    assert "test writing/has_e, %" in row
    # Asked once, and with these settings only; the scores on the rows are still there.
    started.clear()
    assert compare(*asked) == 0
    assert started == []
    run = tmp_path / "runs" / "compare_tiny" / "cells" / "lora-lr1e-3-seed0" / "version_0"
    test = json.loads((run / "summary.json").read_text())["metrics"]["test"]
    assert {"accuracy", "writing/has_e"} <= set(test)
    toy["init_args"]["limit"] = 1
    overlay.write_text(yaml.safe_dump(content))
    capsys.readouterr()
    assert compare(*asked) == 2
    told = "other settings of the benchmark writing: limit (None, 1) (then, now)"
    assert told in capsys.readouterr().err


def test_training_rows_are_set_aside_where_the_configuration_has_none(tiny_run, command, capfd):
    run = resolve_run([f"--config={tiny_run}", "--data.validation_size=null"])
    rows = len(run.data.rows("train"))
    assert rows_to_set_aside(run) == rows // 5 > 0
    with pytest.raises(InputError, match="are the rows that the test reports"):
        check_validation(run)
    apart = resolve_run([f"--config={tiny_run}", f"--data.validation_size={rows // 5}"])
    assert rows_to_set_aside(apart) is None
    check_validation(apart)
    # The command does so by itself, whatever comes of it.
    options = ("--methods=lora", "--learning_rates=1e-3", "--data.validation_size=null")
    assert command("compare", "--config", tiny_run, *options, "--launch=slurm") == 0
    told = capfd.readouterr().out
    assert f"{rows // 5} training rows are set aside to choose learning rates on" in told


def test_methods_that_are_no_comparison(refused, tmp_path, monkeypatch):
    methods = tmp_path / "configs" / "methods"
    methods.mkdir(parents=True)
    lora = (ROOT / "configs" / "methods" / "lora.yaml").read_text()
    (methods / "lora.yaml").write_text(lora)
    (methods / "same.yaml").write_text(lora.replace("method: lora", "method: same"))
    (methods / "longer.yaml").write_text(lora + "trainer: {max_epochs: 7}\n")
    monkeypatch.setattr(app.commands.compare.command, "CONFIGS", tmp_path / "configs")
    monkeypatch.setattr("app.tracking.config_files.CONFIGS", tmp_path / "configs")
    rates = "--learning_rates=1e-3"
    told = refused("--methods=lora,same", rates, options=OPTIONS[:2])
    assert "lora and same come to the same settings" in told
    told = refused("--methods=lora,longer", rates, options=OPTIONS[:2])
    assert "lora and longer differ in trainer.max_epochs (None, 7)" in told


def run_file(command, tmp_path, **environment):
    """Run a shell command with a `python` that writes down its arguments; return those of train.py."""
    stub = tmp_path / "bin" / "python"
    stub.parent.mkdir(exist_ok=True)
    stub.write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" > {tmp_path}/argv\n')
    srun = stub.with_name("srun")
    srun.write_text('#!/bin/sh\nexec "$@"\n')
    for path in (stub, srun):
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
    path = f"{stub.parent}:{os.environ['PATH']}"
    subprocess.run(command, check=True, env={"PATH": path, **environment}, cwd=ROOT)
    return (tmp_path / "argv").read_text().splitlines()


def parsed(argv):
    """Return the cells that a recorded `compare` asks for, and its other options."""
    assert argv[1] == "compare"
    assert argv[0].endswith("train.py")
    own = CommandParser("compare")
    for name in ("--methods", "--learning_rates", "--seeds"):
        own.add_argument(name)
    given, rest = own.parse_known_args(argv[2:])
    rates = parse_rates(given.learning_rates)
    return grid(given.methods.split(","), rates, [int(given.seeds)]), rest


def test_the_slurm_array_runs_every_cell(compare, started, tiny_run, tmp_path, capsys):
    wanted = ("--methods=lora,lora_one", "--learning_rates=1e-2,3e-2", "--seeds=0,7")
    assert compare(*wanted, "--launch=slurm", "--model.adapter.r=3") == 0
    assert started == []
    file = tmp_path / "runs" / "compare_tiny" / "array.sbatch"
    assert f"start: sbatch {file}" in capsys.readouterr().out
    assert "#SBATCH --array=0-7\n" in file.read_text()
    cells = []
    for task in range(8):
        argv = run_file(
            ["bash", file], tmp_path, SLURM_ARRAY_TASK_ID=str(task), SLURM_SUBMIT_DIR=str(ROOT)
        )
        asked, rest = parsed(argv)
        cells += asked
        assert f"--config={tiny_run}" in rest
        assert "--name=compare_tiny" in rest
        assert "--model.adapter.r=3" in rest
        assert set(OPTIONS) <= set(rest)
    assert cells == grid(["lora", "lora_one"], [1e-2, 3e-2], [0, 7])


def test_a_task_of_the_array_trains_its_cell(compare, command, started, tmp_path):
    wanted = ("--methods=lora,lora_one", "--learning_rates=1e-2")
    assert compare(*wanted, "--launch=slurm") == 0
    file = tmp_path / "runs" / "compare_tiny" / "array.sbatch"
    argv = run_file(["bash", file], tmp_path, SLURM_ARRAY_TASK_ID="1", SLURM_SUBMIT_DIR=str(ROOT))
    assert command(*argv[1:]) == 0
    assert [argv[0] for argv in started] == ["fit", "test"]
    rows = rows_of(tmp_path / "runs" / "compare_tiny" / "runs.csv")
    assert [(row["method"], row["state"]) for row in rows] == [
        ("lora_one", "finished"),
        ("lora", "missing"),
    ]


def test_the_sweep_is_the_same_grid(compare, started, tiny_run, tmp_path):
    wanted = ("--methods=lora,lora_one", "--learning_rates=1e-2,3e-2", "--seeds=0,7")
    assert compare(*wanted, "--launch=wandb") == 0
    assert started == []
    sweep = yaml.safe_load((tmp_path / "runs" / "compare_tiny" / "sweep.yaml").read_text())
    assert (sweep["program"], sweep["method"]) == ("train.py", "grid")
    assert set(sweep["parameters"]) == {"methods", "learning_rates", "seeds"}
    # An agent replaces the macros and starts the words of `command`.
    chosen = {name: part["values"][-1] for name, part in sweep["parameters"].items()}
    arguments = [f"--{name}={value}" for name, value in chosen.items()]
    words = [
        word
        for part in sweep["command"]
        for word in (
            {"${env}": ["/usr/bin/env"], "${program}": ["train.py"], "${args}": arguments}.get(
                part, [part]
            )
        )
    ]
    asked, rest = parsed(run_file(["bash", "-c", shlex.join(words)], tmp_path))
    assert asked == [Cell("lora_one", 3e-2, 7)]
    assert f"--config={tiny_run}" in rest
    assert "--name=compare_tiny" in rest


@pytest.mark.parametrize(
    ("rate", "text"),
    [(1e-4, "1e-4"), (0.0003, "3e-4"), (2.5e-5, "2.5e-5"), (1.0, "1e0"), (1 / 3, None)],
)
def test_rates_are_written_without_loss(rate, text):
    written = rate_text(rate)
    assert float(written) == rate
    assert text is None or written == text
