"""Keep a run's place in its training in every checkpoint, and stand there again after a resume."""

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from app.distributed.collectives import from_first_process
from app.tracking.loggers import run_folder_of
from app.tracking.metrics_table import has_value, rewind_table
from app.training.checkpoint_state import (
    count_batches,
    gather_states,
    normalize_loop_progress,
    random_state,
    seed_anew,
    set_random_state,
)


class MidEpochResume(Callback):
    """Make a resumed run go on with the next batch, as if it had never stopped.

    Listed before all callbacks that save: they save what it has noted at the end of the batch.

    Args:
        seed: The run's seed, for processes that the interrupted run did not have.
        continues: Whether the run goes on in the folder of the checkpoint.
    """

    def __init__(self, seed: int, continues: bool) -> None:
        self.seed = seed
        self.continues = continues
        self._random: dict[str, Any] | None = None
        self._validated = False
        self._resumed: dict[str, Any] = {}

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Take up the random stream of training, whatever has drawn from it since the last batch."""
        if self._random is not None:
            set_random_state(self._random)
        self._validated = False

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Note where the random stream of training stands."""
        self._random = random_state()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note that the validation that follows this batch is done."""
        self._validated = True

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Add what Lightning does not keep."""
        loop = trainer.fit_loop.epoch_loop
        stepped = not loop._should_accumulate()
        if not stepped:
            rank_zero_warn(
                f"a checkpoint is saved between two optimizer steps (after step {trainer.global_step}): a "
                "run resumed from it leaves out the batches since that step. Let val_check_interval and "
                "every_n_train_steps fall on optimizer steps (trainer.accumulate_grad_batches)"
            )
        normalize_loop_progress(checkpoint["loops"], trainer.global_step, stepped)
        self._keep_data_position(trainer, checkpoint)
        checkpoint["random"] = gather_states(self._random or random_state())
        checkpoint["validation_due"] = not self._validated and loop._should_check_val_fx(
            trainer.fit_loop._data_fetcher  # type: ignore[arg-type]
        )
        # Lightning hands the batch's metrics to the loggers after the callbacks that save.
        every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
        logged = trainer.logged_metrics if trainer.global_step % every == 0 else {}
        checkpoint["logged"] = {
            name: float(value) for name, value in logged.items() if name.startswith("train/")
        }
        table = [logger for logger in trainer.loggers if isinstance(logger, WandbLogger)]
        checkpoint["wandb_id"] = table[0].version if table else None

    def _keep_data_position(self, trainer: Trainer, checkpoint: dict[str, Any]) -> None:
        """An epoch may end before its rows do (trainer.limit_train_batches)."""
        name = type(trainer.datamodule).__qualname__  # type: ignore[attr-defined]
        progress = checkpoint["loops"]["fit_loop"]
        if name in checkpoint and progress["epoch_loop.batch_progress"]["is_last_batch"]:
            epoch = progress["epoch_progress"]["current"]["processed"] + 1
            checkpoint[name] = {**checkpoint[name], "epoch": epoch, "done": 0}

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Take over the random stream; count the batches of today's processes."""
        step, rank = checkpoint["global_step"], trainer.global_rank
        states = checkpoint["random"]
        if rank < len(states):
            self._random = states[rank]
        else:
            seed_anew(self.seed, rank, step)
            self._random = random_state()
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        done = checkpoint.get(type(data).__qualname__, {}).get("done", 0)
        if done:
            count_batches(checkpoint["loops"], done // (data.batch_size * trainer.world_size))
        self._resumed = {
            "step": step,
            "validation_due": checkpoint["validation_due"],
            "logged": checkpoint["logged"],
        }

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Drop what the interrupted run has logged after its checkpoint."""
        if self._resumed and self.continues:
            from_first_process(lambda: self._rewind(trainer))

    def _rewind(self, trainer: Trainer) -> None:
        if folder := run_folder_of(trainer.loggers):
            rewind_table(folder.metrics, self._resumed["step"], self._resumed["validation_due"])

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make up for what the interrupted run had left to do after its batch."""
        if not self._resumed:
            return
        fit, loop = trainer.fit_loop, trainer.fit_loop.epoch_loop
        ended = loop.batch_progress.is_last_batch
        self._run_pending(trainer)
        if ended:
            # The next epoch starts as any other: Lightning would take it for the rest of this one.
            loop.restarting = False
            fit.reset_restart_stage()
            loop._batches_that_stepped += 1

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Do the same where nothing was left to train."""
        if self._resumed:
            self._run_pending(trainer)

    def _run_pending(self, trainer: Trainer) -> None:
        self._log_last_step(trainer)
        if self._resumed["validation_due"]:
            self._validate(
                trainer, epochs=int(trainer.fit_loop.epoch_loop.batch_progress.is_last_batch)
            )
        self._resumed = {}

    def _log_last_step(self, trainer: Trainer) -> None:
        step = self._resumed["step"] - 1
        for name, value in self._resumed["logged"].items():
            folder = run_folder_of(trainer.loggers)
            if not self.continues or folder is None:
                return
            if not has_value(folder.metrics, step, name):
                epoch = trainer.fit_loop.epoch_progress.total.ready - 1
                for logger in trainer.loggers:
                    logger.log_metrics({name: value, "epoch": epoch}, step=step)

    def _validate(self, trainer: Trainer, epochs: int) -> None:
        """Run the validation that was due after the last batch, `epochs` (0 or 1) epochs ago."""
        count = trainer.fit_loop.epoch_progress.current
        count.completed -= epochs
        validation = trainer.fit_loop.epoch_loop.val_loop
        validation.restarting = False
        trainer.validating = True
        validation.run()
        trainer.training = True
        count.completed += epochs
