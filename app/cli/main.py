"""Choose the command and turn its errors into an exit status."""

import gc
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from app.cli.exit import run_and_exit
from app.distributed.processes import is_first_process
from app.distributed.rendezvous import check_rendezvous
from app.utils.console import shorten_warnings, silence
from app.utils.errors import InputError
from app.utils.signals import StopSignals
from app.utils.text import did_you_mean

if TYPE_CHECKING:
    from app.cli.resolve import ResolvedFit
    from app.commands.one_step.command import Grid

HELP = """Fine-tune a language model with LoRA-One.

  python train.py fit --config quickstart.yaml            train; writes runs/quickstart/version_0
  python train.py fit --config glue_sst2.yaml --config methods/lora.yaml     later files win
  python train.py plan --config quickstart.yaml           does it fit? no weights are loaded
  python train.py init --config quickstart.yaml           the initialization alone, for TRL and others to train
  python train.py one_step --config quickstart.yaml       score W - eta G, and no training
  python train.py validate --run runs/quickstart/version_0    score a finished run's adapter on validation rows
  python train.py test --run runs/quickstart/version_0    score it on test rows, or ask it benchmarks
  python train.py export --run runs/quickstart/version_0 --merge    write a merged model
  python train.py dashboard --entity me                   make a W&B workspace that compares methods
  python train.py theory --config theory/linear.yaml      the paper's theorems and figures, in a minute
  python train.py compare --config glue_sst2.yaml --methods lora,lora_one --learning_rates 1e-4,1e-3
  python train.py report runs/quickstart                  tables and pictures of any runs

python train.py COMMAND --help has the options of each command.
"""

ALONE = ("plan", "export", "dashboard", "theory", "compare", "report")
"""Commands for which one process is enough."""

COMMANDS = ("fit", "init", "one_step", "validate", "test", *ALONE)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: Arguments after the program's name; None takes the process's own.

    Returns:
        Exit status: 0; 1 where `plan` finds too little memory; 2 after an error that is the user's to mend;
        3 where training diverged, with a loss or a gradient that is not finite; 143 after SIGTERM and 130
        after Ctrl-C, with a checkpoint.
    """
    arguments = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    silence()
    with StopSignals() as signals:
        return run_and_exit(lambda: _command(*arguments, signals=signals), signals)


def _command(name: str, *arguments: str, signals: StopSignals) -> int:
    """Run a command; return its exit status."""
    if name in ("-h", "--help"):
        print(HELP, end="")
        return 0
    if name not in COMMANDS:
        raise InputError(
            f"there is no command {name!r}{did_you_mean(name, COMMANDS) or '.'} Expected one of "
            f"{', '.join(COMMANDS)}, and its options behind it"
        )
    check_rendezvous()
    if name in ALONE and not is_first_process():
        return 0
    with _importing():
        run = _imported(name, signals)
    shorten_warnings()  # behind the import of Lightning, which does, too
    return run(arguments)


def _imported(name: str, signals: StopSignals) -> Callable[[Sequence[str]], int]:
    """Import a command, and of the others nothing: torch and Lightning alone take seconds."""
    if name == "export":
        from app.commands.export import export_command

        return export_command
    if name == "dashboard":
        from app.commands.compare.dashboard import dashboard_command

        return dashboard_command
    if name == "theory":
        from app.commands.theory.command import theory_command

        return theory_command
    if name == "report":
        from app.commands.compare.command import report

        return report
    if name == "compare":
        from app.commands.compare.command import compare

        return lambda arguments: compare(arguments, _resolve_run)
    if name == "init":
        from app.cli.init_cli import init_command

        return lambda arguments: init_command(arguments, signals)
    if name == "one_step":
        from app.commands.one_step.command import one_step

        return lambda arguments: one_step(arguments, partial(_score_steps, signals))
    from app.cli.lora_cli import LoraCLI

    return lambda arguments: LoraCLI(name, arguments, signals).status


def _score_steps(
    signals: StopSignals, options: Sequence[str], grid: "Grid", folder: Path | None
) -> int:
    """Score the steps of a grid; what does is imported where `one_step` has checked its own options."""
    with _importing():
        from app.cli.one_step_cli import OneStepCLI

    return OneStepCLI(options, grid, folder, signals).status


def _resolve_run(options: Sequence[str]) -> "ResolvedFit":
    """Resolve the options of a `fit`; the parser is imported where `compare` has checked its own options."""
    with _importing():
        from app.cli.resolve import resolve_run

    return resolve_run(options)


@contextmanager
def _importing() -> Iterator[None]:
    """Look for garbage neither while modules are imported nor later among the million objects they are."""
    collects, before = gc.isenabled(), len(sys.modules)
    gc.disable()
    try:
        yield
    finally:
        if len(sys.modules) > before:
            gc.freeze()
        if collects:
            gc.enable()
