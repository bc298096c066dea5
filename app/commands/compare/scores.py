"""Names of scores, and how their numbers are read and written."""

from collections.abc import Collection
from typing import Self

OF_LM_EVAL = (
    "perplexity",
    "word_perplexity",
    "byte_perplexity",
    "bits_per_byte",
    "brier_score",
    "ter",
)
LOSSES = ("loss", "task_loss", *OF_LM_EVAL)
"""Scores of which less is better, with those that lm-evaluation-harness registers so."""


class Score(str):
    """The name of a score, such as accuracy, gsm8k/strict or lm_eval/TASK/METRIC,FILTER."""

    less_is_better: bool

    def __new__(cls, name: str, lower_is_better: Collection[str] = ()) -> Self:
        """Take a name, and the names of scores of which less is better beside `LOSSES`."""
        score = super().__new__(cls, name)
        metric = name.rpartition("/")[2].partition(",")[0]
        score.less_is_better = metric in LOSSES or name in lower_is_better
        return score

    @property
    def is_fraction(self) -> bool:
        """Whether it is shown in percent; losses and lm_eval's scores stand as they are given."""
        return not (self.less_is_better or self.startswith("lm_eval/"))

    @property
    def factor(self) -> int:
        """What its numbers are multiplied by to be shown."""
        return 100 if self.is_fraction else 1

    @property
    def places(self) -> int:
        """The decimal places to show."""
        return 2 if self.is_fraction else 4
