"""Read the scores of each row that runs have left, of which those of any draw of the rows can be made."""

import json
import math
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from app.commands.compare.bootstrap import Array, WeightedScore
from app.commands.compare.collect import Run
from app.tracking.row_scores import row_scores_path
from app.tracking.run_folder import RunFolder
from app.utils.files import read_json

Labels = NDArray[np.int_]
TOLERANCE = 1e-5
"""By which a score of float32 may be apart from that of its rows."""


class NoRowScoresError(Exception):
    """A run has no scores of its rows, for the reason that the message says."""


@dataclass(frozen=True)
class RowScores:
    """The rows of a run as one score sees them.

    Attributes:
        ids: Names of the N rows.
        score: Makes the score of draws of them.
    """

    ids: Sequence[Any]
    score: WeightedScore

    @property
    def value(self) -> float:
        """The score of all rows."""
        return float(self.score(np.full((len(self.ids), 1), 1 / max(1, len(self.ids))))[0])


def read_row_scores(run: Run, moment: str, score: str) -> RowScores:
    """Read the rows of a run.

    Args:
        run: A finished run.
        moment: `test` or `final`.
        score: Of rows, such as accuracy, or of a benchmark, such as gsm8k/strict.

    Raises:
        NoRowScoresError: They are not there, or are not those of the run's score.
    """
    if moment == "test" and not run.scores("test"):
        raise NoRowScoresError(f"it is not tested yet: {_test_command(run)}")
    reported = run.scores(moment).get(score, math.nan)
    rows = (_questions if "/" in score else _rows)(run, moment, score)
    if not math.isclose(rows.value, reported, rel_tol=TOLERANCE, abs_tol=TOLERANCE):
        told = f"its rows make {score} {rows.value:.5f}, but it reports {reported:.5f}"
        raise NoRowScoresError(told)
    return rows


def _test_command(run: Run) -> str:
    return f"`python train.py test --run {shlex.quote(str(run.folder))}`"


def _rows(run: Run, moment: str, score: str) -> RowScores:
    path = row_scores_path(RunFolder(run.folder), moment)
    try:
        table = pd.read_csv(path, index_col="row")
        weighted = SCORES[score](table)
    except FileNotFoundError:
        again = f": {_test_command(run)}" if moment == "test" else ""
        missing = (
            f"it has no {path.relative_to(run.folder)}, as an earlier version scored it{again}"
        )
        raise NoRowScoresError(missing) from None
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise NoRowScoresError(f"{path.name} is damaged ({error})") from error
    return RowScores(table.index, weighted)


def _mean_of(values: Array) -> WeightedScore:
    return lambda weights: values @ weights


def _token_loss(table: pd.DataFrame) -> WeightedScore:
    loss, tokens = (table[name].to_numpy(float) for name in ("loss", "tokens"))
    return lambda weights: ((loss * tokens) @ weights) / (tokens @ weights)


def _shares(labels: Labels, weights: Array, classes: int) -> Array:
    """Return the weight (C, B) of each class."""
    shares: Array = (labels == np.arange(classes)[:, None]).astype(float) @ weights
    return shares


def _of_classes(
    statistic: Callable[[Array, Array, Array], Array], table: pd.DataFrame
) -> WeightedScore:
    """Return the score that a statistic makes of the shares (C, B) of targets, of predictions, and of hits."""
    # Whether two classes are all is not said; a third that never occurs changes nothing.
    target, predicted = (table[name].to_numpy(int) for name in ("target", "predicted"))
    if min(target.min(), predicted.min()) < 0:
        raise ValueError("a class below 0, or none")
    classes = max(2, 1 + int(max(target.max(), predicted.max())))
    hit = np.where(target == predicted, target, -1)  # of no class where the prediction is wrong

    def score(weights: Array) -> Array:
        parts = (_shares(labels, weights, classes) for labels in (target, predicted, hit))
        return statistic(*parts)

    return score


def matthews(target: Array, predicted: Array, hits: Array) -> Array:
    """Return the Matthews correlation; see `MatthewsCorrelation` and `_of_classes`."""
    above = hits.sum(axis=0) - (target * predicted).sum(axis=0)
    below = (1 - (target**2).sum(axis=0)) * (1 - (predicted**2).sum(axis=0))
    # Of shares, not counts: what is 0 but for rounding is 0.
    defined = below > 1e-12
    return np.where(defined, above / np.sqrt(np.where(defined, below, 1)), 0)


def f1(target: Array, predicted: Array, hits: Array) -> Array:
    """Return the F1 of class 1 of two, or the mean over the classes that occur; see `_of_classes`."""
    either = target + predicted
    each = 2 * hits / np.where(either > 0, either, 1)
    if len(each) == 2:
        of_one: Array = each[1]
        return of_one
    mean: Array = each.sum(axis=0) / (either > 0).sum(axis=0)
    return mean


SCORES: Mapping[str, Callable[[pd.DataFrame], WeightedScore]] = {
    "accuracy": lambda table: _mean_of(table["correct"].to_numpy(float)),
    "task_loss": lambda table: _mean_of(table["task_loss"].to_numpy(float)),
    "loss": _token_loss,
    "mcc": partial(_of_classes, matthews),
    "f1": partial(_of_classes, f1),
}


def _questions(run: Run, moment: str, score: str) -> RowScores:
    """Read the answers to a benchmark's questions, of which a score is the mean over those that have it."""
    benchmark, _, name = score.partition("/")
    folder, reported = RunFolder(run.folder), run.scores(moment).get(score)
    stems = [
        stem
        for stem, asked in (read_json(folder.scores) or {}).items()
        if asked.get("name") == benchmark
        and reported is not None
        and math.isclose(asked.get("scores", {}).get(name, math.nan), reported, rel_tol=TOLERANCE)
    ]
    if not stems:
        raise NoRowScoresError(f"{folder.scores.name} has no {benchmark} of its {score}")
    path = folder.answers / moment / f"{stems[-1]}.jsonl"
    try:
        answers = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        values = dict(pair for answer in answers for pair in _scored(answer, name))
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise NoRowScoresError(
            f"{path.relative_to(run.folder)} cannot be read ({error})"
        ) from error
    if not values:
        raise NoRowScoresError(f"{score} is no mean over questions")
    return RowScores(list(values), _mean_of(np.array([*values.values()], dtype=float)))


def _scored(answer: Mapping[str, Any], name: str) -> Iterator[tuple[Any, float]]:
    """Yield the key and the score of a question that has it, or of each row of a task of lm_eval."""
    scored = [(answer["key"], answer["scores"].get(name))]
    if "samples" in answer:
        task, _, measure = name.rpartition("/")
        metric, _, reading = measure.rpartition(",")
        rows = [row for row in answer["samples"].get(task, ()) if row["filter"] == reading]
        scored = [((task, row["doc_id"]), row.get(metric)) for row in rows]
    yield from ((key, value) for key, value in scored if isinstance(value, int | float))
