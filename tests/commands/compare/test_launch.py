"""What the files for Slurm and W&B run."""

import os
import shlex
import stat
import subprocess

import pytest
import yaml

from app.commands.compare.cells import Cell, Variant, grid
from app.utils.command_parser import CommandParser
from tests.support.compare_runs import OPTIONS
from tests.support.paths import ROOT
from tests.support.run_folders import table

GRID = ("--methods=lora,lora_one", "--learning_rates=1e-2,3e-2", "--seeds=0,7")


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


def run_task(file, tmp_path, task):
    slurm = {"SLURM_ARRAY_TASK_ID": str(task), "SLURM_SUBMIT_DIR": str(ROOT)}
    return run_file(["bash", file], tmp_path, **slurm)


def parsed(argv):
    """Return the cell that a recorded `compare` asks for, and its other options."""
    assert argv[1] == "compare"
    assert argv[0].endswith("train.py")
    own = CommandParser("compare")
    for name in ("--methods", "--ranks", "--learning_rates", "--seeds"):
        own.add_argument(name)
    given, rest = own.parse_known_args(argv[2:])
    rank = None if given.ranks is None else int(given.ranks)
    cell = (given.methods, float(given.learning_rates), int(given.seeds), rank)
    return Cell(*cell), rest


def test_the_slurm_array_runs_every_cell(compare, started, tiny_run, tmp_path, capsys):
    assert compare(*GRID, "--launch=slurm", "--model.adapter.r=3") == 0
    assert started == []
    file = tmp_path / "runs" / "compare_tiny" / "array.sbatch"
    assert f"start: sbatch {file}" in capsys.readouterr().out
    assert "#SBATCH --array=0-7\n" in file.read_text()
    cells = []
    for task in range(8):
        asked, rest = parsed(run_task(file, tmp_path, task))
        cells.append(asked)
        shared = {f"--config={tiny_run}", "--name=compare_tiny", "--model.adapter.r=3", *OPTIONS}
        assert shared <= set(rest)
    assert cells == grid([Variant("lora"), Variant("lora_one")], [1e-2, 3e-2], [0, 7])


@pytest.mark.slow
def test_a_task_of_the_array_trains_its_cell(compare, command, started, tmp_path):
    wanted = ("--methods=lora,lora_one", "--learning_rates=1e-2", "--reference=lora")
    assert compare(*wanted, "--launch=slurm") == 0
    folder = tmp_path / "runs" / "compare_tiny"
    argv = run_task(folder / "array.sbatch", tmp_path, 1)
    assert "--reference=lora" in argv, "which is the method of another task"
    assert command(*argv[1:]) == 0
    assert [argv[0] for argv in started] == ["fit", "test"]
    states = [(row["method"], row["state"]) for row in table(folder, "runs.csv")]
    assert states == [("lora_one", "finished"), ("lora", "missing")]


def test_the_sweep_is_the_same_grid(compare, started, tiny_run, tmp_path):
    assert compare(*GRID, "--launch=wandb") == 0
    assert started == []
    sweep = yaml.safe_load((tmp_path / "runs" / "compare_tiny" / "sweep.yaml").read_text())
    assert (sweep["program"], sweep["method"]) == ("train.py", "grid")
    assert set(sweep["parameters"]) == {"methods", "learning_rates", "seeds"}
    # An agent replaces the macros and starts the words of `command`.
    chosen = {name: part["values"][-1] for name, part in sweep["parameters"].items()}
    macros = {
        "${env}": ["/usr/bin/env"],
        "${program}": ["train.py"],
        "${args}": [f"--{name}={value}" for name, value in chosen.items()],
    }
    words = [word for part in sweep["command"] for word in macros.get(part, [part])]
    asked, rest = parsed(run_file(["bash", "-c", shlex.join(words)], tmp_path))
    assert asked == Cell("lora_one", 3e-2, 7)
    assert {f"--config={tiny_run}", "--name=compare_tiny"} <= set(rest)


def test_the_slurm_array_has_the_ranks(compare, tmp_path):
    wanted = ("--methods=full,lora", "--ranks=2,4", "--learning_rates=1e-2")
    assert compare(*wanted, "--launch=slurm") == 0
    file = tmp_path / "runs" / "compare_tiny" / "array.sbatch"
    cells = [parsed(run_task(file, tmp_path, task))[0] for task in range(3)]
    assert cells == [Cell("full", 1e-2, 0), Cell("lora", 1e-2, 0, 2), Cell("lora", 1e-2, 0, 4)]


def test_the_sweep_has_the_ranks(compare, tmp_path):
    assert compare("--methods=lora", "--ranks=2", "--learning_rates=1e-2", "--launch=wandb") == 0
    sweep = yaml.safe_load((tmp_path / "runs" / "compare_tiny" / "sweep.yaml").read_text())
    assert sweep["parameters"]["ranks"] == {"values": [2]}
