"""Let a resumed run go on with the next batch, in the middle of an epoch."""

from dataclasses import dataclass
from typing import Any

import yaml
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from app.distributed.collectives import from_first_process
from app.tracking.loggers import run_folder_of
from app.tracking.metrics_table import has_value, rewind_table
from app.training import lightning_internals as loops
from app.training.checkpoint_state import gather_states, random_state, seed_anew, set_random_state
from app.training.protocols import data_of
from app.training.resume import ResumePoint
from app.training.resume_checks import check_rows, rows_digest
from app.training.scores import return_to_device


@dataclass(frozen=True)
class Pending:
    """What the interrupted run had still to do for the batch of its checkpoint."""

    step: int  # optimizer steps at the checkpoint
    validation_due: bool  # whether a validation follows the batch
    scored: bool  # whether the final scores are in the checkpoint
    logged: dict[str, float]  # Lightning hands these to the loggers after the callbacks that save


class MidEpochResume(Callback):
    """Save the place of a run in its training with every checkpoint, and resume there.

    Listed before all callbacks that save: they save what it has noted at the end of the batch. The place
    among the rows is the data module's state, counted in rows of all processes together, so that another
    number of processes goes on with the same next row. torchdata's `StatefulDataLoader` saves the batches of
    one process instead: a run of two processes that it resumes on one repeats some rows and leaves out others.

    Args:
        seed: The run's seed, for processes that the interrupted run did not have.
        settings: The resolved configuration, as YAML.
        point: Where the run goes on; None for a new one.
    """

    def __init__(self, seed: int, settings: str, point: ResumePoint | None) -> None:
        self.seed = seed
        self.settings = settings
        self.point = point
        self.continues = point is not None and point.folder is not None
        self._rows = ""
        self._random: dict[str, Any] | None = None
        self._stepped = self._validated = False
        self._pending: Pending | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse other training rows than those of the interrupted run, before a model is loaded."""
        self._rows = rows_digest(data_of(trainer).rows("train"))
        if self.point is not None:
            check_rows(self.point, self._rows)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Take up the random stream of training, whatever has drawn from it since the last batch."""
        if self._random is not None:
            set_random_state(self._random)
        self._validated = False

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Note the random stream of training, and whether the batch ended an optimizer step."""
        self._random = random_state()
        self._stepped = loops.step_has_ended(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note that the validation that follows this batch is done."""
        self._validated = True

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Add what Lightning does not keep."""
        if not self._stepped:
            rank_zero_warn(
                f"a checkpoint is saved between two optimizer steps (after step {trainer.global_step}): a "
                "run resumed from it leaves out the batches since that step. Let val_check_interval and "
                "every_n_train_steps fall on optimizer steps (trainer.accumulate_grad_batches)"
            )
        loops.set_batch_end(checkpoint["loops"], trainer.global_step, self._stepped)
        epoch, data = loops.next_epoch(checkpoint["loops"]), _data_key(trainer)
        if epoch is not None and data in checkpoint:
            # An epoch may end before its rows do (trainer.limit_train_batches).
            checkpoint[data] = {**checkpoint[data], "epoch": epoch, "done": 0}
        checkpoint["random"] = gather_states(self._random or random_state())
        checkpoint["validation_due"] = not self._validated and loops.validation_is_due(trainer)
        every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]  # set by its connector
        logged = trainer.logged_metrics if every and trainer.global_step % every == 0 else {}
        checkpoint["logged"] = {
            name: float(value) for name, value in logged.items() if name.startswith("train/")
        }
        wandb = [logger for logger in trainer.loggers if isinstance(logger, WandbLogger)]
        checkpoint["wandb_id"] = wandb[0].version if wandb else None
        checkpoint["rows"] = self._rows
        # Those that training began with: what its checkpoint overrules is not what is computed with.
        known = None if self.point is None else self.point.settings
        checkpoint["settings"] = self.settings if known is None else yaml.safe_dump(known)

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Take over the random stream; count the batches of today's processes."""
        step, rank, states = checkpoint["global_step"], trainer.global_rank, checkpoint["random"]
        if rank < len(states):
            self._random = states[rank]
        else:
            seed_anew(self.seed, rank, step)
            self._random = random_state()
        rows = checkpoint.get(_data_key(trainer), {}).get("done", 0)
        if rows:
            batch_rows = data_of(trainer).batch_size * trainer.world_size
            loops.set_batches(checkpoint["loops"], rows // batch_rows)
        self._stepped = True
        scored = checkpoint["callbacks"].get("ScoreAt[final]", {}).get("step") == step
        self._pending = Pending(step, checkpoint["validation_due"], scored, checkpoint["logged"])

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Drop what the interrupted run has logged after its checkpoint."""
        if self._pending is not None and self.continues:
            from_first_process(lambda: self._rewind(trainer))

    def _rewind(self, trainer: Trainer) -> None:
        folder, pending = run_folder_of(trainer.loggers), self._pending
        if folder is not None and pending is not None:
            rewind_table(folder.metrics, pending.step, pending.validation_due, pending.scored)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Do what the interrupted run had left to do for its batch."""
        if self._pending is not None:
            loops.resume_accumulation(trainer)
            ended = loops.epoch_has_ended(trainer)
            self._run_pending(trainer, self._pending)
            if ended:
                loops.leave_ended_epoch(trainer)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Do the same where nothing was left to train."""
        if self._pending is not None:
            return_to_device(trainer)
            self._run_pending(trainer, self._pending)

    def _run_pending(self, trainer: Trainer, pending: Pending) -> None:
        folder, step = run_folder_of(trainer.loggers), pending.step - 1
        for name, value in pending.logged.items():
            if self.continues and folder and not has_value(folder.metrics, step, name):
                for logger in trainer.loggers:
                    logger.log_metrics({name: value, "epoch": loops.current_epoch(trainer)}, step)
        if pending.validation_due:
            loops.run_validation(trainer)
        self._pending = None


def _data_key(trainer: Trainer) -> str:
    """Return the key of the data module's state in a checkpoint."""
    return type(data_of(trainer)).__qualname__
