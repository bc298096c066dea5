"""The numbers of a report as tables, with the notes below them."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import pandas as pd

from app.commands.compare.collect import Run
from app.commands.compare.selection import Comparison, MethodResult, is_loss, run_rows
from app.utils.text import rate_text

PENDING = ("missing", "unfinished")
"""States of runs that may still come."""

EDGES = {"lowest": "the lowest rate tried", "highest": "the highest rate tried"}
EDGE_MARKS = {"": "", "lowest": " †", "highest": " †", "only": " ‡"}

COSTS = ("trained parameters", "initialization, s", "step, ms", "training, s", "peak memory, GiB")

RUN_COLUMNS = (
    *("task", "method", "learning_rate", "seed", "state"),
    *("untouched_score", "start_score", "selection_score", "reported_score"),
    *("trainable_parameters", "init_seconds", "step_seconds", "train_seconds", "peak_bytes"),
    *("device", "folder", "reason"),
)


@dataclass(frozen=True)
class Table:
    """A table of a report.

    Attributes:
        frame: Text, with column titles; the first column names the rows.
        notes: Sentences below it, with `**bold**` as in Markdown.
        kind: CSS classes: none for numbers, `text` for words, `reasons` for sentences.
    """

    frame: pd.DataFrame
    notes: list[str] = field(default_factory=list)
    kind: str = ""

    def text(self) -> str:
        """Return the table with aligned columns, and its notes."""
        first = self.frame.columns[0]
        rows = self.frame.set_index(first).rename_axis(index=None, columns=first)
        return "\n".join([rows.to_string(), *(note.replace("**", "") for note in self.notes)])


def stat_text(stat: Any, score: str) -> str:
    """Write `85.12 ± 0.31`, in percent unless it is a loss; without ± for one seed.

    Args:
        stat: Has a `mean`, a `std` and a `count`.
        score: Its name.
    """
    if not stat["count"]:
        return ""
    factor, places = (1, 4) if is_loss(score) else (100, 2)
    mean = f"{factor * stat['mean']:.{places}f}"
    return mean if math.isnan(stat["std"]) else f"{mean} ± {factor * stat['std']:.{places}f}"


def rate_name(value: float) -> str:
    """Write a learning rate, which a run may lack."""
    return "none" if math.isnan(value) else rate_text(value)


def main_table(comparison: Comparison) -> Table:
    """Return one row a method, at its best learning rate."""
    rows = [_main_row(method, comparison) for method in comparison.methods]
    return Table(pd.DataFrame(rows), main_notes(comparison))


def _main_row(method: MethodResult, comparison: Comparison) -> dict[str, str]:
    test, validation = (
        f"{rows} {score}{'' if is_loss(score) else ', %'}"
        for rows, score in (("test", comparison.score), ("validation", comparison.selected_by))
    )
    if method.best is None:
        why = "none without a lost run" if method.failed_rates else "none finished"
        empty = dict.fromkeys((test, "seeds", "learning rate", validation, *COSTS), "")
        return {"method": method.label, **empty, "learning rate": why}
    reported, selected = (
        method.rates[column].loc[method.best] for column in ("reported_score", "selection_score")
    )
    tested, seeds = int(reported["count"]), int(selected["count"])
    trained = method.best_rows.trainable_parameters.iloc[0]
    mean = method.best_rows[["init_seconds", "step_seconds", "train_seconds"]].mean()
    peak = method.best_rows.peak_bytes.astype(float).mean() / 2**30
    costs = (
        "" if pd.isna(trained) else f"{trained:,}",
        _number(mean["init_seconds"], 1),
        _number(1000 * mean["step_seconds"], 0),
        _number(mean["train_seconds"], 0),
        _number(peak, 2),
    )
    return {
        "method": method.label,
        test: stat_text(reported, comparison.score) if tested else "not tested",
        "seeds": f"{seeds}" + (f" ({tested} tested)" if tested not in (0, seeds) else ""),
        "learning rate": rate_name(method.best) + EDGE_MARKS[method.edge],
        validation: stat_text(selected, comparison.selected_by),
        **dict(zip(COSTS, costs, strict=True)),
    }


def _number(value: float, places: int) -> str:
    return "" if math.isnan(value) else f"{value:,.{places}f}"


def rate_table(comparison: Comparison, reported: bool) -> Table:
    """Return one row a method, one column a learning rate: the whole curve.

    Args:
        comparison: The runs.
        reported: Show the test scores, else those on the validation rows.
    """
    score = comparison.score if reported else comparison.selected_by
    column = "reported_score" if reported else "selection_score"
    tried = pd.concat([m.rates for m in comparison.methods]).index.unique().sort_values()
    rows = []
    for method in comparison.methods:
        row = {"method": method.label}
        for rate, stat in method.rates[column].iterrows():
            states = Counter(method.rows.state[method.rows.learning_rate == rate])
            lost = ("diverged", "failed", "unfinished", "missing", "unreadable")
            parts = [stat_text(stat, score), *(f"{states[s]} {s}" for s in lost if states[s])]
            cell = ", ".join(part for part in parts if part)
            row[rate_name(rate)] = f"**{cell}**" if rate == method.best else cell
        rows.append(row)
    frame = pd.DataFrame(rows, columns=["method", *map(rate_name, tried)]).fillna("")
    note = (
        f"{'Test' if reported else 'Validation'} {score}{_in_percent(score)}, mean ± standard deviation over "
        "seeds; bold: the chosen rate."
    )
    return Table(frame, [note])


def _in_percent(score: str) -> str:
    return "" if is_loss(score) else ", in %"


def seed_table(comparison: Comparison) -> Table | None:
    """Return the reported scores at the chosen rates, one column a seed; None for one seed or none tested."""
    score = comparison.score
    rows = {
        method.label: {
            run.seed: stat_text({"mean": run.reported_score, "std": math.nan, "count": 1}, score)
            for run in method.best_rows.dropna(subset="reported_score").itertuples()
        }
        for method in comparison.methods
        if method.best is not None
    }
    seeds = sorted({seed for row in rows.values() for seed in row})
    if len(seeds) < 2:
        return None
    frame = pd.DataFrame(rows).T.reindex(columns=seeds).fillna("")
    note = (
        f"Test {score}{_in_percent(score)}. A seed gives every method the same rows in the same order, so that "
        "the differences in a column are paired."
    )
    return Table(frame.add_prefix("seed ").reset_index(names="method"), [note])


def before_training_table(comparison: Comparison) -> Table | None:
    """Return the scores before and after training at the chosen rates; None where none was asked before."""
    score = comparison.selected_by
    titles = {
        "untouched_score": "untouched model",
        "start_score": "after initialization",
        "selection_score": "trained",
    }
    rows = []
    for method in comparison.methods:
        if method.best is not None:
            stats = method.best_rows[list(titles)].agg(["mean", "std", "count"])
            if stats.loc["count", ["untouched_score", "start_score"]].any():
                texts = {title: stat_text(stats[name], score) for name, title in titles.items()}
                rows.append({"method": method.label, **texts})
    if not rows:
        return None
    note = f"Validation {score}{_in_percent(score)}, mean ± standard deviation over seeds, at the chosen rates."
    return Table(pd.DataFrame(rows), [note])


def excluded_table(runs: Sequence[Run]) -> Table | None:
    """Return the runs that are in no mean, and why; None if there is none."""
    rows = [
        {
            "method": run.method or "",
            "learning rate": "" if math.isnan(run.learning_rate) else rate_text(run.learning_rate),
            "seed": "" if run.seed is None else str(run.seed),
            "state": run.state,
            "reason": run.reason,
            "folder": str(run.folder),
        }
        for run in runs
        if run.state != "finished"
    ]
    return Table(pd.DataFrame(rows), kind="text reasons") if rows else None


def settings_table(comparison: Comparison) -> Table | None:
    """Return the settings in which the methods differ; None if it is the name alone."""
    settings = {
        method.label: method.finished.run.iloc[0].settings
        for method in comparison.methods
        if len(method.finished)
    }
    rows = []
    for name in dict.fromkeys(name for own in settings.values() for name in own):
        texts = {label: _text(own.get(name)) for label, own in settings.items()}
        if name != "model.method" and len(set(texts.values())) > 1:
            rows.append({"setting": name.replace(".init_args.", "."), **texts})
    return Table(pd.DataFrame(rows), kind="text") if rows else None


def _text(value: Any) -> str:
    """Write a setting; nothing for what is off or absent."""
    return "" if value is None or value is False else str(value)


def runs_csv(compared: Sequence[Comparison], runs: Sequence[Run]) -> str:
    """Return one row a run, those in no mean included; empty cells where nothing is known."""
    frames = [
        method.finished.assign(task=number, method=method.label)
        for number, comparison in enumerate(compared, 1)
        for method in comparison.methods
    ]
    excluded = [run for run in runs if run.state != "finished"]
    if excluded:
        rows = run_rows(excluded, "", "").assign(method=[run.method for run in excluded])
        frames.append(rows[["method", "learning_rate", "seed", "state", "folder", "reason"]])
    table = pd.concat(frames).astype({"task": "Int64"})
    return str(table.to_csv(columns=list(RUN_COLUMNS), index=False))


def main_notes(comparison: Comparison) -> list[str]:
    """Return the sentences below the table of methods at their best rates."""
    methods, runs = comparison.methods, comparison.runs
    states = Counter(state for method in methods for state in method.rows.state)
    pending = sum(states[state] for state in PENDING)
    notes = []
    if pending:
        notes.append(
            f"**Preliminary**: {len(runs)} of {states.total()} runs are finished, {pending} are not."
        )
    notes.append(
        f"Mean ± standard deviation (n - 1) over seeds at the learning rate with the best mean validation "
        f"{comparison.selected_by}; test scores play no part in the choice."
    )
    if not comparison.has_separate_validation:
        notes.append(
            "**The validation rows are the reported rows** (data.validation_size is null): the learning rates "
            "were chosen on what is reported, and the scores flatter every method."
        )
    passed_over = _passed_over(comparison)
    if passed_over:
        notes.append(
            "Better on the validation rows, but not chosen, since a run failed or diverged there: "
            f"{passed_over}."
        )
    notes += _unequal_seeds(methods)
    at_edge = [f"{m.label} ({EDGES[m.edge]})" for m in methods if m.edge in EDGES]
    if at_edge:
        notes.append(
            f"† At the edge of the rates tried, so that a better one may lie beyond: {', '.join(at_edge)}."
        )
    only = [method.label for method in methods if method.edge == "only"]
    if only:
        notes.append(f"‡ No other learning rate was tried: {', '.join(only)}.")
    if all(len(method.best_rows) < 2 for method in methods):
        notes.append("One seed says nothing about the spread between seeds.")
    return [*notes, *_measurement_notes(runs)]


def _measurement_notes(runs: Sequence[Run]) -> list[str]:
    """Say where times and memory were measured, and what disturbs them."""
    devices = sorted({run.record.train.device or "unknown device" for run in runs})
    memory = (
        "peak memory is what the process held (resident), libraries included."
        if devices == ["cpu"]
        else "peak memory is what the allocator of the device gave out; on the CPU, what the process held."
    )
    several = " Different devices: compare no times across them." if len(devices) > 1 else ""
    notes = [f"Times and memory were measured on {', '.join(devices)}; {memory}{several}"]
    together = most_at_once(runs)
    if together > 1:
        notes.append(
            f"Up to {together} of these runs trained at once on one machine, so that their times measure each "
            "other, too."
        )
    return notes


def most_at_once(runs: Sequence[Run]) -> int:
    """Return how many runs at most were training at the same time on one machine, as far as is known."""
    changes: dict[str | None, list[tuple[float, int]]] = {}
    for train in (run.record.train for run in runs):
        if train.began and train.ended:
            changes.setdefault(train.host, []).extend([(train.began, 1), (train.ended, -1)])
    running = [accumulate(change for _, change in sorted(on_host)) for on_host in changes.values()]
    return max(map(max, running), default=1)


def _passed_over(comparison: Comparison) -> str:
    """Name the rates that a failed or diverged run kept from being chosen."""
    sign = -1 if is_loss(comparison.selected_by) else 1
    parts = []
    for method in comparison.methods:
        scores = method.rates["selection_score"]
        best = -math.inf if method.best is None else sign * scores.loc[method.best, "mean"]
        parts += [
            f"{method.label} at {rate_name(rate)} ({stat_text(scores.loc[rate], comparison.selected_by)})"
            for rate in method.failed_rates
            if sign * scores.loc[rate, "mean"] > best
        ]
    return ", ".join(parts)


def _unequal_seeds(methods: Sequence[MethodResult]) -> list[str]:
    """Say where seeds are not the same: between the rates of a method, or between methods."""
    notes = []
    parts = [
        f"{method.label} ({_seeds(method.chosen_on)})"
        for method in methods
        if any(
            set(at_rate.seed) != method.chosen_on
            for _, at_rate in method.finished.groupby("learning_rate", dropna=False)
        )
    ]
    if parts:
        notes.append(f"Rates were chosen on the seeds that they share: {', '.join(parts)}.")
    seeds = {m.label: _seeds(set(m.best_rows.seed)) for m in methods if m.best is not None}
    if len(set(seeds.values())) > 1:
        parts = [f"{label} ({numbers})" for label, numbers in seeds.items()]
        notes.append(f"The means are not over the same seeds: {', '.join(parts)}.")
    return notes


def _seeds(seeds: set[int]) -> str:
    return ", ".join(map(str, sorted(seeds))) or "none"
