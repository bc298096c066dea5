"""When a run writes its checkpoints, and which ones it keeps."""

from contextlib import suppress
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint

from app.tracking.loggers import run_folder_of
from app.tracking.run_folder import checkpoint_files, checkpoint_name
from app.training.checkpoint_io import CheckpointFiles
from app.training.lightning_internals import step_has_ended, total_steps
from app.training.protocols import adapted
from app.training.trainer_checks import is_misconfiguration


class Checkpoints(Checkpoint):
    """Save every few optimizer steps and when training ends; keep the newest file only.

    Lightning's `ModelCheckpoint(every_n_train_steps=...)` has no public method to save when a signal asks for
    it, saves neither before the validation that follows the last step nor again with the final scores, and
    deletes the file before even where the new one could not be written.

    Args:
        every_n_steps: Optimizer steps between two checkpoints.
    """

    def __init__(self, every_n_steps: int) -> None:
        self.every_n_steps = every_n_steps
        self.folder: Path | None = None
        self._tried_step = 0
        self._scored = False  # whether the run has ended already, with its final scores

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find the run folder."""
        run = trainer.strategy.broadcast(run_folder_of(trainer.loggers))
        self.folder = None if run is None else run.checkpoints

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """See whether the run has ended already."""
        self._scored = "final" in adapted(pl_module).record.metrics

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note that there is something to train, and so to score."""
        self._scored = False

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Save if an optimizer step has just been made and it is time."""
        step = trainer.global_step
        # A validation may follow the last step, and the final scores do: both can take long.
        last = step >= total_steps(trainer)
        if step_has_ended(trainer) and (last or step % self.every_n_steps == 0):
            self.save(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save what has been trained before it is scored."""
        self.save(trainer)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the finished run with its scores, so that it can be trained further."""
        if not self._scored:
            self.save(trainer, again=True)

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Save what has been trained where a callback misses the metric that it monitors."""
        if isinstance(exception, Exception) and is_misconfiguration(exception):
            self.save(trainer)

    def save(self, trainer: Trainer, again: bool = False) -> Path | None:
        """Write a checkpoint of this step unless that has been tried; all processes call it.

        Args:
            trainer: Its step.
            again: Replace one that there is.

        Returns:
            The newest complete checkpoint; None if there is none, or on another process than the first.
        """
        if self.folder is None:  # trainer.fast_dev_run
            return None
        files, step = trainer.strategy.checkpoint_io, trainer.global_step
        path = self.folder / checkpoint_name(step)
        # A plugin of the user's raises what goes wrong.
        own = files if isinstance(files, CheckpointFiles) else None
        last = None if own is None else own.complete
        known = step == self._tried_step or (last is not None and last.resolve() == path.resolve())
        if step > 0 and (again or not known):
            self._tried_step = step
            for logger in trainer.loggers:
                logger.save()  # what a resumed run continues must be on the disk, too
            trainer.save_checkpoint(path, weights_only=False)
            if own is None or own.complete == path:
                for other in checkpoint_files(self.folder):
                    if other != path:
                        with suppress(OSError):
                            other.unlink()
        return path if own is None else own.complete
