"""Score the model on the validation set at a named moment of a run."""

from collections.abc import Callable
from typing import Any, Literal

from lightning.pytorch import Callback, LightningModule, Trainer

from app.evaluation.scoring import Scoring
from app.tracking.loggers import run_folder_of
from app.tracking.row_scores import remove_row_scores, write_row_scores
from app.training.protocols import adapted, data_of, logged_scores
from app.training.scores import return_to_device, score
from app.utils.console import warn_on_failure

Moment = Literal["zero_shot", "after_init", "final"]


class ScoreAt(Callback):
    """Record the validation scores before training, after the initialization, or at the end (each row's, too).

    Args:
        moment: `zero_shot` and `after_init` score when fitting starts, in the order of the callbacks, so
            that an initialization listed between them separates the two; `final` scores when training
            ends.
        same_as: Take the scores of this earlier moment instead of measuring: the model is the same.
        between_batches: Called after each batch, on all processes; may raise to stop the run.
    """

    def __init__(
        self,
        moment: Moment,
        same_as: Moment | None = None,
        between_batches: Callable[[Trainer, LightningModule], None] | None = None,
    ) -> None:
        self.moment = moment
        self.same_as = same_as
        self.between_batches = between_batches
        self.scores: dict[str, float] = {}
        self._step = -1
        self._validated_at = -1

    @property
    def state_key(self) -> str:
        """Name each of the three uses of this class in a checkpoint."""
        return f"ScoreAt[{self.moment}]"

    def state_dict(self) -> dict[str, Any]:
        """Keep the scores, which a resumed run cannot measure again."""
        return {"scores": self.scores, "step": self._step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the scores of the interrupted run."""
        self.scores, self._step = state_dict["scores"], state_dict["step"]

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Score at `zero_shot` and `after_init`, unless the run is a resumed one."""
        if self.moment != "final":
            self._record(trainer, pl_module)
        elif self.scores:  # the run is trained further, or has nothing left to do
            adapted(pl_module).record.metrics["final"] = self.scores

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Drop the final scores of a run that is trained further: they are an earlier model's."""
        if self.moment == "final":
            adapted(pl_module).record.metrics.pop("final", None)
            folder = run_folder_of(trainer.loggers)
            if folder is not None and trainer.is_global_zero:
                remove_row_scores(folder)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remember when the whole set was validated last: that may be the final model already."""
        loaders = data_of(trainer).val_dataloader()
        if trainer.num_val_batches == [len(loader) for loader in loaders]:
            self._validated_at = trainer.global_step

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Score at `final`, also in a run that was interrupted in its final scores and has nothing to train."""
        if self.moment == "final":
            return_to_device(trainer)
            self._record(trainer, pl_module)

    def _record(self, trainer: Trainer, pl_module: LightningModule) -> None:
        metrics = adapted(pl_module).record.metrics
        if self.same_as is not None:
            self.scores = metrics[self.same_as]
        elif not self.scores or (self.moment == "final" and self._step != trainer.global_step):
            if self._validated_at == trainer.global_step:
                self.scores = logged_scores(trainer, "val/")
                self._write_rows(trainer, adapted(pl_module).scoring)
            else:
                self.scores = self._measure(trainer, pl_module)
            self._step = trainer.global_step
            logged = {f"{self.moment}/{name}": value for name, value in self.scores.items()}
            for logger in trainer.loggers if logged else ():
                logger.log_metrics(logged, step=trainer.global_step)
        metrics[self.moment] = self.scores

    def _measure(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, float]:
        scoring = adapted(pl_module).new_scoring(self.moment, "validation")
        loaders = data_of(trainer).val_dataloader()
        label = f"score, {self.moment.replace('_', ' ')}"
        scores = score(trainer, pl_module, scoring, loaders, label, self.between_batches)
        self._write_rows(trainer, scoring)
        return scores

    def _write_rows(self, trainer: Trainer, scoring: Scoring) -> None:
        folder = run_folder_of(trainer.loggers)
        if self.moment == "final" and folder is not None and trainer.is_global_zero:
            with warn_on_failure("writing the scores of each row"):
                write_row_scores(folder, self.moment, scoring.rows.rows)
