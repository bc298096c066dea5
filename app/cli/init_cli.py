"""`python train.py init`: the initialization of a `fit` alone, as an adapter that other tools train."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jsonargparse import Namespace
from lightning.pytorch import Callback
from lightning.pytorch.loggers import Logger

from app.cli.lora_cli import LoraCLI
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

WITHOUT_TRAINING = {
    "callbacks": None,
    "logger": False,
    "enable_checkpointing": False,
    "num_sanity_val_steps": 0,
    "fast_dev_run": False,
    "min_epochs": None,
    "max_epochs": None,
    "max_time": None,
    "min_steps": None,
    "max_steps": 1,  # an end for the schedule of the learning rate
    "overfit_batches": 0.0,
    **{f"limit_{split}_batches": None for split in ("train", "val", "test", "predict")},
    "val_check_interval": None,
    "check_val_every_n_epoch": 1,
    "accumulate_grad_batches": 1,
    "gradient_clip_val": None,
    "gradient_clip_algorithm": None,
    "log_every_n_steps": None,
}
"""Settings of the trainer, whatever the configuration has."""


def init_command(arguments: Sequence[str], signals: StopSignals) -> int:
    """Parse the arguments of `init` and run it; return the exit status."""
    parser = CommandParser("init", INIT)
    parser.add_argument("--output", type=Path, help="folder to write; default ROOT/NAME/init")
    given, rest = parser.parse_known_args(arguments)
    return InitCLI(rest, signals, given.output).status


class InitCLI(LoraCLI):
    """A `fit` that stops before its first step and writes the adapter.

    Args:
        arguments: Options of `fit`.
        signals: Note a request to stop.
        target: Folder to write; None for `init` beside the runs of the experiment.
    """

    def __init__(self, arguments: Sequence[str], signals: StopSignals, target: Path | None) -> None:
        self.target = target
        super().__init__("fit", arguments, signals)

    def _resume_from(self, ckpt_path: str) -> None:
        """Refuse a checkpoint, whether or not there is one."""
        raise InputError("ckpt_path is set, but init writes an untrained adapter: leave it out")

    def before_instantiate_classes(self) -> None:
        """Refuse a folder that is there, and leave out what belongs to training."""
        output = self.config.output
        self.target = self.target or Path(output.root) / output.name / "init"
        _check_target(self.target)
        self.config.trainer.update(Namespace(WITHOUT_TRAINING))

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        """Make the trainer if there is an adapter that other tools can train."""
        init, model = self.made.init, self.made.model
        name = None if init is None else type(init).__name__
        subtracts = init is not None and init.subtracts_from_base
        check_init_alone(name, subtracts, model.adapter, model.adapter_path)
        return super().instantiate_trainer(**kwargs)

    def _run_loggers(self) -> list[Logger]:
        """Make no run folder."""
        return []

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
    above = next(parent for parent in folder.absolute().parents if parent.exists())
    if not (above.is_dir() and os.access(above, os.W_OK | os.X_OK)):
        raise InputError(
            f"--output is {str(folder)!r}, but {above} is no folder that can be written: name another"
        )
