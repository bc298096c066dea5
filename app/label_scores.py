"""Scores of a classification by label words: loss, accuracy, F1 and Matthews correlation."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torchmetrics import MeanMetric, Metric, MetricCollection
from torchmetrics.classification import (
    BinaryF1Score,
    BinaryMatthewsCorrCoef,
    MulticlassAccuracy,
    MulticlassF1Score,
    MulticlassMatthewsCorrCoef,
)

from app.loss import SupervisedLogits, summed_loss


class LabelScores(torch.nn.Module):
    """Accumulate scores over an evaluation set; `compute` reduces over processes.

    The prediction is the label word whose first token has the highest logit where the answer begins:
    one forward pass, no generation. F1 is that of class 1 for two classes and the macro mean for more;
    Matthews correlation is 0 where it is undefined (one class only).

    Args:
        label_token_ids: First token of each label word, in the order of the classes.
    """

    def __init__(self, label_token_ids: Sequence[int]) -> None:
        super().__init__()
        self.register_buffer("label_token_ids", torch.tensor(label_token_ids), persistent=False)
        classes = len(label_token_ids)
        metrics: dict[str, Metric | MetricCollection] = {
            "accuracy": MulticlassAccuracy(classes, average="micro"),
            "f1": BinaryF1Score() if classes == 2 else MulticlassF1Score(classes, average="macro"),
            "mcc": BinaryMatthewsCorrCoef()
            if classes == 2
            else MulticlassMatthewsCorrCoef(classes),
        }
        self.metrics = MetricCollection(metrics, compute_groups=False)
        self.loss = MeanMetric()

    def update(self, found: SupervisedLogits, target: Tensor) -> None:
        """Take one batch.

        Args:
            found: Logits at the supervised positions.
            target: (B,) class of each example.
        """
        at_answer = found.logits[found.first]
        predicted = at_answer[:, self.label_token_ids].argmax(dim=1)  # type: ignore[index]
        self.metrics.update(predicted, target)
        tokens = found.labels.numel()
        self.loss.update(summed_loss(found) / tokens, weight=tokens)

    def compute(self) -> dict[str, Tensor]:
        """Return `loss` (token mean), `accuracy`, `f1` and `mcc`."""
        return {"loss": self.loss.compute(), **self.metrics.compute()}

    def reset(self) -> None:
        """Forget everything seen."""
        self.metrics.reset()
        self.loss.reset()
