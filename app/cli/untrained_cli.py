"""A `fit` that stops before its first step and leaves no run folder."""

import os
from pathlib import Path
from typing import ClassVar

from jsonargparse import Namespace
from lightning.pytorch.loggers import Logger

from app.cli.lora_cli import LoraCLI
from app.utils.errors import InputError

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


class UntrainedCLI(LoraCLI):
    """What `init` and `one_step` share: options of `fit`, and no training."""

    purpose: ClassVar[str]  # what it does instead of going on from a checkpoint

    def _resume_from(self, ckpt_path: str) -> None:
        """Refuse a checkpoint, whether or not there is one."""
        raise InputError(f"ckpt_path is set, but {self.purpose}: leave it out")

    def before_instantiate_classes(self) -> None:
        """Leave out what belongs to training."""
        self.config.trainer.update(Namespace(WITHOUT_TRAINING))

    def _run_loggers(self) -> list[Logger]:
        """Make no run folder."""
        return []


def check_writable(folder: Path) -> None:
    """Raise InputError if a folder of the option --output cannot be made, or written."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not (there.is_dir() and os.access(there, os.W_OK | os.X_OK)):
        raise InputError(
            f"--output is {str(folder)!r}, but {there} is no folder that can be written: name another"
        )
