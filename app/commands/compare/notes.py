"""The notes below the table of a report's methods, and how scores are written."""

import math
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import accumulate

import pandas as pd

from app.commands.compare.collect import Run
from app.commands.compare.scores import Score
from app.commands.compare.selection import FAILED, Comparison

PENDING = ("missing", "unfinished")
"""States of runs that may still come."""

EDGES = {"lowest": "the lowest rate tried", "highest": "the highest rate tried"}


def score_text(values: pd.Series, score: Score) -> str:
    """Write the mean and the sample standard deviation of scores, NaN where there is none.

    Returns:
        `85.12 ± 0.31`, in percent if it is a fraction; without ± for one score, empty for none.
    """
    numbers = [score.factor * x for x in (values.mean(), values.std()) if not math.isnan(x)]
    parts = [f"{number:.{score.places}f}" for number in numbers]
    return " ± ".join(parts)


def main_notes(comparison: Comparison) -> list[str]:
    """Return the sentences below the table of methods at their best rates."""
    states, choices = Counter(comparison.rows.state), comparison.choices
    pending = sum(states[state] for state in PENDING)
    notes = []
    if pending:
        done = f"{states['finished']} of {states.total()} runs are finished"
        notes.append(f"**Preliminary**: {done}, {pending} are not.")
    notes.append(
        f"Mean ± standard deviation (n - 1) over seeds at the learning rate with the best mean validation "
        f"{comparison.selected_by}; test scores play no part in the choice."
    )
    if not comparison.has_test:
        notes.append(
            f"**There is no test**, neither rows nor a benchmark: methods stand in the order of the validation "
            f"{comparison.selected_by} that their rates were chosen by, which flatters each of them."
        )
    notes += _untested(comparison)
    data = {
        name: comparison.shared.get(f"data.init_args.{name}")
        for name in ("test_split", "validation_size")
    }
    if data == {"test_split": "validation", "validation_size": None}:  # GLUE's own
        notes.append(
            "**The validation rows are the reported rows** (data.validation_size is null): the learning rates "
            "were chosen on what is reported, and the scores flatter every method."
        )
    if passed_over := _passed_over(comparison):
        why = "Better on the validation rows, but not chosen, since a run failed or diverged there"
        notes.append(f"{why}: {passed_over}.")
    notes += _unequal_seeds(comparison)
    at_edge = [f"{label} ({EDGES[c.edge]})" for label, c in choices.items() if c.edge in EDGES]
    if at_edge:
        what = "† At the edge of the rates tried, so that a better one may lie beyond"
        notes.append(f"{what}: {', '.join(at_edge)}.")
    only = [label for label, choice in choices.items() if choice.edge == "only"]
    if only:
        notes.append(f"‡ No other learning rate was tried: {', '.join(only)}.")
    if (comparison.chosen.groupby("method", observed=True).selection_score.count() < 2).all():
        notes.append("One seed says nothing about the spread between seeds.")
    return [*notes, *_measurement_notes(list(comparison.finished.run))]


def _untested(comparison: Comparison) -> list[str]:
    """Say how the chosen runs that have no test score get one."""
    chosen, score = comparison.chosen, comparison.score
    untested = chosen[chosen.reported_score.isna()]
    if untested.empty or not comparison.has_test:
        return []
    command = f"`python train.py test --run {shlex.quote(untested.folder.iloc[0])}`"
    benchmark = " with the --config of its benchmark" if "/" in score else ""
    return [
        f"{len(untested)} of {len(chosen)} runs at the chosen rates have no test {score}: "
        f"{command}{benchmark} scores one."
    ]


def _measurement_notes(runs: Sequence[Run]) -> list[str]:
    """Say where times and memory were measured, and what disturbs them."""
    devices = sorted({run.device for run in runs})
    memory = (
        "peak memory is what the process held (resident), libraries included."
        if devices == ["cpu"]
        else "peak memory is what the allocator of the device gave out; on the CPU, what the process held."
    )
    several = " Different devices: compare no times across them." if len(devices) > 1 else ""
    notes = [f"Times and memory were measured on {', '.join(devices)}; {memory}{several}"]
    together = _most_at_once(runs)
    if together > 1:
        notes.append(
            f"Up to {together} of these runs trained at once on one machine, so that their times measure each "
            "other, too."
        )
    return notes


def _most_at_once(runs: Sequence[Run]) -> int:
    """Return how many runs at most were training at the same time on one machine, as far as is known."""
    changes: dict[str | None, list[tuple[float, int]]] = {}
    for train in (run.record.train for run in runs):
        if train.began and train.ended:
            changes.setdefault(train.host, []).extend([(train.began, 1), (train.ended, -1)])
    running = [accumulate(change for _, change in sorted(on_host)) for on_host in changes.values()]
    return max(map(max, running), default=1)


def _passed_over(comparison: Comparison) -> str:
    """Name the rates that a failed or diverged run kept from being chosen."""
    by_rate = comparison.rows.groupby(["method", "rate"], observed=True)
    merits = by_rate.selection_score.mean() * (-1 if comparison.selected_by.less_is_better else 1)
    parts = []
    for (label, rate), rows in by_rate:
        best = comparison.choices[label].rate
        least = -math.inf if best is None else merits[label, best]
        if rows.state.isin(FAILED).any() and merits[label, rate] > least:
            score = score_text(rows.selection_score, comparison.selected_by)
            parts.append(f"{label} at {rate} ({score})")
    return ", ".join(parts)


def _unequal_seeds(comparison: Comparison) -> list[str]:
    """Say where seeds are not the same: between the rates of a method, or between methods."""
    by_rate = comparison.finished.groupby(["method", "rate"], observed=True).seed.agg(set)
    shared, used, notes = {}, {}, []
    for label, choice in comparison.choices.items():
        if any(not seeds <= choice.seeds for (own, _), seeds in by_rate.items() if own == label):
            shared[label] = choice.seeds
        if choice.rate is not None:
            used[label] = by_rate[label, choice.rate]
    if shared:
        notes.append(f"Rates were chosen on the seeds that they share: {_seeds_text(shared)}.")
    if len(set(map(frozenset, used.values()))) > 1:
        notes.append(f"The means are not over the same seeds: {_seeds_text(used)}.")
    return notes


def _seeds_text(seeds: Mapping[str, set[int]]) -> str:
    numbers = {label: ", ".join(map(str, sorted(own))) or "none" for label, own in seeds.items()}
    return ", ".join(f"{label} ({text})" for label, text in numbers.items())
