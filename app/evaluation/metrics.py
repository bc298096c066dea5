"""Metrics of rows with classes, and means over benchmark questions, each counted once."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torchmetrics import Metric, MetricCollection, SumMetric
from torchmetrics.classification import (
    BinaryF1Score,
    MulticlassAccuracy,
    MulticlassConfusionMatrix,
    MulticlassF1Score,
)

from app.distributed.collectives import sum_over_processes
from app.models.loss import SupervisedLogits, label_logits, summed_loss


class MatthewsCorrelation(MulticlassConfusionMatrix):
    """Matthews correlation of a confusion matrix C of any number of classes.

        (n trace(C) - t . p) / sqrt((n^2 - t . t) (n^2 - p . p)),    t, p row and column sums, n the total

    and 0 where the denominator is 0, that is if only one class occurs or is predicted, as in scikit-learn.
    Differs: torchmetrics' own is 1 where one class occurs and is predicted.
    """

    def compute(self) -> Tensor:
        """Return the correlation, in [-1, 1]."""
        matrix = super().compute().double()
        true, predicted, total = matrix.sum(dim=1), matrix.sum(dim=0), matrix.sum()
        above = total * matrix.trace() - true @ predicted
        below = (total**2 - true @ true) * (total**2 - predicted @ predicted)
        return torch.where(below > 0, above / below.clamp(min=1).sqrt(), 0).float()


class LabelScores(torch.nn.Module):
    """Accumulate scores over an evaluation set; `compute` reduces over processes.

    The prediction is the label word whose first token has the highest logit where the answer begins:
    one forward pass, no generation. F1 is that of class 1 for two classes and the macro mean for more.
    `label_token_ids` is in the order of the classes; where rows have none, only the loss is scored.
    """

    def __init__(self, label_token_ids: Sequence[int]) -> None:
        super().__init__()
        self.register_buffer("label_token_ids", torch.tensor(label_token_ids), persistent=False)
        classes = len(label_token_ids)
        metrics: dict[str, Metric | MetricCollection] = {}
        if classes:
            two = classes == 2
            metrics = {
                "accuracy": MulticlassAccuracy(classes, average="micro"),
                "f1": BinaryF1Score() if two else MulticlassF1Score(classes, average="macro"),
                "mcc": MatthewsCorrelation(classes),
            }
        self.metrics = MetricCollection(metrics, compute_groups=False)
        # Not MeanMetric, which leaves out batches that are not a number.
        self.loss, self.tokens = (SumMetric(nan_strategy="disable") for _ in range(2))

    def update(self, output: SupervisedLogits, target: Tensor) -> None:
        """Add one batch, of which `target` (B,) has the classes; -1 is a padding row, which does not count."""
        counted = target >= 0
        if self.metrics and counted.any():
            logits = label_logits(output, self.label_token_ids, counted)  # type: ignore[arg-type]
            self.metrics.update(logits.argmax(dim=1), target[counted])
        self.loss.update(summed_loss(output))
        self.tokens.update(output.labels.numel())

    def compute(self) -> dict[str, Tensor]:
        """Return `loss` (token mean) and, of rows with classes, `accuracy`, `f1` and `mcc`."""
        scores = self.metrics.compute() if self.metrics else {}
        return {"loss": self.loss.compute() / self.tokens.compute(), **scores}


class MeanScores:
    """Mean of each named score over the questions that have it, of all processes, which have the same names."""

    def __init__(self, names: Sequence[str]) -> None:
        self.totals = {name: [0.0, 0.0] for name in names}  # sum and number of questions

    def update(self, scores: Mapping[str, float]) -> None:
        """Add the scores of one question, which does not count for the names that are not in them."""
        for name, value in scores.items():
            self.totals[name][0] += value
            self.totals[name][1] += 1

    def compute(self, device: torch.device | None = None) -> dict[str, float]:
        """Return the mean of each score that any question has, in the order of the names."""
        totals = torch.tensor(list(self.totals.values()), dtype=torch.float64, device=device)
        sums, counts = sum_over_processes(totals.reshape(-1, 2)).unbind(dim=1)
        means = (sums / counts).float().tolist()
        return {
            name: mean
            for name, mean, count in zip(self.totals, means, counts.tolist(), strict=True)
            if count
        }
