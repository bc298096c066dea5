"""Score the model as it is, without its adapter, on the rows that choose a step and on the validation set."""

from lightning.pytorch import LightningModule, Trainer

from app.commands.one_step.measurements import VALIDATION, Rows
from app.evaluation.scoring import Scoring
from app.initialization.gradient_hooks import frozen
from app.models.lora import without_adapters
from app.training.protocols import GradientInitialization, adapted, data_of
from app.training.scores import score


class Scorer:
    """Score the base model as it is.

    Args:
        trainer: Its precision and its data module's rows.
        pl_module: The module with the model.
        eta_rows: Training rows that choose a step.
        init: Its draw and its micro-batches.
    """

    def __init__(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        eta_rows: int,
        init: GradientInitialization,
    ) -> None:
        self.trainer, self.pl_module = trainer, pl_module
        self.data = data_of(trainer)
        size = init.micro_batch_size
        self.batches = self.data.gradient_batches(eta_rows, size, 0, 1, init.drawn, last=True)

    def score(self, rows: Rows) -> dict[str, float]:
        """Return the scores on VALIDATION, benchmarks among them, or on the rows that choose a step.

        `task_loss` is among them also where rows have no classes: it is their `loss`.
        """
        module = adapted(self.pl_module)
        labels, whole = self.data.label_token_ids(), rows == VALIDATION
        if whole:
            scoring = module.new_scoring("one_step", "validation")
        else:
            scoring = Scoring(self.pl_module, {}, labels, (), None, False)  # type: ignore[arg-type]
        loaders = self.data.val_dataloader() if whole else [self.batches]
        label = "score, validation" if whole else "score, training rows"
        with frozen(module.model), without_adapters(module.model):
            scores = score(self.trainer, self.pl_module, scoring, loaders, label)
        return scores if labels or "loss" not in scores else {"task_loss": scores["loss"], **scores}
