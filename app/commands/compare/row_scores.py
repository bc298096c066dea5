"""Read the scores of each row that runs have left, as features whose means make a score."""

import json
import math
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from app.commands.compare.bootstrap import Array, Statistic
from app.commands.compare.collect import Run
from app.tracking.row_scores import row_scores_path
from app.tracking.run_folder import RunFolder
from app.utils.files import read_json

TOLERANCE = 1e-5
"""By which a score of float32 may be apart from that of its rows."""


class NoRowScoresError(Exception):
    """A run has no scores of its rows, for the reason that the message says."""


@dataclass(frozen=True)
class RowScores:
    """The rows of a run as one score sees them.

    Attributes:
        ids: Names of the N rows.
        features: (N, K), whose means over rows make the score.
        statistic: Makes it.
    """

    ids: Sequence[Any]
    features: Array
    statistic: Statistic


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
    found = float(rows.statistic(rows.features.mean(axis=0)))
    if not math.isclose(found, reported, rel_tol=TOLERANCE, abs_tol=TOLERANCE):
        raise NoRowScoresError(f"its rows make {score} {found:.5f}, but it reports {reported:.5f}")
    return rows


def _test_command(run: Run) -> str:
    return f"`python train.py test --run {shlex.quote(str(run.folder))}`"


def _rows(run: Run, moment: str, score: str) -> RowScores:
    path = row_scores_path(RunFolder(run.folder), moment)
    try:
        table = pd.read_csv(path, index_col="row")
        features, statistic = FEATURES[score](table)
    except FileNotFoundError:
        again = f": {_test_command(run)}" if moment == "test" else ""
        missing = (
            f"it has no {path.relative_to(run.folder)}, as an earlier version scored it{again}"
        )
        raise NoRowScoresError(missing) from None
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise NoRowScoresError(f"{path.name} is damaged ({error})") from error
    return RowScores(table.index, features, statistic)


def _mean_of(column: str) -> Callable[[pd.DataFrame], tuple[Array, Statistic]]:
    return lambda table: (table[[column]].to_numpy(float), _first)


def _token_loss(table: pd.DataFrame) -> tuple[Array, Statistic]:
    loss, tokens = (table[name].to_numpy(float) for name in ("loss", "tokens"))
    return np.stack([loss * tokens, tokens], axis=1), _ratio


def _first(means: Array) -> Array:
    first: Array = means[..., 0]
    return first


def _ratio(means: Array) -> Array:
    ratio: Array = means[..., 0] / means[..., 1]
    return ratio


def _confusion(table: pd.DataFrame) -> Array:
    """Return one-hot rows, whose mean is the confusion matrix by rows, target times predicted."""
    # Whether two classes are all is not said; a third that never occurs changes nothing.
    target, predicted = (table[name].to_numpy(int) for name in ("target", "predicted"))
    classes = max(2, 1 + int(max(target.max(), predicted.max())))
    return np.eye(classes**2)[target * classes + predicted]


def _square(means: Array) -> Array:
    classes = math.isqrt(means.shape[-1])
    return means.reshape(*means.shape[:-1], classes, classes)


def matthews(means: Array) -> Array:
    """Return the Matthews correlation of confusion matrices (..., C * C); see `MatthewsCorrelation`."""
    matrix = _square(means)
    true, predicted = matrix.sum(axis=-1), matrix.sum(axis=-2)
    above = np.trace(matrix, axis1=-2, axis2=-1) - (true * predicted).sum(axis=-1)
    below = (1 - (true**2).sum(axis=-1)) * (1 - (predicted**2).sum(axis=-1))
    # Of shares, not counts: what is 0 but for rounding is 0.
    defined = below > 1e-12
    return np.where(defined, above / np.sqrt(np.where(defined, below, 1)), 0)


def f1(means: Array) -> Array:
    """Return the F1 of class 1 of two, or the mean over the classes that occur, of matrices (..., C * C)."""
    matrix = _square(means)
    right = np.diagonal(matrix, axis1=-2, axis2=-1)
    either = matrix.sum(axis=-1) + matrix.sum(axis=-2)
    each = 2 * right / np.where(either > 0, either, 1)
    if matrix.shape[-1] == 2:
        of_one: Array = each[..., 1]
        return of_one
    mean: Array = each.sum(axis=-1) / (either > 0).sum(axis=-1)
    return mean


FEATURES: Mapping[str, Callable[[pd.DataFrame], tuple[Array, Statistic]]] = {
    "accuracy": _mean_of("correct"),
    "task_loss": _mean_of("task_loss"),
    "loss": _token_loss,
    "mcc": lambda table: (_confusion(table), matthews),
    "f1": lambda table: (_confusion(table), f1),
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
    return RowScores(list(values), np.array([*values.values()], dtype=float)[:, None], _first)


def _scored(answer: Mapping[str, Any], name: str) -> Iterator[tuple[Any, float]]:
    """Yield the key and the score of a question that has it, or of each row of a task of lm_eval."""
    scored = [(answer["key"], answer["scores"].get(name))]
    if "samples" in answer:
        task, _, measure = name.rpartition("/")
        metric, _, reading = measure.rpartition(",")
        rows = [row for row in answer["samples"].get(task, ()) if row["filter"] == reading]
        scored = [((task, row["doc_id"]), row.get(metric)) for row in rows]
    yield from ((key, value) for key, value in scored if isinstance(value, int | float))
