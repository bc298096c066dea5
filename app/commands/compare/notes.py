"""The notes beside the tables of a report, and how it writes numbers."""

import math

from app.commands.compare.runs import most_at_once
from app.commands.compare.selection import PENDING, Stat, Task, is_better
from app.utils.text import rate_text


def stat_text(stat: Stat, score: str) -> str:
    """Write `85.12 ± 0.31`, in percent unless it is a loss; without ± for one seed."""
    if not stat.n:
        return ""
    factor, places = (1, 4) if is_loss(score) else (100, 2)
    mean = f"{factor * stat.mean:.{places}f}"
    return mean if math.isnan(stat.std) else f"{mean} ± {factor * stat.std:.{places}f}"


def is_loss(score: str) -> bool:
    """Return whether a score is a loss, which is no percentage."""
    return score.rpartition("/")[2] == "loss"


def told_rate(value: float) -> str:
    """Write a learning rate, which a run may lack."""
    return "none" if math.isnan(value) else rate_text(value)


EDGE = {
    "lowest": "the lowest rate tried",
    "highest": "the highest rate tried",
    "only": "the only rate tried",
}


def main_notes(task: Task) -> list[str]:
    """Return the sentences below the table of methods at their best rates."""
    notes = _unfinished(task)
    notes.append(
        f"Mean ± standard deviation (n - 1) over seeds at the learning rate with the best mean validation "
        f"{task.selected_by}; test scores play no part in the choice."
    )
    if not task.apart:
        notes.append(
            "**The validation rows are the reported rows** (data.validation_size is null): the learning rates "
            "were chosen on what is reported, and the scores flatter every method."
        )
    passed_over = _passed_over(task)
    if passed_over:
        notes.append(
            "Better on the validation rows, but not chosen, since a run failed or diverged there: "
            f"{passed_over}."
        )
    notes += _unequal_seeds(task)
    at_edge = [m for m in task.methods if m.edge in ("lowest", "highest")]
    if at_edge:
        told = ", ".join(f"{m.label} ({EDGE[str(m.edge)]})" for m in at_edge)
        notes.append(
            f"† At the edge of the rates tried, so that a better one may lie beyond: {told}."
        )
    only = [m.label for m in task.methods if m.edge == "only"]
    if only:
        notes.append(f"‡ No other learning rate was tried: {', '.join(only)}.")
    if all(method.best is None or method.best.validation.n < 2 for method in task.methods):
        notes.append("One seed says nothing about the spread between seeds.")
    devices = sorted({run.device for run in task.runs})
    notes.append(
        f"Times and memory were measured on {', '.join(devices)}; "
        + (
            "peak memory is what the process held (resident), libraries included."
            if devices == ["cpu"]
            else "peak memory is what the allocator of the device gave out; on the CPU, what the process held."
        )
        + (" Different devices: compare no times across them." if len(devices) > 1 else "")
    )
    together = most_at_once(task.runs)
    if together > 1:
        notes.append(
            f"Up to {together} of these runs trained at once on one machine, so that their times measure each "
            "other, too."
        )
    return notes


def _unfinished(task: Task) -> list[str]:
    """Say that a grid is not whole yet."""
    pending = sum(out.state in PENDING for out in task.lost)
    if not pending:
        return []
    whole = len(task.runs) + len(task.lost)
    return [f"**Preliminary**: {len(task.runs)} of {whole} runs are finished, {pending} are not."]


def _passed_over(task: Task) -> str:
    """Name the rates that a failed or diverged run kept from being chosen."""
    sign, score = is_better(task.selected_by), task.selected_by
    return ", ".join(
        f"{method.label} at {told_rate(rate.learning_rate)} ({stat_text(rate.validation, score)})"
        for method in task.methods
        for rate in method.rates
        if rate.spoilt
        and rate.validation.n
        and (
            method.best is None or sign * rate.validation.mean > sign * method.best.validation.mean
        )
    )


def _unequal_seeds(task: Task) -> list[str]:
    """Say where seeds are not the same: between the rates of a method, or between methods."""
    notes = []
    parts = [
        f"{method.label} ({_seeds(method.chosen_on)})"
        for method in task.methods
        if any(rate.runs and rate.seeds != method.chosen_on for rate in method.rates)
    ]
    if parts:
        notes.append(f"Rates were chosen on the seeds that they share: {', '.join(parts)}.")
    seeds = {m.label: _seeds(m.best.seeds) for m in task.methods if m.best is not None}
    if len(set(seeds.values())) > 1:
        told = ", ".join(f"{label} ({found})" for label, found in seeds.items())
        notes.append(f"The means are not over the same seeds: {told}.")
    return notes


def _seeds(seeds: set[int]) -> str:
    return ", ".join(map(str, sorted(seeds))) or "none"
