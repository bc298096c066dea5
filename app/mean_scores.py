"""Means of scores over questions, each question counted once, whatever process has asked it."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torchmetrics import Metric


class MeanScores(Metric):
    """Mean of each named score over the questions that have it.

    Args:
        names: Every name that may come; the same list on every process.
    """

    full_state_update = False
    sums: Tensor
    counts: Tensor

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__()
        self.names = list(names)
        for state in ("sums", "counts"):
            zeros = torch.zeros(len(self.names), dtype=torch.float64)
            self.add_state(state, zeros, dist_reduce_fx="sum")

    def update(self, scores: Mapping[str, float]) -> None:
        """Take the scores of one question.

        Args:
            scores: Values by name; names that it leaves out do not count this question.
        """
        for name, value in scores.items():
            place = self.names.index(name)
            self.sums[place] += value
            self.counts[place] += 1

    def compute(self) -> dict[str, Tensor]:
        """Return the mean of each score that any question has, in the order of the names."""
        means = (self.sums / self.counts.clamp(min=1)).float()
        return {name: means[i] for i, name in enumerate(self.names) if self.counts[i] > 0}
