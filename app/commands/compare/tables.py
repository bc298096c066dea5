"""The numbers of a report as tables: for people (Markdown, HTML) and for programs (CSV)."""

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from app.commands.compare.collect import Collection
from app.commands.compare.notes import is_loss, main_notes, stat_text, told_rate
from app.commands.compare.selection import Method, Stat, Task

RUN_COLUMNS = (
    *("task", "method", "learning_rate", "seed", "state"),
    *("untouched_score", "start_score", "selection_score", "reported_score"),
    *("trainable_parameters", "init_seconds", "step_seconds", "train_seconds", "peak_bytes"),
    *("device", "folder", "reason"),
)


@dataclass(frozen=True)
class Table:
    """A table of text.

    Attributes:
        columns: Titles.
        rows: Cells, as many in each row as there are titles; the first column is text, the others numbers.
        notes: Sentences below it.
    """

    columns: list[str]
    rows: list[list[str]]
    notes: list[str]

    def markdown(self) -> str:
        """Return the table in Markdown."""
        lines = [self.columns, ["---", *(["---:"] * (len(self.columns) - 1))], *self.rows]
        text = "\n".join("| " + " | ".join(_escaped(cell) for cell in row) + " |" for row in lines)
        return "\n\n".join([text, *self.notes])

    def aligned(self) -> str:
        """Return the table as text with aligned columns."""
        rows = [self.columns, *self.rows]
        widths = [max(len(row[i]) for row in rows) for i in range(len(self.columns))]
        lines = [
            "  ".join(
                cell.rjust(width) if i else cell.ljust(width)
                for i, (cell, width) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in rows
        ]
        return "\n".join([*lines, *(note.replace("**", "") for note in self.notes)])

    def csv(self) -> str:
        """Return the table as CSV."""
        stream = io.StringIO(newline="")
        csv.writer(stream).writerows([self.columns, *self.rows])
        return stream.getvalue()


def main_table(task: Task) -> Table:
    """Return one row a method, at its best learning rate."""
    unit = "" if is_loss(task.score) else ", %"
    chosen = "" if is_loss(task.selected_by) else ", %"
    columns = [
        "method",
        f"test {task.score}{unit}",
        "seeds",
        "learning rate",
        f"validation {task.selected_by}{chosen}",
        "trained parameters",
        "initialisation, s",
        "step, ms",
        "training, s",
        "peak memory, GiB",
    ]
    rows = [_main_row(method, task) for method in task.methods]
    return Table(columns, rows, main_notes(task))


def _main_row(method: Method, task: Task) -> list[str]:
    best = method.best
    if best is None:
        spoilt = any(rate.spoilt for rate in method.rates)
        why = "none without a lost run" if spoilt else "none finished"
        return [method.label, "", "", why, *([""] * 6)]
    mark = {"lowest": " †", "highest": " †", "only": " ‡"}.get(method.edge or "", "")
    runs = best.runs
    seeds = f"{best.validation.n}"
    if best.test.n not in (0, best.validation.n):
        seeds += f" ({best.test.n} tested)"
    return [
        method.label,
        stat_text(best.test, task.score) if best.test.n else "not tested",
        seeds,
        told_rate(best.learning_rate) + mark,
        stat_text(best.validation, task.selected_by),
        f"{runs[0].trainable:,}" if runs[0].trainable is not None else "",
        _number(Stat.of(run.init_seconds for run in runs).mean, 1),
        _number(1000 * Stat.of(run.step_seconds for run in runs).mean, 0),
        _number(Stat.of(run.train_seconds for run in runs).mean, 0),
        _number(Stat.of(run.peak_bytes for run in runs).mean / 2**30, 2),
    ]


def rate_table(task: Task, reported: bool) -> Table:
    """Return one row a method, one column a learning rate: the whole curve.

    Args:
        task: The runs.
        reported: Show the test scores, else those on the validation rows.
    """
    rates = sorted({rate.learning_rate for method in task.methods for rate in method.rates})
    score = task.score if reported else task.selected_by
    rows = []
    for method in task.methods:
        row = [method.label]
        for value in rates:
            found = next((rate for rate in method.rates if rate.learning_rate == value), None)
            cell = ""
            if found is not None:
                stat = found.test if reported else found.validation
                parts = [stat_text(stat, score)] if stat.n else []
                parts += [
                    f"{n} {state}"
                    for state in ("diverged", "failed", "unfinished", "missing", "unreadable")
                    if (n := sum(out.state == state for out in found.lost))
                ]
                cell = ", ".join(parts)
                cell = f"**{cell}**" if found is method.best else cell
            row.append(cell)
        rows.append(row)
    of = "test" if reported else "validation"
    unit = "" if is_loss(score) else ", in %"
    note = f"{of.capitalize()} {score}{unit}, mean ± standard deviation over seeds; bold: the chosen rate."
    return Table(["method", *map(told_rate, rates)], rows, [note])


def seed_table(task: Task) -> Table | None:
    """Return the reported scores at the chosen rates, one column a seed; None for one seed or none tested."""
    chosen = [(method, method.best) for method in task.methods if method.best is not None]
    seeds = sorted({run.seed for _, best in chosen for run in best.runs if run.test})
    if len(seeds) < 2:
        return None
    rows = []
    for method, best in chosen:
        scores = {run.seed: Stat.of([run.test.get(task.score)]) for run in best.runs}
        cells = [stat_text(scores[seed], task.score) if seed in scores else "" for seed in seeds]
        rows.append([method.label, *cells])
    unit = "" if is_loss(task.score) else ", in %"
    note = (
        f"Test {task.score}{unit}. A seed gives every method the same rows in the same order, so that the "
        "differences in a column are paired."
    )
    return Table(["method", *(f"seed {seed}" for seed in seeds)], rows, [note])


def start_table(task: Task) -> Table | None:
    """Return the scores before and after training at the chosen rates; None where none was asked before."""
    score, rows = task.selected_by, []
    for method in task.methods:
        if method.best is not None:
            runs = method.best.runs
            before = [
                stat_text(Stat.of(run.before(moment, score) for run in runs), score)
                for moment in ("zero_shot", "after_init")
            ]
            if any(before):
                rows.append([method.label, *before, stat_text(method.best.validation, score)])
    if not rows:
        return None
    unit = "" if is_loss(score) else ", in %"
    note = f"Validation {score}{unit}, mean ± standard deviation over seeds, at the chosen rates."
    return Table(["method", "untouched model", "after the start", "trained"], rows, [note])


def left_out_table(found: Collection) -> Table | None:
    """Return the runs that are in no mean, and why; None if there is none."""
    if not found.left_out:
        return None
    rows = [
        [
            out.method or "",
            told_rate(out.learning_rate) if out.learning_rate is not None else "",
            "" if out.seed is None else str(out.seed),
            out.state,
            out.reason,
            out.name,
        ]
        for out in found.left_out
    ]
    return Table(["method", "learning rate", "seed", "state", "reason", "folder"], rows, [])


def settings_table(task: Task) -> Table:
    """Return the settings in which the methods differ."""
    methods = [
        (m.label, next(r.runs[0] for r in m.rates if r.runs)) for m in task.methods if _ran(m)
    ]
    names = dict.fromkeys(name for _, run in methods for name in run.settings)
    differing = [
        name
        for name in names
        if name != "model.method"
        and len({_setting(name, run.settings.get(name)) for _, run in methods}) > 1
    ]
    rows = [
        [
            name.replace(".init_args.", "."),
            *(_setting(name, run.settings.get(name)) for _, run in methods),
        ]
        for name in differing
    ]
    return Table(["setting", *(label for label, _ in methods)], rows, [])


def runs_csv(tasks: Sequence[Task], found: Collection) -> str:
    """Return one row a run, those in no mean included; empty cells where nothing is known."""
    stream = io.StringIO(newline="")
    writer = csv.writer(stream)
    writer.writerow(RUN_COLUMNS)
    for number, task in enumerate(tasks, 1):
        for method in task.methods:
            for rate in method.rates:
                for run in rate.runs:
                    values: list[Any] = [number, method.label, run.learning_rate, run.seed]
                    values += ["finished", run.before("zero_shot", task.selected_by)]
                    values += [run.before("after_init", task.selected_by)]
                    values += [run.validation.get(task.selected_by), run.test.get(task.score)]
                    values += [run.trainable, run.init_seconds]
                    values += [run.step_seconds, run.train_seconds, run.peak_bytes]
                    writer.writerow([*values, run.device, run.folder, ""])
    for out in found.left_out:
        known = ["", out.method, out.learning_rate, out.seed, out.state]
        rest = len(RUN_COLUMNS) - len(known) - 2
        writer.writerow([*known, *[""] * rest, out.name, out.reason])
    return stream.getvalue()


def _ran(method: Method) -> bool:
    return any(rate.runs for rate in method.rates)


def _number(value: float, places: int) -> str:
    return "" if math.isnan(value) else f"{value:,.{places}f}"


def _setting(name: str, value: Any) -> str:
    """Write a setting: of a class its name, and nothing for what is off or absent."""
    if value is None or value is False:
        return ""
    return str(value).rpartition(".")[2] if name.endswith("class_path") else str(value)


def _escaped(cell: str) -> str:
    return " ".join(cell.replace("|", "\\|").split())
