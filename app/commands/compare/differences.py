"""Compare each method with one of them, seed by seed and row by row."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import pandas as pd

from app.commands.compare.bootstrap import DRAWS, LEVEL, Interval, paired_interval, resampled
from app.commands.compare.collect import Run
from app.commands.compare.row_scores import NoRowScoresError, RowScores, read_row_scores
from app.commands.compare.scores import Score
from app.commands.compare.selection import Comparison
from app.commands.compare.tables import Table

USUAL_REFERENCES = ("lora", "rslora")
"""What methods are compared to unless another is asked for: the first that is there, else the best method."""

SHOWN_NOT = "no difference shown"


class Difference(NamedTuple):
    """A method's difference to the reference in one score."""

    method: str
    score: Score
    interval: Interval
    seeds: int
    rows: int

    @property
    def verdict(self) -> str:
        """Whether the method is `better` or `worse`, or there is `no difference shown`: the interval has 0."""
        _, low, high = self.interval
        if low <= 0 <= high:
            return SHOWN_NOT
        return "better" if (low > 0) != self.score.less_is_better else "worse"

    @property
    def text(self) -> str:
        """The difference, in points of a percentage if it is a fraction, its interval and the verdict."""
        mean, low, high = (
            f"{self.score.factor * value:+.{self.score.places}f}" for value in self.interval
        )
        return f"{mean} [{low}, {high}] {self.verdict}"


@dataclass(frozen=True)
class Differences:
    """The differences of a comparison's methods to one of them.

    Attributes:
        reference: The label of that method.
        of: `test` or `validation`: which rows.
        found: One for each other method and score, the best method first.
        left_out: Why a method has none, by its label.
        rank: That of the comparison, where it is one of `by_rank`.
        unfinished: The reference that was asked for, if it has no finished run at a chosen rate.
    """

    reference: str
    of: str
    found: list[Difference] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
    rank: int | None = None
    unfinished: str | None = None

    @property
    def scores(self) -> list[Score]:
        """The scores that there are differences in, the reported one first."""
        return list(dict.fromkeys(each.score for each in self.found))


def differences_to(comparison: Comparison, wanted: str | None = None) -> Differences | None:
    """Compare the methods at their chosen rates with a reference, on the rows that are reported.

    Args:
        comparison: Of one rank, see `by_rank`.
        wanted: The reference's method; None takes the first of `USUAL_REFERENCES`, else the best method.

    Returns:
        None where no two methods have finished runs.
    """
    chosen = {
        str(label): {int(row.seed): row.run for row in rows.itertuples()}
        for label, rows in comparison.chosen.groupby("method", observed=True)
    }
    if len(chosen) < 2:
        return None
    by_method = {
        next(iter(runs.values())).method: label for label, runs in reversed(chosen.items())
    }
    names = (wanted, *USUAL_REFERENCES)
    reference = next((by_method[name] for name in names if name in by_method), next(iter(chosen)))
    of, score, _ = comparison.compared
    unfinished = wanted if wanted not in by_method else None
    differences = Differences(reference, of, rank=comparison.rank, unfinished=unfinished)
    moment = "test" if of == "test" else "final"
    read, reasons = _read(chosen, moment, score)
    differences.left_out.update(reasons)
    if reference in read:
        differences.found.extend(_differences(read, reference, score, differences.left_out))
    runs = [run for own in chosen.values() for run in own.values()]
    losses = (
        Score(name)
        for name in ("task_loss", "loss")
        if any(name in run.scores(moment) for run in runs)
    )
    other = next(losses, score)
    if other != score:
        read, reasons = _read(chosen, moment, other)
        if reference in read:
            compared = {each.method for each in differences.found} | {reference}
            differences.found.extend(_differences(read, reference, other, reasons))
            for label, reason in reasons.items():
                name = f"{label} in {other}" if label in compared else label
                differences.left_out.setdefault(name, reason)
    return differences


Rows = dict[str, dict[int, RowScores]]
"""By the method's label and the seed."""


def _read(
    chosen: Mapping[str, Mapping[int, Run]], moment: str, score: str
) -> tuple[Rows, dict[str, str]]:
    """Return the rows of the methods whose runs all have them, and the first reason of the others."""
    read: Rows = {}
    reasons: dict[str, str] = {}
    for label, runs in chosen.items():
        try:
            read[label] = {seed: read_row_scores(run, moment, score) for seed, run in runs.items()}
        except NoRowScoresError as error:
            reasons[label] = str(error)
    return read, reasons


