"""Means over seeds, each method's best learning rate, and which runs may stand in one table."""

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from app.compare.collect import Collection, LeftOut, Run
from app.compare.settings import Settings, differences
from app.errors import InputError


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
        lost: Runs that failed, diverged or were not finished.
        validation: Selection score on the validation rows.
        test: Reported score on the reported set; n is 0 where nothing was tested.
    """

    learning_rate: float
    runs: list[Run]
    lost: list[LeftOut]
    validation: Stat
    test: Stat


@dataclass(frozen=True)
class Method:
    """A method with all its learning rates.

    Attributes:
        label: Its name, with the settings that tell it from others of the same name.
        rates: By rising rate.
        best: The rate chosen on the validation rows; None if there is none without lost runs.
        edge: `lowest` or `highest` if the best rate is the last one tried on that side, `only` if no other
            was tried, else None.
    """

    label: str
    rates: list[Rate]
    best: Rate | None
    edge: str | None


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
    def lost(self) -> list[LeftOut]:
        """All runs that are in no mean."""
        return [out for method in self.methods for rate in method.rates for out in rate.lost]


def is_better(score: str) -> int:
    """Return 1 if more of a score is better, -1 if less is."""
    return -1 if score.rpartition("/")[2] == "loss" else 1


def tasks(found: Collection, score: str | None = None) -> list[Task]:
    """Separate runs of different tasks, and choose each method's learning rate.

    The best rate is the one with the best mean selection score on the validation rows, over the rates of
    which no run was lost and which have as many seeds as any other; of equal ones the lower. The reported
    set plays no part in the choice.

    Args:
        found: The runs.
        score: The reported score; None takes accuracy, else the first benchmark, else the loss.

    Raises:
        InputError: No run has that score.
    """
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
        lost = [out for out in found.left_out if out.method and _beside(out, members)]
        if len(groups) == 1:
            lost = [out for out in found.left_out if out.method]
        apart = differences(groups[0][0], shared)
        made.append(_task(members, lost, score, shared, apart))
    return made


def _beside(out: LeftOut, runs: Sequence[Run]) -> bool:
    """Return whether a lost run lies in the comparison, or among the versions, of some runs."""
    return any(run.folder.is_relative_to(Path(out.name).parent) for run in runs)


def _task(
    runs: list[Run],
    lost: list[LeftOut],
    score: str | None,
    shared: Settings,
    apart_from_first: dict[str, tuple[Any, Any]],
) -> Task:
    reported = score or _usual_score(runs)
    known = {name for run in runs for name in (*run.test, *run.validation)}
    if reported not in known:
        names = ", ".join(sorted(known)) or "none"
        raise InputError(f"--score is {reported!r}, which no run has: expected one of {names}")
    # A benchmark's questions are of the reported set: only rows may choose.
    with_rows = all(reported in run.validation and "/" not in reported for run in runs)
    chooser = reported if with_rows else "loss"
    variants: dict[str, list[Run]] = {}
    labels = _labels(runs)
    for run in runs:
        variants.setdefault(labels[id(run)], []).append(run)
    label_of = {run.method: label for label, members in variants.items() for run in members}
    for out in lost:  # methods of which nothing was finished
        variants.setdefault(label_of.get(str(out.method), str(out.method)), [])
    methods = [
        _method(label, members, _lost_of(label, members, lost), reported, chooser)
        for label, members in variants.items()
    ]
    sign = is_better(reported)
    methods.sort(key=lambda method: _order(method, sign))
    apart = shared.get("data.init_args.validation_size") is not None
    return Task(methods, reported, chooser, apart, shared, apart_from_first)


def _order(method: Method, sign: int) -> tuple[int, float, str]:
    if method.best is None:
        return (2, 0.0, method.label)
    stat = method.best.test if method.best.test.n else method.best.validation
    return (0 if method.best.test.n else 1, -sign * stat.mean, method.label)


def _lost_of(label: str, members: Sequence[Run], lost: Sequence[LeftOut]) -> list[LeftOut]:
    method = members[0].method if members else label
    return [out for out in lost if out.method == method and out.state != "repeated"]


def _method(
    label: str, runs: list[Run], lost: list[LeftOut], reported: str, chooser: str
) -> Method:
    tried = {run.learning_rate for run in runs if not math.isnan(run.learning_rate)}
    tried |= {out.learning_rate for out in lost if out.learning_rate is not None}
    rates = [_rate(value, runs, lost, reported, chooser) for value in sorted(tried) or [math.nan]]
    seeds = max((rate.validation.n for rate in rates), default=0)
    whole = [rate for rate in rates if rate.validation.n == seeds > 0 and not rate.lost]
    sign = is_better(chooser)
    best = max(whole, key=lambda rate: sign * rate.validation.mean, default=None)
    edge = None
    if best is not None and len(rates) == 1:
        edge = "only"
    elif best is rates[0]:
        edge = "lowest"
    elif best is rates[-1]:
        edge = "highest"
    return Method(label, rates, best, edge)


def _rate(value: float, runs: list[Run], lost: list[LeftOut], reported: str, chooser: str) -> Rate:
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


def _labels(runs: Sequence[Run]) -> dict[int, str]:
    """Name each run's method, with the settings that differ between runs of the same name."""
    labels: dict[int, str] = {}
    for run in runs:
        namesakes = [other for other in runs if other.method == run.method]
        differ = dict.fromkeys(
            name
            for other in namesakes
            for name in differences(namesakes[0].settings, other.settings)
        )
        parts = [f"{name.rpartition('.')[2]}={run.settings.get(name)}" for name in differ]
        labels[id(run)] = run.method + (f" ({', '.join(parts)})" if parts else "")
    return labels
