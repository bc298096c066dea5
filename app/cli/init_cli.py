"""`python train.py init`: the initialization of a `fit` alone, as an adapter that other tools train."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback

from app.cli.untrained_cli import UntrainedCLI, check_writable
from app.training.checks import check_init_alone
from app.utils.command_parser import CommandParser
from app.utils.errors import InputError
from app.utils.files import load_yaml
from app.utils.signals import StopSignals
from callbacks.write_init import WriteInit

INIT = """Initialize an adapter as fit does, and write it for another tool to train.

  python train.py init --config quickstart.yaml --output my_adapter

It takes the options of fit (python train.py fit --help); those of the training loop, callbacks and loggers
change nothing. Model, data, seeds and precision are those of fit, so the first training loss of PEFT, TRL,
axolotl, LLaMA-Factory or verl on the same batch is that of fit."""


def init_command(arguments: Sequence[str], signals: StopSignals) -> int:
    """Parse the arguments of `init` and run it; return the exit status."""
    parser = CommandParser("init", INIT)
    parser.add_argument("--output", type=Path, help="folder to write; default ROOT/NAME/init")
    given, rest = parser.parse_known_args(arguments)
    return InitCLI(rest, signals, given.output).status


class InitCLI(UntrainedCLI):
    """A `fit` that stops before its first step and writes the adapter.

    Args:
        arguments: Options of `fit`.
        signals: Note a request to stop.
        target: Folder to write; None for `init` beside the runs of the experiment.
    """

    purpose = "init writes an untrained adapter"

    def __init__(self, arguments: Sequence[str], signals: StopSignals, target: Path | None) -> None:
        self.target = target
        super().__init__("fit", arguments, signals)

    def before_instantiate_classes(self) -> None:
        """Refuse a folder that is there, and leave out what belongs to training."""
        output = self.config.output
        self.target = self.target or Path(output.root) / output.name / "init"
        _check_target(self.target)
        super().before_instantiate_classes()

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        """Make the trainer if there is an adapter that other tools can train."""
        init, model = self.made.init, self.made.model
        name = None if init is None else type(init).__name__
        elsewhere = "" if init is None else init.elsewhere
        check_init_alone(name, elsewhere, model.adapter, model.adapter_path)
        return super().instantiate_trainer(**kwargs)

    def _fit_callbacks(self) -> list[Callback]:
        """List the initialization and what writes it."""
        assert self.target is not None  # from `before_instantiate_classes`
        config = load_yaml(self.config_text)
        init = [] if self.made.init is None else [self.made.init]
        return [*init, WriteInit(self.target, self.config.seed_everything, config)]


def _check_target(folder: Path) -> None:
    """Raise InputError if a folder is there, or cannot be made."""
    if folder.exists():
        raise InputError(
            f"--output is {str(folder)!r}, which exists: remove it or name another folder"
        )
    check_writable(folder)
