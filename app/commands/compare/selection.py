"""Group runs that may stand in one table, and choose each method's learning rate."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd

from app.commands.compare.collect import KNOWN_AT_THE_END, Run
from app.commands.compare.scores import Score
from app.commands.compare.settings import Settings, differences
from app.commands.compare.variants import MethodRuns, variants_of
from app.utils.errors import InputError
from app.utils.text import rate_text

FAILED = ("failed", "diverged")
"""A learning rate at which a run is in such a state is not chosen."""


@dataclass(frozen=True)
class Choice:
    """A method's learning rate.

    Attributes:
        rate: Its name; None if every rate has a run that failed or diverged, or none that is finished.
        edge: Where it lies among those tried: `lowest`, `highest`, `only` or nothing.
        seeds: The seeds that the rates were compared on.
    """

    rate: str | None
    edge: str
    seeds: set[int]


@dataclass(frozen=True)
class Comparison:
    """Runs that may stand in one table: same model, data and budget.

    Attributes:
        rows: A row for each run, see `run_rows`; and `chosen`: whether it is finished and at its method's rate.
        choices: The learning rate of each method, by its label, the best method first.
        score: The reported score.
        selected_by: The score of the validation rows that the rates are chosen by.
        shared: The settings that all runs share.
        differs_by: Settings in which it differs from the first comparison of the report.
        rank: That of all its methods with an adapter, where it is one of `by_rank`.
    """

    rows: pd.DataFrame
    choices: Mapping[str, Choice]
    score: Score
    selected_by: Score
    shared: Settings
    differs_by: dict[str, tuple[Any, Any]]
    rank: int | None = None

    @property
    def finished(self) -> pd.DataFrame:
        """The rows of the finished runs."""
        return self.rows[self.rows.state == "finished"]

    @property
    def has_test(self) -> bool:
        """Whether any run is tested, or can be; else the scores of the validation rows are compared."""
        runs: list[Run] = list(self.finished.run)
        return any(run.record.data.has_test or run.scores("test") for run in runs)

    @property
    def compared(self) -> tuple[str, Score, str]:
        """By what methods are compared: the set `test` or `validation`, the score, its column of `rows`."""
        if self.has_test:
            return "test", self.score, "reported_score"
        return "validation", self.selected_by, "selection_score"

    @property
    def failed(self) -> pd.DataFrame:
        """The rows of the runs that failed or diverged."""
        return self.rows[self.rows.state.isin(FAILED)]

    @property
    def chosen(self) -> pd.DataFrame:
        """The rows of the finished runs at the chosen rates."""
        return self.rows[self.rows.chosen]


def comparisons(runs: Sequence[Run], score: str | None = None) -> list[Comparison]:
    """Separate the runs of different tasks, and choose each method's learning rate.

    The reported score is accuracy where none is given, else the first benchmark, else the loss.

    Raises:
        InputError: No run has that score.
    """
    finished = [run for run in runs if run.state == "finished"]
    known = _score_names(finished)
    if score is not None and score not in known:
        names = ", ".join(sorted(known)) or "none"
        raise InputError(f"--score is {score!r}, which no run has: expected one of {names}")
    groups: list[list[Run]] = []
    for run in finished:
        same = next((group for group in groups if not differences(group[0].task, run.task)), None)
        if same is None:
            groups.append([run])
        else:
            same.append(run)
    by_size = sorted(groups, key=len, reverse=True)
    excluded = [run for run in runs if run.state not in ("finished", "repeated", "withdrawn")]
    made = []
    for members in by_size:
        own = [run for run in excluded if _belongs(run, members, len(groups) == 1)]
        differs_by = differences(by_size[0][0].task, members[0].task)
        made.append(_compare(variants_of([*members, *own]), score, members[0].task, differs_by))
    return made


def by_rank(comparison: Comparison) -> list[Comparison]:
    """Separate the ranks of a comparison, where some method has several; else return it alone.

    A method without an adapter is in each of them. Methods are named without their rank.
    """
    rows = comparison.rows
    if rows.groupby("family")["rank"].nunique().max() < 2:
        return [comparison]
    parts = []
    for rank in sorted(rows["rank"].dropna().unique()):
        own = rows[(rows["rank"] == rank) | rows["rank"].isna()]
        labels = own.drop_duplicates("method").set_index("family").method
        choices = {family: comparison.choices[label] for family, label in labels.items()}
        family = pd.Categorical(own.family, list(choices), ordered=True)
        own = own.assign(method=family)
        parts.append(replace(comparison, rows=own, choices=choices, rank=int(rank)))
    return parts


def _score_names(runs: Sequence[Run]) -> list[str]:
    moments = ("test", "final")
    return list(dict.fromkeys(n for run in runs for moment in moments for n in run.scores(moment)))


def _belongs(excluded: Run, members: Sequence[Run], only: bool) -> bool:
    """Return whether an excluded run is of the task of some finished runs."""
    if excluded.method is None:
        return False
    if excluded.task:
        shared = members[0].task
        known = {name: value for name, value in shared.items() if name not in KNOWN_AT_THE_END}
        return not differences(excluded.task, known)
    return only or any(run.folder.is_relative_to(excluded.folder.parent) for run in members)


def run_rows(runs: Mapping[str, Sequence[Run]], selected_by: str, reported: str) -> pd.DataFrame:
    """Return a row for each run, which are given by the label of their method.

    Returns:
        The columns of runs.csv but for the task's number; and `rate`, the learning rate's name, of ordered
        categories; `validation_loss`; and `run`.
    """
    rows = [
        {
            "method": label,
            "rank": run.rank,
            "learning_rate": run.learning_rate,
            "seed": run.seed,
            "state": run.state,
            "untouched_score": run.scores("zero_shot").get(selected_by),
            "start_score": run.scores("after_init").get(selected_by),
            "selection_score": run.scores("final").get(selected_by),
            "validation_loss": run.scores("final").get("loss"),
            "reported_score": run.scores("test").get(reported),
            "trainable_parameters": run.record.model.trainable_parameters,
            "init_seconds": run.init_seconds,
            "step_seconds": run.step_seconds,
            "train_seconds": run.train_seconds,
            "peak_bytes": run.peak_bytes,
            "device": run.device,
            "folder": str(run.folder),
            "reason": run.reason,
            "run": run,
        }
        for label, members in runs.items()
        for run in members
    ]
    frame = pd.DataFrame(rows)
    scores = [name for name in frame if name.endswith(("_score", "_loss"))]
    whole = ["rank", "seed", "trainable_parameters", "peak_bytes"]
    names = frame.sort_values("learning_rate").learning_rate.map(rate_name).unique()
    rates = pd.Categorical(frame.learning_rate.map(rate_name), names, ordered=True)
    types = dict.fromkeys(scores, float) | dict.fromkeys(whole, "Int64")
    return frame.astype(types).assign(rate=rates)


def rate_name(value: float) -> str:
    """Write a learning rate, which a run may lack."""
    return "none" if math.isnan(value) else rate_text(value)


def _compare(
    variants: Mapping[str, MethodRuns],
    score: str | None,
    shared: Settings,
    differs_by: dict[str, tuple[Any, Any]],
) -> Comparison:
    finished = [run for own in variants.values() for run in own.runs if run.state == "finished"]
    names = _score_names(finished)
    benchmarks = [name for name in names if name.count("/") == 1]
    usual = "accuracy" if "accuracy" in names else (benchmarks or ["loss"])[0]
    lower = {name for run in finished for name in run.record.lower_is_better}
    reported = Score(score if score in names else usual, lower)
    # A benchmark's questions are of the reported set: only rows may choose.
    on_rows = "/" not in reported and all(reported in run.scores("final") for run in finished)
    chooser = reported if on_rows else Score("loss")
    rows = run_rows({label: own.runs for label, own in variants.items()}, chooser, reported)
    # An excluded run of unknown settings has those of the variant that it counts for.
    ranks = rows.method.map({label: own.rank for label, own in variants.items()})
    rows = rows.assign(
        family=rows.method.map({label: own.family for label, own in variants.items()}),
        rank=ranks.astype("Int64"),
    )
    # An excluded run of an unknown rate is listed, and belongs to no rate.
    rows = rows[(rows.state == "finished") | rows.learning_rate.notna()]
    choices = {
        label: _choose(rows[rows.method == label], -1 if chooser.less_is_better else 1)
        for label in variants
    }
    best = rows.method.map({label: choice.rate for label, choice in choices.items()})
    rows = rows.assign(chosen=(rows.state == "finished") & (rows.rate.astype(str) == best))
    means = rows[rows.chosen].groupby("method")[["reported_score", "selection_score"]].mean()

    def order(label: str) -> tuple[int, float, str]:
        if label not in means.index:
            return (2, 0.0, label)
        test, validation = (
            value if score.less_is_better else -value
            for value, score in zip(means.loc[label], (reported, chooser), strict=True)
        )
        return (1, validation, label) if math.isnan(test) else (0, test, label)

    labels = sorted(variants, key=order)
    rows = rows.assign(method=pd.Categorical(rows.method, labels, ordered=True))
    rows = rows.sort_values(["method", "rate"], kind="stable")
    return Comparison(rows, {k: choices[k] for k in labels}, reported, chooser, shared, differs_by)


def _choose(rows: pd.DataFrame, sign: int) -> Choice:
    """Choose the learning rate of a method; the reported set plays no part in it.

    The best rate is the one with the best mean selection score on the validation rows, among the rates at
    which no run failed or diverged, over the seeds that all of these rates have finished; of equal ones the
    one with the lower validation loss, then the lower rate. Rates with fewer seeds than the best one are then
    left out, and the others compared again, over more seeds. Where the rates have no seed in common, those
    with the fewest are left out. `sign` is 1 if more of the selection score is better, -1 if less is.
    """
    failed = rows.rate[rows.state.isin(FAILED)]
    able = rows[rows.selection_score.notna() & ~rows.rate.isin(failed)]
    seeds = able.groupby("rate", observed=True).seed.agg(set)
    while len(seeds) and not set.intersection(*seeds):
        seeds = seeds.drop(seeds.map(len).idxmin())
    if seeds.empty:
        return Choice(None, "", set())
    best = _best(able, seeds, sign)
    while (kept := seeds[seeds.map(len) >= len(seeds[best])]).size < seeds.size:
        seeds = kept
        best = _best(able, seeds, sign)
    shared = set.intersection(*seeds)
    edge = {rows.rate.max(): "highest", rows.rate.min(): "lowest"}.get(best, "")
    return Choice(best, "only" if rows.rate.nunique() == 1 else edge, shared)


def _best(able: pd.DataFrame, seeds: pd.Series, sign: int) -> Any:
    """Return the best of the rates in `seeds`, over the seeds that all of them have."""
    compared = able[able.rate.isin(seeds.index) & able.seed.isin(set.intersection(*seeds))]
    columns = ["selection_score", "validation_loss"]
    means = compared.groupby("rate", observed=True)[columns].mean()
    # Few rows tie often, but for the rounding of float32.
    means["selection_score"] = (sign * means["selection_score"]).round(6)
    means["validation_loss"] = means["validation_loss"].fillna(0)
    return means.sort_values(columns, ascending=[False, True]).index[0]
