"""Means over seeds, each method's best learning rate, and which runs may stand in one table."""

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from app.commands.compare.collect import FOUND_AT_THE_END, Collection
from app.commands.compare.runs import ExcludedRun, Run
from app.commands.compare.settings import Settings, differences
from app.utils.errors import InputError

SPOILT = ("failed", "diverged")
"""What a run at a learning rate must not be for the rate to be chosen."""

PENDING = ("missing", "unfinished")
"""Runs that may still come."""


@dataclass(frozen=True)
class Stat:
    """Mean and standard deviation.

        mean = sum(x) / n,    std = sqrt(sum((x - mean)^2) / (n - 1)),    NaN for n = 1

    Attributes:
        mean: NaN without values.
        std: Of the sample.
        n: Number of values.
    """

    mean: float
    std: float
    n: int

    @staticmethod
    def of(values: Iterable[float | None]) -> "Stat":
        """Return the statistic of the values that are there."""
        found = [float(value) for value in values if value is not None]
        mean = statistics.fmean(found) if found else math.nan
        std = statistics.stdev(found) if len(found) > 1 else math.nan
        return Stat(mean, std, len(found))


@dataclass(frozen=True)
class Rate:
    """A method at one learning rate.

    Attributes:
        learning_rate: The rate.
        runs: Its finished runs, one a seed.
        lost: Runs that failed, diverged, or are not finished.
        validation: Selection score on the validation rows.
        test: Reported score on the reported set; n is 0 where nothing was tested.
    """

    learning_rate: float
    runs: list[Run]
    lost: list[ExcludedRun]
    validation: Stat
    test: Stat

    @property
    def seeds(self) -> set[int]:
        """Seeds of the finished runs."""
        return {run.seed for run in self.runs}

    @property
    def spoilt(self) -> bool:
        """Whether a run failed or diverged."""
        return any(out.state in SPOILT for out in self.lost)


@dataclass(frozen=True)
class Method:
    """A method with all its learning rates.

    Attributes:
        label: Its name, with the settings that tell it from others of the same name.
        rates: By rising rate.
        best: The rate chosen on the validation rows; None if every rate has a run that failed or diverged,
            or none that is finished.
        edge: `lowest` or `highest` if the best rate is the last one tried on that side, `only` if no other
            was tried, else None.
        chosen_on: The seeds that the rates were compared on.
    """

    label: str
    rates: list[Rate]
    best: Rate | None
    edge: str | None
    chosen_on: set[int]


@dataclass(frozen=True)
class Task:
    """Runs that may stand in one table: same model, data and budget.

    Attributes:
        methods: The best first.
        score: The reported score.
        selected_by: The score of the validation rows that the rates are chosen by.
        apart: Whether the validation rows are apart from the reported set.
        shared: The settings that all runs share.
        apart_from_first: Settings in which it differs from the first task of the report.
    """

    methods: list[Method]
    score: str
    selected_by: str
    apart: bool
    shared: Settings
    apart_from_first: dict[str, tuple[Any, Any]]

    @property
    def runs(self) -> list[Run]:
        """All finished runs."""
        return [run for method in self.methods for rate in method.rates for run in rate.runs]

    @property
    def lost(self) -> list[ExcludedRun]:
        """All runs that are in no mean."""
        return [out for method in self.methods for rate in method.rates for out in rate.lost]


def is_better(score: str) -> int:
    """Return 1 if more of a score is better, -1 if less is."""
    return -1 if score.rpartition("/")[2] == "loss" else 1


def tasks(found: Collection, score: str | None = None) -> list[Task]:
    """Separate runs of different tasks, and choose each method's learning rate.

    The best rate is the one with the best mean selection score on the validation rows, among the rates at
    which no run failed or diverged, over the seeds that all of these rates have finished; of equal ones the
    one with the lower validation loss, then the lower rate. The reported set plays no part in the choice.

    Args:
        found: The runs.
        score: The reported score; None takes accuracy, else the first benchmark, else the loss.

    Raises:
        InputError: No run has that score.
    """
    known = {name for run in found.runs for name in (*run.test, *run.validation)}
    if score is not None and score not in known:
        names = ", ".join(sorted(known)) or "none"
        raise InputError(f"--score is {score!r}, which no run has: expected one of {names}")
    groups: list[tuple[Settings, list[Run]]] = []
    for run in found.runs:
        for shared, members in groups:
            if shared == run.task:
                members.append(run)
                break
        else:
            groups.append((run.task, [run]))
    groups.sort(key=lambda group: -len(group[1]))
    made = []
    for shared, members in groups:
        lost = [out for out in found.left_out if _belongs(out, shared, members, len(groups) == 1)]
        apart = differences(groups[0][0], shared)
        made.append(_task(members, lost, score, shared, apart))
    return made


def _belongs(out: ExcludedRun, shared: Settings, runs: Sequence[Run], only: bool) -> bool:
    """Return whether a lost run is of the task of some runs."""
    if out.method is None or out.state in ("repeated", "withdrawn"):
        return False
    if out.task is not None:
        known = {name: value for name, value in shared.items() if name not in FOUND_AT_THE_END}
        return not differences(out.task, known)
    return only or any(run.folder.is_relative_to(Path(out.name).parent) for run in runs)


