"""`python train.py theory`: the figures of arXiv:2502.01235 and its inequalities on random instances."""

import csv
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import get_type_hints

import numpy as np
from numpy.random import default_rng
from tqdm.auto import tqdm

from app.commands.theory import alignment, experiments
from app.commands.theory.figures import Picture, draw
from app.commands.theory.settings import TheorySettings
from app.commands.theory.theorems import THEOREMS, Check, Theorem
from app.tracking.config_files import expand
from app.tracking.run_folder import SUMMARY_FILE, new_run_folder
from app.utils.arguments import Parser, PlainHelp
from app.utils.console import on_terminal
from app.utils.errors import InputError
from app.utils.files import write_json

RESULTS_FILE = "results.csv"
DESCRIPTION = """Draw the paper's theory figures and check its theorems on random instances, in float64.

  python train.py theory --config theory/linear.yaml      writes runs/theory_linear/version_0
  python train.py theory --config theory/relu.yaml --problem.kappa 10

The exit status is 0 if every inequality holds and 1 if one does not.
"""
SECTIONS = get_type_hints(TheorySettings)
"""The settings' classes by the names of their sections."""

Experiment = Callable[[TheorySettings], list[Picture]]
OF_BOTH_MODELS: list[Experiment] = [
    experiments.spectral_error,
    experiments.loss_by_kappa,
    experiments.steps_by_kappa,
    experiments.error_by_rank,
]
EXPERIMENTS: dict[str, list[Experiment]] = {
    "linear": [
        alignment.angles,
        alignment.angle_by_size,
        alignment.alignment_time,
        alignment.paths,
        experiments.steps_by_damping,
        *OF_BOTH_MODELS,
    ],
    "relu": [alignment.relu_angles, experiments.error_by_gamma, *OF_BOTH_MODELS],
}
"""The figures of each kind of problem."""


def theory_command(arguments: Sequence[str]) -> int:
    """Run `theory` with the arguments after its name; return 0 if every inequality holds, else 1.

    Raises:
        InputError: If a setting is unknown or wrong, or the folder cannot be written.
    """
    for argument in arguments:
        if argument.partition("=")[0] == "--run":
            raise InputError(
                "there is no setting run for theory; see python train.py theory --help"
            )
    parser = Parser(prog="train.py theory", description=DESCRIPTION, formatter_class=PlainHelp)
    parser.add_argument("-c", "--config", action="config", help="Path or name of a YAML file.")
    for name, kind in SECTIONS.items():
        parser.add_class_arguments(kind, name)
    config = parser.parse_args(expand(arguments))
    made = parser.instantiate(config)
    settings = TheorySettings(**{name: made[name] for name in SECTIONS})
    folder = new_run_folder(Path(settings.output.root) / settings.output.name)
    parser.save(config, str(folder.config), multifile=False)
    return run(settings, folder.path)


def run(settings: TheorySettings, folder: Path) -> int:
    """Check the theorems, draw the figures and write both into an empty folder.

    Writes results.csv (figure, panel, curve, x, y), summary.json (the table of theorems) and a PNG for
    each figure.
    """
    begin = time.perf_counter()
    checks, pictures = _checks_and_pictures(settings, folder)
    with (folder / RESULTS_FILE).open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(("figure", "panel", "curve", "x", "y"))
        for picture in pictures:
            writer.writerows(picture.rows())
    summary = {
        "kind": settings.problem.kind,
        "seconds": round(time.perf_counter() - begin, 1),
        "holds": all(check.holds for check in checks),
        "theorems": [
            {
                "theorem": check.name,
                "statement": check.statement,
                "instances": len(check.measured),
                # JSON has no NaN
                "worst_measured_over_bound": check.worst if np.isfinite(check.worst) else None,
                "holds": check.holds,
            }
            for check in checks
        ],
        "figures": [f"{picture.name}.png" for picture in pictures],
    }
    write_json(folder / SUMMARY_FILE, summary)
    print(table(checks))
    print(f"wrote {folder} in {summary['seconds']:.0f} s")
    return 0 if summary["holds"] else 1


def _checks_and_pictures(
    settings: TheorySettings, folder: Path
) -> tuple[list[Check], list[Picture]]:
    """Check the theorems, then make and draw the figures, and show the progress."""
    kind, checks, pictures = settings.problem.kind, list[Check](), list[Picture]()

    def check(theorem: Theorem) -> None:
        rng = default_rng(settings.problem.seed)
        checks.extend(theorem(rng, settings.output.instances))

    def show(experiment: Experiment) -> None:
        for picture in experiment(settings):
            pictures.append(picture)
            draw(picture, folder)

    def convergence_bounds(_: TheorySettings) -> list[Picture]:
        return experiments.convergence_bounds([check for check in checks if check.over_steps])

    parts = [(f"theorem: {name}", partial(check, given)) for name, given in THEOREMS[kind].items()]
    for experiment in (*EXPERIMENTS[kind], convergence_bounds):
        name = experiment.__name__.replace("_", " ")
        parts.append((f"figure: {name}", partial(show, experiment)))
    bar = tqdm(parts, leave=False, dynamic_ncols=True, disable=not on_terminal())
    for i, (label, part) in enumerate(bar):
        bar.set_description(label)
        before = time.perf_counter()
        part()
        if not on_terminal():
            seconds = time.perf_counter() - before
            print(f"{i + 1}/{len(parts)} {label}, {seconds:.1f} s", flush=True)
    return checks, pictures


def table(checks: Sequence[Check]) -> str:
    """Return one line for each inequality: theorem, instances, worst measured / bound, whether it holds."""
    width = max(len(check.name) for check in checks)
    lines = [f"{'theorem':<{width}}  instances  measured/bound  holds  inequality"]
    for check in checks:
        holds = "yes" if check.holds else "NO"
        numbers = f"{len(check.measured):>9}  {check.worst:>14.3g}  {holds:<5}"
        lines.append(f"{check.name:<{width}}  {numbers}  {check.statement}")
    return "\n".join(lines)
