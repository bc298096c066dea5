"""The loss of one optimizer step as the mean over all that it sees."""

import torch
from torch import Tensor


class StepMean:
    """Make the gradients of an optimizer step those of the mean over all its batches.

        L = (sum of token losses) / (number of supervised tokens)
        L = (sum of the rows' mean token losses) / (number of rows)

    over all batches of all processes that one optimizer step sees, so that neither
    `accumulate_grad_batches` nor the number of processes changes what is learnt. While batches come, the
    number of tokens or rows of the first stands in for that of all; `finish` gives the correction.
    """

    def __init__(self) -> None:
        self._sums: list[Tensor] = []  # (loss, number) of each batch since the last step

    def scaled(self, loss: Tensor, whole: Tensor, divided_by: int) -> Tensor:
        """Return what to differentiate for one batch.

        Args:
            loss: Sum of the losses of this process's part of the batch.
            whole: (2,) loss and number of tokens or rows, summed over the processes.
            divided_by: By how much the trainer and the strategy divide the gradients of the step's batches.
        """
        self._sums.append(whole)
        return loss * (divided_by / self._sums[0][1])

    def finish(self) -> tuple[Tensor, Tensor]:
        """Return the step's mean and the factor that its gradients lack; the next batch begins a step."""
        first, (loss, number) = self._sums[0], torch.stack(self._sums).sum(dim=0)
        self._sums = []
        return loss / number, first[1] / number
