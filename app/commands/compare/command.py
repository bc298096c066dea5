"""The command lines of `python train.py compare` and `python train.py report`."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from app.commands.compare import resolve as resolving
from app.commands.compare.cells import (
    CELLS_FOLDER,
    Cell,
    CellState,
    Rank,
    Rate,
    Seed,
    Variant,
    grid,
)
from app.commands.compare.launch import check_array, write_launch_file
from app.commands.compare.manifest import GridManifest, read_manifest, update_manifest
from app.commands.compare.ranks import resolve_ranks
from app.commands.compare.resolve import ResolvedRun, Resolver
from app.commands.compare.scheduler import GridRun
from app.commands.compare.settings import RANK, check_reference, method_settings
from app.tracking.config_files import CONFIGS, PROJECT, find_config
from app.utils.command_parser import CommandParser, check_not_misspelt, parse_list
from app.utils.errors import InputError
from app.utils.text import rate_text

COMPARE = """Train methods with several ranks, learning rates and seeds, and report on all of them.

  python train.py compare --config glue_sst2.yaml \\
      --methods lora,lora_one --learning_rates 1e-4,3e-4,1e-3 --seeds 0,1,2

Options of fit, such as --data.path or --trainer.max_steps, go to every run. The same command goes on after an
interruption; a finished run is not repeated, and a wider grid adds to it. Several of these commands may
work on one grid at once."""

REPORT = """Draw tables and plots of finished runs, as report.html, report.md and CSV files.

  python train.py report runs/compare_glue_sst2
  python train.py report runs/glue_sst2/version_0 runs/quickstart --output my_report"""

REFERENCE = "method that the others are compared to; default lora, rslora, or else the best"
ROW_SCORES = ("accuracy", "f1", "mcc", "loss", "task_loss")
SET_BY_COMPARE = {
    "seed_everything": "--seeds",
    "model.method": "--methods",
    "model.optimizer.lr": "--learning_rates",
    "model.optimizer.init_args.lr": "--learning_rates",
    "ckpt_path": "",
    "run": "",
}
"""Options of `fit` that a run gets from `compare`, and what to give instead."""


def compare(arguments: Sequence[str], resolve: Resolver) -> int:
    """Run `compare` with the arguments after its name.

    Returns:
        Exit status: 0, or 1 if a cell has failed or none has finished.

    Raises:
        InputError: An option is wrong, or the runs would not be comparable.
    """
    known = sorted(path.stem for path in (CONFIGS / "methods").glob("*.yaml"))
    given, rest = _parse(arguments, known)
    methods, ranks, rates, seeds = _parse_axes(given, known)
    options = resolving.RunOptions(given.config, rest, resolve)
    runs = resolve_ranks(resolving.resolve_methods(methods, known, options), ranks, options)
    cells = grid(list(runs), rates, seeds)
    folder, manifest = _check_grid(given, cells, runs)
    update_manifest(folder, manifest)
    if given.launch != "local":
        shared = [*options.everything(), f"--name={folder.name}"]
        shared += [f"--test_config={name}" for name in given.test_config]
        shared += [f"--score={given.score}"] if given.score else []
        shared += [f"--reference={given.reference}"] if given.reference else []
        print(write_launch_file(given.launch, folder, cells, shared))
        return 0

    program = [sys.executable, str(PROJECT / "train.py")]

    def next_command(cell: Cell, state: CellState) -> list[str]:
        if state.state == "trained":
            tests = [f"--config={name}" for name in given.test_config]
            return [*program, "test", "--run", str(state.run), *tests]
        return [
            *(*program, "fit", *options.of(cell.method, cell.rank)),
            f"--model.optimizer.init_args.lr={rate_text(cell.learning_rate)}",
            f"--seed_everything={cell.seed}",
            f"--output.root={folder / CELLS_FOLDER}",
            f"--output.name={cell.name}",
            "--ckpt_path=last",
        ]

    run = GridRun(cells, folder, next_command, given.jobs, manifest.benchmarks)
    run.work()
    states = [state.state for state in run.states.values()]
    if "finished" in states:
        _report([folder], folder, given.score, given.reference)
    return 1 if "failed" in states or "finished" not in states else 0


def _parse(arguments: Sequence[str], known: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Return the options of `compare` and those of `fit`; check what needs no configuration."""
    parser = CommandParser("compare", COMPARE)
    add = parser.add_argument
    add("-c", "--config", action="append", default=[], help="as for fit; later files win")
    add("--methods", required=True, help=f"some of {', '.join(known)}")
    add("--ranks", help="such as 8,32,128; default the configuration's model.adapter.r")
    add("--learning_rates", required=True, help="such as 1e-4,3e-4,1e-3")
    add("--seeds", default="0", help="such as 0,1,2 (default 0)")
    add("--name", help="folder below output.root; default compare_ and output.name")
    add("--jobs", type=int, default=1, help="cells at once on this machine")
    launchers = ("local", "slurm", "wandb")
    where = "run here, or write a Slurm array or a W&B sweep"
    add("--launch", choices=launchers, default="local", help=where)
    overlay = "overlay for the test of each run, such as eval/gsm8k.yaml"
    add("--test_config", action="append", default=[], help=overlay)
    add("--score", help="score to report; default accuracy, or the benchmark's")
    add("--reference", help=REFERENCE)
    given, rest = parser.parse_known_args(arguments)
    set_by_compare = SET_BY_COMPARE | ({RANK: "--ranks"} if given.ranks is not None else {})
    for name in (argument.partition("=")[0] for argument in rest):
        instead = set_by_compare.get(name.removeprefix("--"))
        if name.startswith("--") and instead is not None:
            hint = f": give {instead}" if instead else ""
            raise InputError(f"{name} is set by compare for each run{hint}")
    check_not_misspelt(rest, given)
    if given.jobs < 1:
        raise InputError(f"--jobs is {given.jobs}: expected at least 1")
    if given.score and "/" not in given.score and given.score not in ROW_SCORES:
        raise InputError(
            f"--score is {given.score!r}: expected {', '.join(ROW_SCORES)} or a benchmark's, such as "
            "gsm8k/strict"
        )
    if not given.config:
        raise InputError("compare needs a run: name a file with --config, such as glue_sst2.yaml")
    for name in given.test_config:
        find_config(name)
    return given, rest


