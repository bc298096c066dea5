"""`python train.py compare` and `python train.py report`."""

import argparse
import difflib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from app.commands.compare.cells import (
    CELLS_FOLDER,
    Cell,
    CellState,
    grid,
    parse_methods,
    parse_rates,
    parse_seeds,
)
from app.commands.compare.collect import collect
from app.commands.compare.launch import check_array, instructions, write_array, write_sweep
from app.commands.compare.manifest import Plan, update_manifest
from app.commands.compare.options import RunOptions
from app.commands.compare.report import write_report
from app.commands.compare.resolve import (
    Resolver,
    asked_benchmarks,
    check_methods,
    check_score,
    check_validation,
    resolve_methods,
    rows_to_set_aside,
)
from app.commands.compare.scheduler import GridRun, start_process
from app.commands.compare.settings import method_settings
from app.tracking.config_files import CONFIGS, PROJECT, find_config
from app.utils.errors import InputError
from app.utils.text import rate_text

COMPARE = """Train methods with several learning rates and seeds, and report on all of them.

  python train.py compare --config glue_sst2.yaml \\
      --methods lora,lora_one --learning_rates 1e-4,3e-4,1e-3 --seeds 0,1,2

Options of fit, such as --data.path or --trainer.max_steps, go to every run. The same command goes on after an
interruption; a finished run is not repeated, and a wider grid adds to it. Several of these commands may
work on one grid at once."""

REPORT = """Draw tables and pictures of finished runs, as report.html, report.md and CSV files.

  python train.py report runs/compare_glue_sst2
  python train.py report runs/glue_sst2/version_0 runs/quickstart --output my_report"""

OWN = ("seed_everything", "ckpt_path", "run", "model.method")
ROW_SCORES = ("accuracy", "f1", "mcc", "loss")
RATE_NAMES = ("model.optimizer.lr", "model.optimizer.init_args.lr")