def _task(
    runs: list[Run],
    lost: list[ExcludedRun],
    score: str | None,
    shared: Settings,
    apart_from_first: dict[str, tuple[Any, Any]],
) -> Task:
    known = {name for run in runs for name in (*run.test, *run.validation)}
    reported = score if score in known else _usual_score(runs)
    # A benchmark's questions are of the reported set: only rows may choose.
    with_rows = all(reported in run.validation and "/" not in reported for run in runs)
    chooser = reported if with_rows else "loss"
    variants = _variants(runs, lost)
    methods = [
        _method(label, variant.runs, variant.lost, reported, chooser)
        for label, variant in zip(_labels(variants), variants, strict=True)
    ]
    sign = is_better(reported)
    methods.sort(key=lambda method: _order(method, sign))
    apart = shared.get("data.init_args.validation_size") is not None
    return Task(methods, reported, chooser, apart, shared, apart_from_first)


class _Variant(NamedTuple):
    """The runs of one method with the same settings."""

    method: str
    settings: Settings
    runs: list[Run]
    lost: list[ExcludedRun]


def _variants(runs: Sequence[Run], lost: Sequence[ExcludedRun]) -> list[_Variant]:
    """Put runs of one method with the same settings together.

    A lost run whose settings are not known counts for every variant of its method.
    """
    found: list[_Variant] = []

    def variant(method: str, settings: Settings) -> _Variant:
        for known in found:
            if known.method == method and not differences(known.settings, settings):
                return known
        found.append(_Variant(method, settings, [], []))
        return found[-1]

    for run in runs:
        variant(run.method, run.settings).runs.append(run)
    for out in lost:
        namesakes = [known for known in found if known.method == out.method]
        if out.settings is None and namesakes:
            for known in namesakes:
                known.lost.append(out)
        else:
            variant(str(out.method), out.settings or {}).lost.append(out)
    return found


def _order(method: Method, sign: int) -> tuple[int, float, str]:
    if method.best is None:
        return (2, 0.0, method.label)
    stat = method.best.test if method.best.test.n else method.best.validation
    return (0 if method.best.test.n else 1, -sign * stat.mean, method.label)


def _method(
    label: str, runs: list[Run], lost: list[ExcludedRun], reported: str, chooser: str
) -> Method:
    tried = {run.learning_rate for run in runs if not math.isnan(run.learning_rate)}
    tried |= {out.learning_rate for out in lost if out.learning_rate is not None}
    rates = [_rate(value, runs, lost, reported, chooser) for value in sorted(tried) or [math.nan]]
    able, seeds = _comparable([rate for rate in rates if rate.validation.n and not rate.spoilt])
    sign = is_better(chooser)

    def mean(rate: Rate, score: str) -> float:
        return Stat.of(run.validation.get(score) for run in rate.runs if run.seed in seeds).mean

    def merit(rate: Rate) -> tuple[float, float]:
        # Few rows tie often, but for the rounding of float32. What is no number has no order.
        loss = mean(rate, "loss")
        return round(sign * mean(rate, chooser), 6), 0.0 if math.isnan(loss) else -loss

    best = max(able, key=merit, default=None)
    edge = None
    if best is not None and len(rates) == 1:
        edge = "only"
    elif best is rates[0]:
        edge = "lowest"
    elif best is rates[-1]:
        edge = "highest"
    return Method(label, rates, best, edge, seeds)


def _comparable(rates: list[Rate]) -> tuple[list[Rate], set[int]]:
    """Return the rates that have seeds in common, and these; who has fewest stands back where there is none."""
    able = list(rates)
    while able:
        seeds = set.intersection(*(rate.seeds for rate in able))
        if seeds:
            return able, seeds
        able.remove(min(able, key=lambda rate: len(rate.seeds)))
    return [], set()


def _rate(
    value: float, runs: list[Run], lost: list[ExcludedRun], reported: str, chooser: str
) -> Rate:
    mine = [run for run in runs if run.learning_rate == value or math.isnan(value)]
    return Rate(
        value,
        mine,
        [out for out in lost if out.learning_rate == value],
        Stat.of(run.validation.get(chooser) for run in mine),
        Stat.of(run.test.get(reported) for run in mine),
    )


def _usual_score(runs: Sequence[Run]) -> str:
    names = dict.fromkeys(name for run in runs for name in (*run.test, *run.validation))
    benchmarks = [name for name in names if name.count("/") == 1]
    return "accuracy" if "accuracy" in names else (benchmarks or ["loss"])[0]


def _labels(variants: Sequence[_Variant]) -> list[str]:
    """Name each variant by its method, with the settings that differ between those of the same name."""
    labels = []
    for variant in variants:
        namesakes = [other.settings for other in variants if other.method == variant.method]
        differ = dict.fromkeys(name for own in namesakes for name in differences(namesakes[0], own))
        parts = [f"{name.rpartition('.')[2]}={variant.settings.get(name)}" for name in differ]
        labels.append(variant.method + (f" ({', '.join(parts)})" if parts else ""))
    return labels
