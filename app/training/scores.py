"""Score the model as it is, beside Lightning's own loops."""

from collections.abc import Callable, Iterable, Sequence

import torch
from lightning.pytorch import LightningModule, Trainer

from app.evaluation.scoring import Scoring
from app.models.batch import Batch
from app.utils.console import track


def return_to_device(trainer: Trainer) -> None:
    """Move the module to its device again: Lightning moves it to the CPU before it calls `on_fit_end`."""
    trainer.strategy.model_to_device()


@torch.no_grad()
def score(
    trainer: Trainer,
    pl_module: LightningModule,
    scoring: Scoring,
    loaders: Iterable[Sequence[Batch]],
    label: str,
    between_batches: Callable[[Trainer, LightningModule], None] | None = None,
) -> dict[str, float]:
    """Score batches of rows and of questions in evaluation mode, and restore the mode.

    Args:
        trainer: Its precision is that of the passes.
        pl_module: The module to score.
        scoring: Takes the batches.
        loaders: The batches, such as those of the data module's `val_dataloader`.
        label: Names the progress.
        between_batches: Called after each batch, on all processes; may raise.

    Returns:
        The scores by their names, the same on every process.
    """
    training = [module for module in pl_module.modules() if module.training]
    pl_module.eval()
    try:
        for loader in loaders:
            for batch in track(loader, label, scoring.speed):
                moved = trainer.strategy.batch_to_device(batch)
                with trainer.precision_plugin.forward_context():
                    scoring.update(moved)
                if between_batches is not None:
                    between_batches(trainer, pl_module)
    finally:
        for module in training:
            module.training = True
    return {name: float(value) for name, value in scoring.compute().items()}
