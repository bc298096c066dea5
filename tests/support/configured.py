"""A module with its model, as a fit has it before the first step."""

from lightning.pytorch import Trainer
from lightning.pytorch.trainer.states import TrainerFn

from app.training.module import LoraModule


def configured(module: LoraModule) -> LoraModule:
    """Load the module's model for a fit on the CPU."""
    module.trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    module.trainer.state.fn = TrainerFn.FITTING
    module.configure_model()
    return module
