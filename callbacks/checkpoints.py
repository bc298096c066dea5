"""When a run writes its checkpoints, and which ones it keeps."""

from contextlib import suppress
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint

from app.tracking.loggers import run_folder_of
from app.tracking.run_folder import checkpoint_files, checkpoint_name


class Checkpoints(Checkpoint):
    """Save every few optimizer steps and when training ends; keep the newest file only.

    Args:
        every_n_steps: Optimizer steps between two checkpoints.
    """

    def __init__(self, every_n_steps: int) -> None:
        self.every_n_steps = every_n_steps
        self.folder: Path | None = None
        self._saved_step = self._last_step = 0
        self._scored = (
            False  # whether the checkpoint that the run goes on from has its final scores
        )

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find the run folder."""
        run = trainer.strategy.broadcast(run_folder_of(trainer.loggers))
        self.folder = None if run is None else run.checkpoints

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Remember which step is on the disk already."""
        path = trainer.ckpt_path
        if (
            self.folder is not None
            and path
            and Path(path).resolve().parent == self.folder.resolve()
        ):
            self._saved_step = checkpoint["global_step"]

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """See whether the run has ended already."""
        self._scored = "final" in pl_module.record.metrics  # type: ignore[operator, union-attr]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count from the first step of this process."""
        self._last_step = trainer.global_step
        self._scored = False

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save if an optimizer step has just been made and it is time."""
        step = trainer.global_step
        stepped, self._last_step = step != self._last_step, step
        # A validation may follow the last step, and the final scores do: both can take long.
        last = step >= trainer.estimated_stepping_batches
        if stepped and (last or step % self.every_n_steps == 0):
            self.save(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save what has been trained before it is scored."""
        self.save(trainer)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the finished run with its scores, so that it can be trained further."""
        if not self._scored:
            self.save(trainer, again=True)

    def save(self, trainer: Trainer, again: bool = False) -> Path | None:
        """Write a checkpoint of this step unless there is one; all processes call it.

        Args:
            trainer: The trainer.
            again: Replace one that there is.

        Returns:
            The newest complete checkpoint; None if there is none, or on another process than the first.
        """
        files: Any = trainer.strategy.checkpoint_io
        if self.folder is None:  # trainer.fast_dev_run
            return None
        if trainer.global_step not in (0, None if again else self._saved_step):
            self._saved_step = trainer.global_step
            path = self.folder / checkpoint_name(trainer.global_step)
            for logger in trainer.loggers:
                logger.save()  # what a resumed run continues must be on the disk, too
            trainer.save_checkpoint(path, weights_only=False)
            if files.complete == path:
                for other in checkpoint_files(self.folder):
                    if other != path:
                        with suppress(OSError):
                            other.unlink()
        return files.complete
