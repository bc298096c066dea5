"""AdaLoRA's pruning, after each optimizer step."""

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from app.models.adalora import (
    AdaLoraModel,
    allocator_state,
    load_allocator_state,
    prune,
    remaining_triplets,
    set_total_steps,
)
from app.models.lora import adalora_tuner
from app.training.lightning_internals import step_has_ended, total_steps
from app.training.protocols import adapted


class AdaLoraPruning(Callback):
    """Prune AdaLoRA's triplets to the budget of the step; nothing for any other adapter.

    Listed before the callbacks that save.
    """

    def __init__(self) -> None:
        self._tuner: AdaLoraModel | None = None
        self._state: dict[str, Any] = {}

    def state_dict(self) -> dict[str, Any]:
        """Keep the averages by which triplets are weighed, and which are left."""
        return {} if self._tuner is None else allocator_state(self._tuner)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over those of the interrupted run."""
        self._state = state_dict

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Set AdaLoRA's length of training, and the averages of the interrupted run."""
        self._tuner = adalora_tuner(adapted(pl_module).model)
        if self._tuner is None:
            return
        set_total_steps(self._tuner, total_steps(trainer))
        if self._state:
            load_allocator_state(self._tuner, self._state, pl_module.device)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Prune; the gradients of the step are still there."""
        if self._tuner is not None and step_has_ended(trainer):
            prune(self._tuner, trainer.global_step)
            pl_module.log("adalora/triplets", float(remaining_triplets(self._tuner)))