def _parse_axes(
    given: argparse.Namespace, known: Sequence[str]
) -> tuple[list[str], list[int], list[float], list[int]]:
    """Return methods, ranks (empty where they are the configuration's), learning rates and seeds."""
    rates = "numbers above 0, such as 1e-4,3e-4,1e-3"
    seeds = f"whole numbers from 0 to {2**32 - 1}, such as 0,1,2"
    ranks = "whole numbers from 1, such as 8,32,128"
    return (
        parse_list("--methods", given.methods, Literal[*known], f"some of {', '.join(known)}"),
        [] if given.ranks is None else parse_list("--ranks", given.ranks, Rank, ranks),
        parse_list("--learning_rates", given.learning_rates, Rate, rates),
        parse_list("--seeds", given.seeds, Seed, seeds),
    )


def _check_grid(
    given: argparse.Namespace, cells: list[Cell], runs: dict[Variant, ResolvedRun]
) -> tuple[Path, GridManifest]:
    """Return the comparison's folder and what it is asked for; raise InputError if that is no comparison."""
    configs = {variant.name: run.resolved for variant, run in runs.items()}
    first = next(iter(runs.values()))
    task = resolving.check_methods(configs)
    if given.launch == "slurm":
        check_array(first.resolved)
    output = first.resolved["output"]
    folder = Path(output["root"]) / (given.name or f"compare_{output['name']}")
    if not (folder / CELLS_FOLDER).is_dir():
        resolving.check_validation(first)
    benchmarks = resolving.asked_benchmarks(given.test_config, first)
    resolving.check_score(given.score, first, benchmarks)
    if given.reference is not None:
        before = read_manifest(folder).cells
        check_reference(given.reference, [cell.method for cell in (*cells, *before)])
    settings = {name: method_settings(config) for name, config in configs.items()}
    return folder, GridManifest(task=task, methods=settings, benchmarks=benchmarks, cells=cells)


def report(arguments: Sequence[str]) -> int:
    """Run `report` with the arguments after its name; return the exit status 0.

    Raises:
        InputError: A folder holds no run, or an option is wrong.
    """
    parser = CommandParser("report", REPORT)
    parser.add_argument("runs", nargs="+", type=Path, help="run folders, or folders above them")
    parser.add_argument("--output", type=Path, help="folder to write; default runs/report")
    parser.add_argument("--score", help="score to report; default accuracy, or the benchmark's")
    parser.add_argument("--reference", help=REFERENCE)
    given = parser.parse_args(list(arguments))
    is_grid = len(given.runs) == 1 and (given.runs[0] / CELLS_FOLDER).is_dir()
    usual = given.runs[0] if is_grid else Path("runs") / "report"
    _report(given.runs, given.output or usual, given.score, given.reference)
    return 0


def _report(runs: Sequence[Path], folder: Path, score: str | None, reference: str | None) -> None:
    """Write a report; print its tables and where it is."""
    # pandas and matplotlib take a second to import, which help and wrong options need not wait for.
    from app.commands.compare.collect import collect
    from app.commands.compare.report import write_report

    print(write_report(collect(runs), folder, score, reference))
