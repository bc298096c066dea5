"""Save and stop after a signal; requeue the Slurm job."""

import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from app.distributed.collectives import from_first_process, largest_over_processes
from app.training.lightning_internals import step_has_ended
from app.utils.signals import Stopped, StopSignals, exit_status

PRECEDENCE = (None, signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
"""If processes have got different signals, the last of these counts for all: Slurm's warning."""


class Preemption(Callback):
    """Stop after the optimizer step during which a signal came, with a checkpoint.

    Args:
        signals: Note a request to stop.
        save: Writes a checkpoint on all processes and returns the newest complete one; None if the run
            has no checkpoints.
    """

    def __init__(self, signals: StopSignals, save: Callable[[Trainer], Path | None] | None) -> None:
        self.signals = signals
        self.save = save
        self._stepped = True  # whether the last batch ended an optimizer step

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """From now on signals are noted only: Lightning has just installed its own handlers."""
        self.signals.install()
        self.signals.deferred = True

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Stop if any process was asked to; never between two optimizer steps."""
        self._stepped = step_has_ended(trainer)
        if self._stepped:
            self.stop_if_asked(trainer, pl_module)

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, *_: Any
    ) -> None:
        """Stop in the middle of a validation, too: the resumed run makes it from its beginning."""
        if self.signals.deferred and self._stepped:
            self.stop_if_asked(trainer, pl_module)

    def stop_if_asked(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save and raise `Stopped` if any process has got a signal; all processes call it."""
        mine = PRECEDENCE.index(self.signals.received)
        number = PRECEDENCE[largest_over_processes(mine, pl_module.device)]
        if number is None:
            return
        step, path = trainer.global_step, None
        if self.save is not None:
            path = self.save(trainer)
        status = exit_status(number)
        requeues = number == signal.SIGUSR1 and "SLURM_JOB_ID" in os.environ
        if requeues and from_first_process(requeue):
            status = 0
        kept = (
            f"the last checkpoint is {path}; the same command with `--ckpt_path last` goes on from it"
            if path is not None
            else "there is no checkpoint"
        )
        raise Stopped(status, f"{number.name}: stopped after step {step}; {kept}", together=True)


def requeue() -> bool:
    """Ask Slurm to start this job again.

    Returns:
        Whether it will.
    """
    job = os.environ["SLURM_JOB_ID"]
    if "SLURM_ARRAY_JOB_ID" in os.environ:
        job = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    try:
        done = subprocess.run(
            ["scontrol", "requeue", job], capture_output=True, text=True, check=False, timeout=60
        )
        reason = done.stderr.strip()
    except (OSError, subprocess.TimeoutExpired) as error:
        reason = str(error)
    else:
        if done.returncode == 0:
            return True
    rank_zero_warn(f"Slurm did not requeue job {job} ({reason}): submit it again")
    return False
