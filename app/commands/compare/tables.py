"""The numbers of a report as tables."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import pandas as pd

from app.commands.compare.collect import Run
from app.commands.compare.notes import main_notes, score_text
from app.commands.compare.scores import Score
from app.commands.compare.selection import Comparison, rate_name, run_rows

EDGE_MARKS = {"": "", "lowest": " †", "highest": " †", "only": " ‡"}

COSTS = {
    "trained parameters": ("trainable_parameters", 1, 0),
    "initialization, s": ("init_seconds", 1, 1),
    "step, ms": ("step_seconds", 1000, 0),
    "training, s": ("train_seconds", 1, 0),
    "peak memory, GiB": ("peak_bytes", 2**-30, 2),
}
"""Columns of the main table: of which column of the runs the mean, its factor, decimal places."""

RUN_COLUMNS = (
    *("task", "method", "rank", "learning_rate", "seed", "state"),
    *("untouched_score", "start_score", "selection_score", "reported_score"),
    *("trainable_parameters", "init_seconds", "step_seconds", "train_seconds", "peak_bytes"),
    *("device", "folder", "reason"),
)


@dataclass(frozen=True)
class Table:
    """A table of a report.

    Attributes:
        frame: Text, with titles for the columns and the index.
        notes: Sentences below it, with `**bold**` as in Markdown.
        kind: CSS classes: none for numbers, `text` for words, `reasons` for sentences.
    """

    frame: pd.DataFrame
    notes: list[str] = field(default_factory=list)
    kind: str = ""

    @property
    def lines(self) -> list[list[str]]:
        """The titles, and the cells of each row."""
        cells = self.frame.reset_index().astype(str)
        return [list(cells.columns), *cells.values.tolist()]

    def text(self) -> str:
        """Return the table with aligned columns, and its notes."""
        first, *others = (max(map(len, column)) for column in zip(*self.lines, strict=True))
        rows = []
        for name, *cells in self.lines:
            numbers = (cell.rjust(width) for cell, width in zip(cells, others, strict=True))
            rows.append("  ".join([name.ljust(first), *numbers]).rstrip())
        return "\n".join([*rows, *(note.replace("**", "") for note in self.notes)])


def _percent(score: Score, before: str = ", ") -> str:
    return f"{before}%" if score.is_fraction else ""


def main_table(comparison: Comparison) -> Table:
    """Return one row a method, at its best learning rate."""
    reported, selected = comparison.score, comparison.selected_by
    rows = {}
    for label, choice in comparison.choices.items():
        own = comparison.chosen[comparison.chosen.method == label]
        seeds, tested = own.selection_score.count(), own.reported_score.count()
        rate = (choice.rate or "") + EDGE_MARKS[choice.edge]
        if choice.rate is None:
            failed = (comparison.failed.method == label).any()
            rate = "none without a lost run" if failed else "none finished"
        test = score_text(own.reported_score, reported)
        if choice.rate is not None and not tested:
            test = "not tested"
        rows[label] = {f"test {reported}{_percent(reported)}": test} if comparison.has_test else {}
        rows[label] |= {
            "seeds": f"{seeds or ''}" + (f" ({tested} tested)" if tested not in (0, seeds) else ""),
            "learning rate": rate,
            f"validation {selected}{_percent(selected)}": score_text(own.selection_score, selected),
        }
        for title, (column, factor, places) in COSTS.items():
            mean = factor * own[column].astype(float).mean()
            rows[label][title] = "" if math.isnan(mean) else f"{mean:,.{places}f}"
    frame = pd.DataFrame.from_dict(rows, orient="index").rename_axis("method")
    return Table(frame, main_notes(comparison))


def rank_table(parts: Sequence[Comparison]) -> Table | None:
    """Return the compared scores: one row a method, one column a rank; None for fewer than two ranks.

    `parts` is from `by_rank`.
    """
    if len(parts) < 2:
        return None
    of, score, column = parts[0].compared
    columns: dict[str, dict[str, str]] = {}
    for part in parts:
        columns[f"rank {part.rank}"] = column_of = {}
        for label, choice in part.choices.items():
            own = part.chosen[part.chosen.method == label]
            text = score_text(own[column], score)
            column_of[label] = text and f"{text} at {choice.rate}{EDGE_MARKS[choice.edge]}"
    note = (
        f"{of.capitalize()} {score}{_percent(score, ', in ')}, mean ± standard deviation over seeds, at each "
        "rank's best learning rate. In a row only the rank differs, and lora_alpha where it is tied to the "
        "rank; the scaling is lora_alpha / sqrt(r), or lora_alpha / r without use_rslora. A method without an "
        "adapter stands in every column."
    )
    frame = pd.DataFrame(columns).fillna("")
    return Table(frame.rename_axis("method"), [note])


def rate_table(comparison: Comparison, reported: bool) -> Table:
    """Return the test or the validation scores: one row a method, one column a learning rate."""
    score = comparison.score if reported else comparison.selected_by
    column = "reported_score" if reported else "selection_score"

    def cell(rows: pd.DataFrame) -> str:
        states = Counter(rows.state)
        lost = ("diverged", "failed", "unfinished", "missing", "unreadable")
        parts = [score_text(rows[column], score), *(f"{states[s]} {s}" for s in lost if states[s])]
        text = ", ".join(filter(None, parts))
        return f"**{text}**" if rows.chosen.any() else text

    by_rate = comparison.rows.groupby(["method", "rate"], observed=True)
    note = (
        f"{'Test' if reported else 'Validation'} {score}{_percent(score, ', in ')}, mean ± standard deviation "
        "over seeds; bold: the chosen rate."
    )
    return Table(by_rate.apply(cell).unstack(fill_value=""), [note])


def seed_table(comparison: Comparison) -> Table | None:
    """Return the compared scores at the chosen rates, one column a seed; None for one seed or none tested."""
    of, score, column = comparison.compared
    tested = comparison.chosen.dropna(subset=column)
    scores = tested.pivot(index="method", columns="seed", values=column)
    if scores.shape[1] < 2:
        return None
    labels = [label for label, choice in comparison.choices.items() if choice.rate is not None]
    frame = scores.reindex(labels).map(lambda value: score_text(pd.Series([value]), score))
    note = (
        f"{of.capitalize()} {score}{_percent(score, ', in ')}. A seed gives every method the same rows in the "
        "same order, so that the differences in a column are paired."
    )
    return Table(frame.add_prefix("seed "), [note])


def before_training_table(comparison: Comparison) -> Table | None:
    """Return the scores before and after training at the chosen rates; None where none was asked before."""
    score = comparison.selected_by
    titles = {"untouched_score": "untouched model", "start_score": "after initialization"}
    known = comparison.chosen.dropna(subset=list(titles), how="all")
    if known.empty:
        return None
    asked = comparison.chosen[comparison.chosen.method.isin(known.method)]
    titles["selection_score"] = "trained"
    frame = asked.groupby("method", observed=True)[list(titles)].agg(score_text, score)
    note = (
        f"Validation {score}{_percent(score, ', in ')}, mean ± standard deviation over seeds, at the chosen "
        "rates."
    )
    return Table(frame.rename(columns=titles), [note])


def excluded_table(runs: Sequence[Run]) -> Table | None:
    """Return the runs that are in no mean, and why; None if there is none."""
    rows = [
        {
            "method": run.method or "",
            "learning rate": "" if math.isnan(run.learning_rate) else rate_name(run.learning_rate),
            "seed": "" if run.seed is None else str(run.seed),
            "state": run.state,
            "reason": run.reason,
            "folder": str(run.folder),
        }
        for run in runs
        if run.state != "finished"
    ]
    return Table(pd.DataFrame(rows).set_index("method"), kind="text reasons") if rows else None


def settings_table(comparison: Comparison) -> Table | None:
    """Return the settings in which the methods differ, empty where one is off; None if it is the name alone."""
    first = comparison.finished.groupby("method", observed=True).run.first()
    texts = {
        label: {k: "" if v in (None, False) else str(v) for k, v in run.settings.items()}
        for label, run in first.items()
    }
    frame = pd.DataFrame(texts).fillna("").drop(index="model.method")
    frame = frame[frame.nunique(axis=1) > 1]
    frame.index = frame.index.str.replace(".init_args.", ".")
    return None if frame.empty else Table(frame.rename_axis("setting"), kind="text")


def runs_csv(compared: Sequence[Comparison], runs: Sequence[Run]) -> str:
    """Return one row a run, those in no mean included; empty cells where nothing is known."""
    frames = [c.finished.assign(task=number) for number, c in enumerate(compared, 1)]
    excluded = [run for run in runs if run.state != "finished"]
    if excluded:
        rows = run_rows({"": excluded}, "", "").assign(method=[run.method for run in excluded])
        known = ["method", "rank", "learning_rate", "seed", "state", "folder", "reason"]
        frames.append(rows[known])
    table = pd.concat(frames).astype({"task": "Int64", "rank": "Int64"})
    return str(table.to_csv(columns=list(RUN_COLUMNS), index=False))
