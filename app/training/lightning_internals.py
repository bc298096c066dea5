"""The one place that reads and sets what Lightning's loops keep to themselves.

Lightning counts epochs, batches and validations in its loops and saves the counters in a checkpoint. It goes
on exactly from a checkpoint that was saved when a training batch had just ended; of any other moment the
counters differ, and a validation that was due is left out or made twice. No public API of Lightning 2.6 sets
the counters, asks whether a validation is due, or runs the validation loop; `Trainer.fit(ckpt_path=...)` that
resumes exactly from any moment would replace this file.
"""

import math
from typing import Any

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler

Loops = dict[str, Any]
"""A checkpoint's `loops`."""


def set_batch_end(loops: Loops, global_step: int, stepped: bool) -> None:
    """Set the counters of a checkpoint to what they are when a batch has just ended, in place.

    Args:
        loops: The counters, which differ where they are saved during or after the validation that follows a
            batch, or when an epoch or the training ends.
        global_step: Optimizer steps so far.
        stepped: Whether the last batch ended an optimizer step.
    """
    fit = loops["fit_loop"]
    epochs, batches = fit["epoch_progress"], fit["epoch_loop.batch_progress"]
    for span in ("total", "current"):
        epochs[span]["processed"] = epochs[span]["completed"] = epochs[span]["started"] - 1
        batches[span]["completed"] = batches[span]["ready"] - 1
    fit["epoch_loop.state_dict"]["_batches_that_stepped"] = global_step - stepped
    validation = fit["epoch_loop.val_loop.batch_progress"]
    for span in ("total", "current"):
        validation[span] = dict.fromkeys(validation[span], 0)
    validation["is_last_batch"] = False


def next_epoch(loops: Loops) -> int | None:
    """Return the number of the epoch that follows, if the epoch's last batch has ended; else None."""
    fit = loops["fit_loop"]
    ended = fit["epoch_loop.batch_progress"]["is_last_batch"]
    return fit["epoch_progress"]["current"]["processed"] + 1 if ended else None


def set_batches(loops: Loops, batches: int) -> None:
    """Set the number of batches that this epoch has had, in place: other processes, other counts."""
    progress = loops["fit_loop"]["epoch_loop.batch_progress"]
    missing = batches - progress["current"]["ready"]
    for span in ("total", "current"):
        progress[span] = {name: count + missing for name, count in progress[span].items()}


def validation_is_due(trainer: Trainer) -> bool:
    """Return whether the loop validates behind the batch that has just ended."""
    fit = trainer.fit_loop
    return fit.epoch_loop._should_check_val_fx(fit._data_fetcher)  # type: ignore[arg-type]


def epoch_has_ended(trainer: Trainer) -> bool:
    """Return whether the last batch of its epoch has ended."""
    return trainer.fit_loop.epoch_loop.batch_progress.is_last_batch


def step_has_ended(trainer: Trainer) -> bool:
    """Return whether the batch that has just ended was the last of an optimizer step."""
    batches: int = trainer.fit_loop.epoch_loop.batch_progress.current.ready
    return batches % trainer.accumulate_grad_batches == 0 or epoch_has_ended(trainer)


def leave_ended_epoch(trainer: Trainer) -> None:
    """Let a resumed run start the next epoch as any other: Lightning would take it for the rest of the last."""
    fit, loop = trainer.fit_loop, trainer.fit_loop.epoch_loop
    loop.restarting = False
    fit.reset_restart_stage()
    loop._batches_that_stepped += 1


def total_steps(trainer: Trainer) -> int:
    """Return the optimizer steps of the whole training.

    Lightning's estimate takes all epochs to accumulate as many batches as the present one.
    """
    estimated, schedulers = int(trainer.estimated_stepping_batches), _schedulers(trainer)
    if not schedulers or trainer.max_epochs in (None, -1):
        return estimated
    steps = sum(
        math.ceil(trainer.num_training_batches / schedulers[0].get_accumulate_grad_batches(epoch))
        for epoch in range(max(trainer.max_epochs, 1))
    )
    return steps if trainer.max_steps == -1 else min(steps, trainer.max_steps)


def resume_accumulation(trainer: Trainer) -> None:
    """Accumulate as GradientAccumulationScheduler says for this epoch: in one that goes on it is not asked."""
    for scheduler in _schedulers(trainer):
        scheduler.on_train_epoch_start(trainer)


def _schedulers(trainer: Trainer) -> list[GradientAccumulationScheduler]:
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]  # set by its connector
    return [each for each in callbacks if isinstance(each, GradientAccumulationScheduler)]


def run_validation(trainer: Trainer) -> None:
    """Run the validation that was due behind the last batch, in the epoch of that batch."""
    count = trainer.fit_loop.epoch_progress.current
    validation = trainer.fit_loop.epoch_loop.val_loop
    epochs = int(epoch_has_ended(trainer))
    count.completed -= epochs
    validation.restarting = False
    trainer.validating = True
    validation.run()
    trainer.training = True
    count.completed += epochs


def current_epoch(trainer: Trainer) -> int:
    """Return the epoch of the last batch, also where that has ended it."""
    return trainer.fit_loop.epoch_progress.total.ready - 1