def _differences(
    read: Rows, reference: str, score: Score, left_out: dict[str, str]
) -> list[Difference]:
    """Return the differences in one score; note the methods that have other rows or seeds."""
    first = next(iter(read[reference].values()))
    used: Rows = {}
    for label, runs in read.items():
        if any(list(rows.ids) != list(first.ids) for rows in runs.values()):
            left_out[label] = f"its rows are not those of {reference}"
        elif not runs.keys() & read[reference].keys():
            left_out[label] = f"it has no seed that {reference} has"
        else:
            used[label] = runs
    if reference not in used:
        return []
    places = [(label, seed) for label, runs in used.items() for seed in runs]
    rows_of = [used[label][seed] for label, seed in places]
    values = np.array([rows.value for rows in rows_of])
    drawn = resampled(len(first.ids), [rows.score for rows in rows_of])
    place_of = {place: number for number, place in enumerate(places)}
    found = []
    for label in used:
        seeds = sorted(used[label].keys() & used[reference].keys())
        own, other = ([place_of[name, seed] for seed in seeds] for name in (label, reference))
        interval = paired_interval(values[own], values[other], drawn[:, own], drawn[:, other])
        if label != reference:
            found.append(Difference(label, score, interval, len(seeds), len(first.ids)))
    return found


def differences_table(differences: Differences) -> Table | None:
    """Return one row a method, one column a score; None where there is no difference."""
    if not differences.found:
        return None
    rows: dict[str, dict[str, str]] = {}
    for each in differences.found:
        what = f"{differences.of} {each.score}{', points' if each.score.is_fraction else ''}"
        row = rows.setdefault(each.method, {"seeds": str(each.seeds)})
        row[f"{what}: difference to {differences.reference}"] = each.text
    name = "method" if differences.rank is None else f"method at rank {differences.rank}"
    frame = pd.DataFrame.from_dict(rows, orient="index").fillna("").rename_axis(name)
    return Table(frame, differences_notes(differences))


def differences_notes(differences: Differences) -> list[str]:
    """Return the sentences below the table, or in its place where there is none."""
    notes = []
    if differences.unfinished is not None:
        notes.append(
            f"**Not to {differences.unfinished}**, as asked for: it has no finished run at a chosen rate."
        )
    if differences.found:
        most, rows = (
            max(getattr(each, name) for each in differences.found) for name in ("seeds", "rows")
        )
        notes.append(
            f"Mean difference to {differences.reference}, each method at its chosen rate, paired by seed and "
            f"row ({rows:,} rows); in brackets the {LEVEL:.0%} interval of {DRAWS:,} bootstrap draws of seeds "
            "and rows, and whether it excludes 0. That no difference is shown does not say that there is none. "
            "Each interval stands alone: of twenty methods that are no different, about one excludes 0."
        )
        notes += _seed_notes(most)
    unread = differences.left_out.get(differences.reference)
    if unread is not None and not differences.found:
        notes.append(f"There is no difference to {differences.reference}: {unread}.")
    elif differences.left_out:
        why = "; ".join(f"{label}: {reason}" for label, reason in differences.left_out.items())
        notes.append(f"Without a difference to {differences.reference}: {why}.")
    return notes


def _seed_notes(seeds: int) -> list[str]:
    if seeds == 1:
        return [
            "**One seed**: the intervals are over rows alone, and say nothing about what another seed would do."
        ]
    if seeds < 10:
        return [
            f"**{seeds} seeds are few**: where seeds differ by more than rows do, the interval is too narrow "
            "and covers 50 % with two seeds, 75 % with three, 83 % with five and 90 % with ten, not 95 %."
        ]
    return []


def differences_csv(several: Sequence[Differences]) -> str:
    """Return one row for each difference, as fractions and not in percent."""
    names = ["method", "reference", "rank", "rows_of", "score", "seeds", "rows"]
    names += ["difference", "low", "high", "verdict"]
    rows = [
        (
            *(each.method, differences.reference, differences.rank, differences.of, each.score),
            *(each.seeds, each.rows, *each.interval, each.verdict),
        )
        for differences in several
        for each in differences.found
    ]
    return str(pd.DataFrame(rows, columns=names).astype({"rank": "Int64"}).to_csv(index=False))