class _Parser(argparse.ArgumentParser):
    """argparse, with errors like those of the other commands."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}; see python {self.prog} --help")


def _parser(name: str, description: str) -> _Parser:
    return _Parser(
        f"train.py {name}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def compare(arguments: Sequence[str], resolve: Resolver) -> int:
    """Run `compare` with the arguments after its name.

    Args:
        arguments: The command line.
        resolve: Resolves the options of a `fit`.

    Returns:
        Exit status: 0, or 1 if a cell has failed or none has finished.

    Raises:
        InputError: An option is wrong, or the runs would not be comparable.
    """
    known = sorted(path.stem for path in (CONFIGS / "methods").glob("*.yaml"))
    parser = _parser("compare", COMPARE)
    parser.add_argument(
        "-c", "--config", action="append", default=[], help="as for fit; later files win"
    )
    parser.add_argument("--methods", required=True, help=f"some of {', '.join(known)}")
    parser.add_argument("--learning_rates", required=True, help="such as 1e-4,3e-4,1e-3")
    parser.add_argument("--seeds", default="0", help="such as 0,1,2 (default 0)")
    parser.add_argument("--name", help="folder below output.root; default compare_ and output.name")
    parser.add_argument("--jobs", type=int, default=1, help="cells at once on this machine")
    parser.add_argument(
        "--launch",
        choices=("local", "slurm", "wandb"),
        default="local",
        help="run here, or write a Slurm array or a W&B sweep",
    )
    parser.add_argument(
        "--test_config",
        action="append",
        default=[],
        help="overlay for the test of each run, such as eval/gsm8k.yaml",
    )
    parser.add_argument("--score", help="score to report; default accuracy, or the benchmark's")
    given, rest = parser.parse_known_args(arguments)
    _check_rest(rest, parser)
    methods = parse_methods(given.methods, known)
    rates, seeds = parse_rates(given.learning_rates), parse_seeds(given.seeds)
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

    options = RunOptions(given.config, rest)
    runs = resolve_methods(methods, known, options, resolve)
    size = rows_to_set_aside(runs[methods[0]])
    if size is not None:
        print(
            f"{size:,} training rows are set aside to choose learning rates on (data.validation_size)"
        )
        options.groups.append([f"--data.validation_size={size}"])
        runs = {method: resolve(options.of(method)) for method in methods}
    configs = {method: run.resolved for method, run in runs.items()}
    for method, config in configs.items():
        if "lr" not in (config["model"]["optimizer"].get("init_args") or {}):
            raise InputError(
                f"method {method}: its optimizer has no setting lr, which compare varies"
            )
    task = check_methods(configs)
    output = configs[methods[0]]["output"]
    folder = Path(output["root"]) / (given.name or f"compare_{output['name']}")
    cells = grid(methods, rates, seeds)
    if given.launch == "slurm":
        check_array(configs[methods[0]])
    if not (folder / CELLS_FOLDER).is_dir():
        check_validation(runs[methods[0]])
    benchmarks = asked_benchmarks(given.test_config, runs[methods[0]])
    check_score(given.score, runs[methods[0]], benchmarks)
    settings = {method: method_settings(config) for method, config in configs.items()}
    update_manifest(folder, Plan(cells, task, settings, benchmarks))

    own = [f"--name={folder.name}", *(f"--test_config={name}" for name in given.test_config)]
    own += [f"--score={given.score}"] if given.score else []
    if given.launch != "local":
        everything = [*options.everything(), *own]
        if given.launch == "slurm":
            path = write_array(folder, cells, everything)
        else:
            path = write_sweep(folder, methods, rates, seeds, everything)
        print(instructions(path))
        return 0

    program = [sys.executable, str(PROJECT / "train.py")]
    tests = [f"--config={name}" for name in given.test_config]

    def command(cell: Cell, found: CellState) -> list[str]:
        if found.state == "trained":
            return [*program, "test", "--run", str(found.run), *tests]
        return [
            *(*program, "fit", *options.of(cell.method)),
            f"--model.optimizer.init_args.lr={rate_text(cell.learning_rate)}",
            f"--seed_everything={cell.seed}",
            f"--output.root={folder / CELLS_FOLDER}",
            f"--output.name={cell.name}",
            "--ckpt_path=last",
        ]

    work = GridRun(cells, folder, command, given.jobs, start_process, benchmarks)
    work.run()
    states = [found.state for found in work.states.values()]
    if "finished" in states:
        _report([folder], folder, given.score)
    return 1 if "failed" in states or "finished" not in states else 0


def report(arguments: Sequence[str]) -> int:
    """Run `report` with the arguments after its name.

    Returns:
        Exit status: 0.

    Raises:
        InputError: A folder holds no run, or an option is wrong.
    """
    parser = _parser("report", REPORT)
    parser.add_argument("runs", nargs="+", type=Path, help="run folders, or folders above them")
    parser.add_argument("--output", type=Path, help="folder to write; default runs/report")
    parser.add_argument("--score", help="score to report; default accuracy, or the benchmark's")
    given = parser.parse_args(list(arguments))
    first: Path = given.runs[0]
    is_comparison = len(given.runs) == 1 and (first / CELLS_FOLDER).is_dir()
    usual = first if is_comparison else Path("runs") / "report"
    _report(given.runs, given.output or usual, given.score)
    return 0


def _report(folders: Sequence[Path], output: Path, score: str | None) -> None:
    print(write_report(collect(folders), output, score))


def _check_rest(rest: Sequence[str], parser: argparse.ArgumentParser) -> None:
    """Refuse options that `compare` sets itself, and misspelt ones of its own."""
    own = [name for action in parser._actions for name in action.option_strings]
    for argument in rest:
        name = argument.partition("=")[0]
        key = name.removeprefix("--")
        if key in RATE_NAMES:
            raise InputError(f"{name} is what compare varies: give --learning_rates")
        if key in OWN:
            instead = {"seed_everything": "--seeds", "model.method": "--methods"}
            hint = f": give {instead[key]}" if key in instead else ""
            raise InputError(f"{name} is set by compare for each run{hint}")
        close = difflib.get_close_matches(name, own, n=1, cutoff=0.8)
        if name.startswith("--") and "." not in name and close:
            raise InputError(f"there is no option {name}; did you mean {close[0]}?")
