"""Score the model as it is, without its adapter, on the rows that choose a step and on the validation set."""

from collections.abc import Sequence

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.nn.functional import cross_entropy
from torchmetrics import SumMetric

from app.commands.one_step.measurements import VALIDATION, Rows
from app.evaluation.metrics import LabelScores
from app.evaluation.scoring import Scoring
from app.initialization.gradient_hooks import frozen
from app.models.lora import without_adapters
from app.models.loss import SupervisedLogits, label_logits
from app.training.protocols import GradientInitialization, adapted, data_of
from app.training.scores import score


class TaskScores(LabelScores):
    """Scores of rows, and `task_loss`, what the task itself asks for.

    Of rows with classes it is the mean over rows of the cross-entropy among the label words alone, of the
    logits that the accuracy is made of: what the loss over the whole vocabulary gains by preferring any label
    word to all other tokens does not count. Of other rows it is `loss`.
    """

    def __init__(self, label_token_ids: Sequence[int]) -> None:
        super().__init__(label_token_ids)
        self.label_loss, self.labelled = (SumMetric(nan_strategy="disable") for _ in range(2))

    def update(self, output: SupervisedLogits, target: Tensor) -> None:
        """Add one batch; see `LabelScores`."""
        super().update(output, target)
        rows = target >= 0
        if self.metrics and rows.any():
            logits = label_logits(output, self.label_token_ids, rows)  # type: ignore[arg-type]
            self.label_loss.update(cross_entropy(logits.float(), target[rows], reduction="sum"))
            self.labelled.update(len(logits))

    def compute(self) -> dict[str, Tensor]:
        """Return `task_loss` beside the scores of `LabelScores`."""
        scores = super().compute()
        labelled = self.label_loss.compute() / self.labelled.compute() if self.metrics else None
        return {"task_loss": scores["loss"] if labelled is None else labelled, **scores}


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
        """Return the scores on VALIDATION, benchmarks among them, or on the rows that choose a step."""
        module = adapted(self.pl_module)
        labels, whole = self.data.label_token_ids(), rows == VALIDATION
        if whole:
            scoring = module.new_scoring("one_step", "validation")
        else:
            scoring = Scoring(self.pl_module, {}, labels, (), None, False)  # type: ignore[arg-type]
        scoring.rows = TaskScores(labels).to(self.pl_module.device)
        loaders = self.data.val_dataloader() if whole else [self.batches]
        label = "score, validation" if whole else "score, training rows"
        with frozen(module.model), without_adapters(module.model):
            return score(self.trainer, self.pl_module, scoring, loaders, label)
