"""Choose the command and turn its errors into an exit status."""

import sys
from collections.abc import Sequence

from app.cli.exit import run_and_exit
from app.distributed.collectives import is_first_process
from app.distributed.rendezvous import check_rendezvous
from app.utils.console import silence
from app.utils.signals import StopSignals


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
        return run_and_exit(lambda: _command(arguments, signals), signals)


def _command(arguments: list[str], signals: StopSignals) -> int:
    """Run a command; return its exit status."""
    check_rendezvous()
    alone = ("plan", "export", "theory", "dashboard", "compare", "report")
    if arguments[0] in alone and not is_first_process():
        return 0  # one process is enough
    # Each command imports its own package, when it is run.
    if arguments[0] == "export":
        from app.commands.export import export_command

        return export_command(arguments[1:])
    if arguments[0] == "dashboard":
        from app.commands.compare.dashboard import dashboard_command

        return dashboard_command(arguments[1:])
    if arguments[0] == "theory":
        from app.commands.theory.command import theory_command

        return theory_command(arguments[1:])
    if arguments[0] == "report":
        from app.commands.compare.command import report

        return report(arguments[1:])
    if arguments[0] == "compare":
        from app.cli.resolve import resolve_run
        from app.commands.compare.command import compare

        return compare(arguments[1:], resolve_run)
    if arguments[0] == "init":
        from app.cli.init_cli import init_command

        return init_command(arguments[1:], signals)
    from app.cli.lora_cli import LoraCLI

    return LoraCLI(arguments, signals).status
