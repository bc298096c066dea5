"""The loss of one optimizer step as the token mean over all that it sees."""

import torch
from torch import Tensor


class TokenMean:
    """Make the gradients of an optimizer step those of the token mean of all its batches.

        L = (sum of token losses) / (number of supervised tokens)

    over all batches of all processes that one optimizer step sees, so that neither
    `accumulate_grad_batches` nor the number of processes changes what is learnt. While batches come, the
    number of tokens of the first stands in for that of all; `finish` gives the correction.
    """

    def __init__(self) -> None:
        self._sums: list[Tensor] = []  # (loss, tokens) of each batch since the last step

    def scaled(self, loss: Tensor, whole: Tensor, divided_by: int) -> Tensor:
        """Return what to differentiate for one batch.

        Args:
            loss: Sum of the token losses of this process's part of the batch.
            whole: (2,) loss and number of tokens, summed over the processes.
            divided_by: By how much the trainer and the strategy divide the gradients of the step's batches.
        """
        self._sums.append(whole)
        return loss * (divided_by / self._sums[0][1])

    def finish(self) -> tuple[Tensor, Tensor]:
        """Return the step's token mean and the factor that its gradients lack; the next batch begins a step."""
        first, (loss, tokens) = self._sums[0], torch.stack(self._sums).sum(dim=0)
        self._sums = []
        return loss / tokens, first[1] / tokens
