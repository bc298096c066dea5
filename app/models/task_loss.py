"""The loss of each row: of its tokens, and the task's own among the label words."""

from typing import NamedTuple

from torch import Tensor
from torch.nn.functional import cross_entropy

from app.models.loss import SupervisedLogits, Weighting, label_logits


class RowLosses(NamedTuple):
    """The losses of rows: their mean is the sum of `sums` over that of `counts`."""

    sums: Tensor  # (R,) float64
    counts: Tensor  # (R,) float64: a row's supervised tokens, or 1 in a mean over rows


def token_losses(
    supervised: SupervisedLogits, rows: Tensor, weighting: Weighting = "tokens"
) -> RowLosses:
    """Return the cross-entropy over the supervised tokens of each row: its sum, or by `rows` its mean.

    Args:
        supervised: Of a batch of B rows, none packed.
        rows: (B,) bool, which rows: R of them. Not padding rows, which have no supervised token.
        weighting: What counts alike in the mean of the losses.
    """
    losses = cross_entropy(supervised.logits.float(), supervised.labels, reduction="none").double()
    sums = losses.new_zeros(len(rows)).index_add(0, supervised.rows, losses)[rows]
    tokens = supervised.rows.bincount(minlength=len(rows))[rows].double()
    return RowLosses(sums, tokens) if weighting == "tokens" else RowLosses(sums / tokens, tokens**0)


def label_losses(
    supervised: SupervisedLogits, label_token_ids: Tensor, target: Tensor
) -> tuple[RowLosses, Tensor]:
    """Return each row's cross-entropy among the label words alone, and the class that is predicted.

    Of the logits that the accuracy is made of: that any label word becomes likelier than all other tokens does
    not count.

    Args:
        supervised: Of a batch of B rows.
        label_token_ids: (C,) the first token of each class's word.
        target: (B,) the classes; -1 is a padding row. R are none.

    Returns:
        The losses (R,), of counts 1, and the classes (R,).
    """
    rows = target >= 0
    logits = label_logits(supervised, label_token_ids, rows).double()
    losses = cross_entropy(logits, target[rows], reduction="none")
    return RowLosses(losses, losses.new_ones(len(losses))), logits.argmax(dim=1)
