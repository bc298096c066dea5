"""When a run writes its checkpoints, and which ones it keeps."""

from contextlib import suppress
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint

from app.run_folder import CHECKPOINT_FOLDER, checkpoint_files, checkpoint_name


class Checkpoints(Checkpoint):
    """Save every few optimizer steps and when training ends; keep the newest file only.

    Args:
        every_n_steps: Optimizer steps between two checkpoints.
    """

    def __init__(self, every_n_steps: int) -> None:
        self.every_n_steps = every_n_steps
        self.folder: Path | None = None
        self._saved_step = self._last_step = 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find the run folder."""
        run = str(trainer.loggers[0].log_dir) if trainer.loggers else None
        run = trainer.strategy.broadcast(run)
        self.folder = Path(run) / CHECKPOINT_FOLDER if run is not None else None

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

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count from the first step of this process."""
        self._last_step = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save if an optimizer step has just been made and it is time."""
        step = trainer.global_step
        stepped, self._last_step = step != self._last_step, step
        # The last step is saved when its scores are known.
        if stepped and step % self.every_n_steps == 0 and step < trainer.estimated_stepping_batches:
            self.save(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the finished run, so that it can be trained further."""
        self.save(trainer)

    def save(self, trainer: Trainer) -> Path | None:
        """Write a checkpoint of this step unless there is one; all processes call it.

        Returns:
            The newest complete checkpoint; None if there is none, or on another process than the first.
        """
        files: Any = trainer.strategy.checkpoint_io
        if self.folder is None:  # trainer.fast_dev_run
            return None
        if trainer.global_step not in (0, self._saved_step):
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
