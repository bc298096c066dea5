"""Group runs that may stand in one table, and choose each method's learning rate."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from app.commands.compare.collect import KNOWN_AT_THE_END, Run
from app.commands.compare.settings import Settings, differences
from app.utils.errors import InputError

FAILED = ("failed", "diverged")
"""A learning rate at which a run is in such a state is not chosen."""


@dataclass(frozen=True)
class MethodResult:
    """A method with all its learning rates.

    Attributes:
        label: Its name, with the settings that tell it from others of the same name.
        rows: A row for each run; columns as `run_rows` makes them.
        rates: A row for each learning rate, rising (the index; NaN for none). Columns: of `selection_score` and
            `reported_score` over seeds the mean, the std = sqrt(sum((x - mean)^2) / (n - 1)) (NaN for n = 1)
            and the count.
        best: The rate chosen on the validation rows; None if every rate has a run that failed or diverged,
            or none that is finished.
        chosen_on: The seeds that the rates were compared on.
    """

    label: str
    rows: pd.DataFrame
    rates: pd.DataFrame
    best: float | None
    chosen_on: set[int]

    @property
    def edge(self) -> str:
        """Where the best rate lies among those tried: `lowest`, `highest`, `only` or nothing."""
        if self.best is None:
            return ""
        if len(self.rates) == 1:
            return "only"
        edges = {0: "lowest", len(self.rates) - 1: "highest"}
        return edges.get(self.rates.index.get_loc(self.best), "")

    @property
    def finished(self) -> pd.DataFrame:
        """Rows of the finished runs, by rising rate."""
        return self.rows[self.rows.state == "finished"].sort_values("learning_rate", kind="stable")

    @property
    def best_rows(self) -> pd.DataFrame:
        """Rows of the finished runs at the best rate."""
        rows = self.finished
        return rows.iloc[:0] if self.best is None else rows[rows.learning_rate.isin([self.best])]

    @property
    def failed_rates(self) -> list[float]:
        """Rates at which a run failed or diverged."""
        return sorted(set(self.rows.learning_rate[self.rows.state.isin(FAILED)]))


@dataclass(frozen=True)
class Comparison:
    """Runs that may stand in one table: same model, data and budget.

    Attributes:
        methods: The best first.
        score: The reported score.
        selected_by: The score of the validation rows that the rates are chosen by.
        shared: The settings that all runs share.
        differs_by: Settings in which it differs from the first comparison of the report.
    """

    methods: list[MethodResult]
    score: str
    selected_by: str
    shared: Settings
    differs_by: dict[str, tuple[Any, Any]]

    @property
    def runs(self) -> list[Run]:
        """The finished runs."""
        return [run for method in self.methods for run in method.finished.run]

    @property
    def has_separate_validation(self) -> bool:
        """Whether the validation rows are other ones than the reported set."""
        return self.shared.get("data.init_args.validation_size") is not None


def is_loss(score: str) -> bool:
    """Return whether a score is a loss: the less the better, and no percentage."""
    return score.rpartition("/")[2] == "loss"


def direction(score: str) -> int:
    """Return 1 if more of a score is better, -1 if less is."""
    return -1 if is_loss(score) else 1


def comparisons(runs: Sequence[Run], score: str | None = None) -> list[Comparison]:
    """Separate runs of different tasks, and choose each method's learning rate.

    Args:
        runs: From `collect`.
        score: The reported score; None takes accuracy, else the first benchmark, else the loss.

    Raises:
        InputError: No run has that score.
    """
    finished = [run for run in runs if run.state == "finished"]
    known = set(_score_names(finished))
    if score is not None and score not in known:
        names = ", ".join(sorted(known)) or "none"
        raise InputError(f"--score is {score!r}, which no run has: expected one of {names}")
    groups: list[tuple[Settings, list[Run]]] = []
    for run in finished:
        task = run.task or {}
        members = next((members for shared, members in groups if shared == task), None)
        if members is None:
            groups.append((task, [run]))
        else:
            members.append(run)
    groups.sort(key=lambda group: -len(group[1]))
    excluded = [run for run in runs if run.state not in ("finished", "repeated", "withdrawn")]
    made = []
    for shared, members in groups:
        others = [run for run in excluded if _belongs(run, shared, members, len(groups) == 1)]
        made.append(_compare(members, others, score, shared, differences(groups[0][0], shared)))
    return made


def _belongs(excluded: Run, shared: Settings, members: Sequence[Run], only: bool) -> bool:
    """Return whether an excluded run is of the task of some finished runs."""
    if excluded.method is None:
        return False
    if excluded.task is not None:
        known = {name: value for name, value in shared.items() if name not in KNOWN_AT_THE_END}
        return not differences(excluded.task, known)
    return only or any(run.folder.is_relative_to(excluded.folder.parent) for run in members)


def _score_names(runs: Sequence[Run]) -> list[str]:
    moments = ("test", "final")
    return list(dict.fromkeys(n for run in runs for moment in moments for n in run.scores(moment)))


def _compare(
    finished: list[Run],
    excluded: list[Run],
    score: str | None,
    shared: Settings,
    differs_by: dict[str, tuple[Any, Any]],
) -> Comparison:
    names = _score_names(finished)
    benchmarks = [name for name in names if name.count("/") == 1]
    usual = "accuracy" if "accuracy" in names else (benchmarks or ["loss"])[0]
    reported = score if score in names else usual
    # A benchmark's questions are of the reported set: only rows may choose.
    on_rows = "/" not in reported and all(reported in run.scores("final") for run in finished)
    chooser = reported if on_rows else "loss"
    methods = [
        _method(label, run_rows(runs, chooser, reported), direction(chooser))
        for label, runs in _variants(finished, excluded).items()
    ]

    def order(method: MethodResult) -> tuple[int, float, str]:
        if method.best is None:
            return (2, 0.0, method.label)
        tested = method.rates["reported_score"].loc[method.best]
        shown = tested if tested["count"] else method.rates["selection_score"].loc[method.best]
        return (0 if tested["count"] else 1, -direction(reported) * shown["mean"], method.label)

    return Comparison(sorted(methods, key=order), reported, chooser, shared, differs_by)


def _variants(finished: Sequence[Run], excluded: Sequence[Run]) -> dict[str, list[Run]]:
    """Put runs of one method with the same settings together, by a label.

    The label is the method's name, with the settings that differ between those of the same name. An excluded
    run whose settings are not known counts for every variant of its method.
    """
    variants: list[tuple[str | None, Settings, list[Run]]] = []

    def variant(method: str | None, settings: Settings) -> list[Run]:
        for name, known, members in variants:
            if name == method and not differences(known, settings):
                return members
        variants.append((method, settings, []))
        return variants[-1][2]

    for run in finished:
        variant(run.method, run.settings or {}).append(run)
    for run in excluded:
        namesakes = [members for name, _, members in variants if name == run.method]
        if run.settings is not None or not namesakes:
            namesakes = [variant(run.method, run.settings or {})]
        for members in namesakes:
            members.append(run)
    labels = {}
    for method, settings, members in variants:
        same = [known for name, known, _ in variants if name == method]
        differ = dict.fromkeys(name for known in same for name in differences(same[0], known))
        parts = [f"{name.rpartition('.')[2]}={settings.get(name)}" for name in differ]
        labels[f"{method} ({', '.join(parts)})" if parts else str(method)] = members
    return labels


def run_rows(runs: Sequence[Run], selected_by: str, reported: str) -> pd.DataFrame:
    """Return a row for each run; of those that do not count without numbers.

    Args:
        runs: The runs.
        selected_by: The score that the learning rates are chosen by.
        reported: The score that is reported.
    """
    rows = []
    for run in runs:
        train = run.record.train
        rows.append(
            {
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
                "step_seconds": run.train_seconds / train.steps if train.steps else math.nan,
                "train_seconds": run.train_seconds,
                "peak_bytes": run.peak_bytes,
                "device": train.device or "unknown device",
                "folder": str(run.folder),
                "reason": run.reason,
                "run": run,
            }
        )
    frame = pd.DataFrame(rows)
    scores = [name for name in frame if str(name).endswith(("_score", "_loss"))]
    whole = dict.fromkeys(("seed", "trainable_parameters", "peak_bytes"), "Int64")
    return frame.astype({**dict.fromkeys(scores, float), **whole})


def _method(label: str, rows: pd.DataFrame, sign: int) -> MethodResult:
    """Choose a method's learning rate.

    Args:
        label: Names it.
        rows: Of its runs.
        sign: 1 if more of the selection score is better, -1 if less is.
    """
    # An excluded run of an unknown rate is listed, and belongs to no rate.
    rows = rows[(rows.state == "finished") | rows.learning_rate.notna()]
    by_rate = rows.groupby("learning_rate", dropna=False)[["selection_score", "reported_score"]]
    best, seeds = _best_rate(rows, sign)
    return MethodResult(label, rows, by_rate.agg(["mean", "std", "count"]), best, seeds)


def _best_rate(rows: pd.DataFrame, sign: int) -> tuple[float | None, set[int]]:
    """Return the best rate and the seeds that the rates were compared on.

    The best rate is the one with the best mean selection score on the validation rows, among the rates at
    which no run failed or diverged, over the seeds that all of these rates have finished; of equal ones the
    one with the lower validation loss, then the lower rate. Where the rates have no seed in common, those with
    the fewest seeds are left out. The reported set plays no part in the choice.
    """
    failed = rows.learning_rate[rows.state.isin(FAILED)]
    able = rows[rows.selection_score.notna() & ~rows.learning_rate.isin(failed)]
    seeds = {rate: set(group.seed) for rate, group in able.groupby("learning_rate", dropna=False)}
    while seeds and not set.intersection(*seeds.values()):
        del seeds[min(seeds, key=lambda rate: len(seeds[rate]))]
    if not seeds:
        return None, set()
    shared = set.intersection(*seeds.values())
    compared = able[able.learning_rate.isin(list(seeds)) & able.seed.isin(shared)]
    columns = ["selection_score", "validation_loss"]
    means = compared.groupby("learning_rate", dropna=False)[columns].mean()
    # Few rows tie often, but for the rounding of float32.
    means["selection_score"] = (sign * means["selection_score"]).round(6)
    means["validation_loss"] = means["validation_loss"].fillna(0)
    best = means.sort_values(columns, ascending=[False, True]).index[0]
    return float(best), shared
