"""Metrics of rows with classes, and means over benchmark questions, each counted once."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torchmetrics import Metric, MetricCollection
from torchmetrics.classification import (
    BinaryF1Score,
    MulticlassAccuracy,
    MulticlassConfusionMatrix,
    MulticlassF1Score,
)

from app.distributed.collectives import largest_over_processes, sum_over_processes
from app.models.loss import SupervisedLogits
from app.models.task_loss import label_losses, token_losses


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

    Attributes:
        rows: After `compute` the scores of all processes' rows, in their order: a list by column, `row`
            (its number), `loss` (mean over its supervised tokens), `tokens` (how many), and with classes
            `task_loss` (cross-entropy among the label words), `target`, `predicted` and `correct` (0 or 1).
        names: Those of the scores.
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
        self.names = ["loss", *metrics, *(["task_loss"] if classes else [])]
        self.rows: dict[str, list[float]] = {}
        self._parts: list[Tensor] = []  # (R, columns) of each batch

    @property
    def updated(self) -> bool:
        """Whether there has been any batch."""
        return bool(self._parts)

    def update(self, output: SupervisedLogits, target: Tensor, index: Tensor) -> None:
        """Add one batch.

        Args:
            output: Of B rows.
            target: (B,) the classes; -1 is a padding row, which does not count.
            index: (B,) the numbers of the rows.
        """
        counted = target >= 0
        losses = token_losses(output, counted)
        columns = [index[counted], losses.sums, losses.counts]
        if self.metrics:
            own, predicted = label_losses(output, self.label_token_ids, target)  # type: ignore[arg-type]
            columns += [own.sums, target[counted], predicted]
            if len(predicted):
                self.metrics.update(predicted, target[counted])
        self._parts.append(torch.stack([column.double() for column in columns], dim=1))

    def compute(self) -> dict[str, Tensor]:
        """Return `loss` (token mean) and, of rows with classes, `accuracy`, `f1`, `mcc` and `task_loss`."""
        table = _by_row(torch.cat(self._parts))
        index, sums, tokens, *labelled = table.unbind(dim=1)
        self.rows = {
            "row": index.long().tolist(),
            "loss": (sums / tokens).tolist(),
            "tokens": tokens.long().tolist(),
        }
        scores = {"loss": sums.sum() / tokens.sum()}
        if labelled:
            losses, target, predicted = labelled
            self.rows["task_loss"] = losses.tolist()
            for name, values in (("target", target), ("predicted", predicted)):
                self.rows[name] = values.long().tolist()
            self.rows["correct"] = (target == predicted).long().tolist()
            scores |= {**self.metrics.compute(), "task_loss": losses.mean()}
        return {name: value.float() for name, value in scores.items()}


def _by_row(table: Tensor) -> Tensor:
    """Return the rows of all processes' tables by their first column, a number that no two rows share."""
    index = table[:, 0].long()
    last = int(index.max()) if len(index) else -1
    whole = table.new_zeros(largest_over_processes(last + 1, table.device), table.shape[1] + 1)
    whole[index] = torch.cat([table, table.new_ones(len(table), 1)], dim=1)
    whole = sum_over_processes(whole)
    return whole[whole[:, -1] > 0, :-1]


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
