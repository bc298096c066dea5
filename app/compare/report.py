"""Write a report: report.html, report.md, runs.csv and the pictures."""

import tempfile
from collections.abc import Mapping, Sized
from pathlib import Path

from app.compare.collect import Collection
from app.compare.figures import Picture, draw, inside_pictures
from app.compare.page import Page
from app.compare.selection import Task, tasks
from app.compare.settings import told
from app.compare.tables import (
    Table,
    left_out_table,
    main_table,
    rate_table,
    runs_csv,
    seed_table,
    settings_table,
    start_table,
)
from app.errors import InputError

HTML_FILE = "report.html"
MARKDOWN_FILE = "report.md"
RUNS_FILE = "runs.csv"


class _Report:
    """The same report as HTML and as Markdown."""

    def __init__(self, title: str) -> None:
        self.page = Page(title)
        self.lines = [f"# {title}"]

    def heading(self, text: str, level: int = 2) -> None:
        self.page.heading(text, level)
        self.lines.append(f"{'#' * level} {text}")

    def paragraph(self, text: str) -> None:
        self.page.paragraph(text)
        self.lines.append(text)

    def table(self, table: Table, kind: str = "") -> None:
        self.page.table(table, kind)
        self.lines.append(table.markdown())

    def pictures(self, pictures: Mapping[str, Picture]) -> None:
        self.page.pictures(list(pictures.values()))
        self.lines.append(
            "\n".join(f"![{picture.title}]({name})" for name, picture in pictures.items())
        )


def write_report(found: Collection, folder: Path, score: str | None = None) -> str:
    """Write everything about some runs into a folder.

    Args:
        found: The runs.
        folder: Where report.html, report.md, runs.csv, table.csv and PNG pictures go.
        score: The reported score; None takes accuracy, else the first benchmark, else the loss.

    Returns:
        The main tables as text, and where the report is.

    Raises:
        InputError: No run has that score, or the folder cannot be written.
    """
    separate = tasks(found, score)
    count = len({method.label for task in separate for method in task.methods})
    what = _task_name(separate[0]) if len(separate) == 1 else f"{len(separate)} tasks"
    title = f"{count} method{'s' * (count > 1)} on {what}"
    written = _Report(title)
    printed = []
    files: dict[str, bytes] = {}
    if len(separate) > 1:
        written.paragraph(
            f"These runs belong to {len(separate)} tasks, which share no table: they differ in more than "
            "the method, its learning rate and the seed."
        )
    for number, task in enumerate(separate, 1):
        several = len(separate) > 1
        heading = f"Task {number}: {_task_name(task)}" if several else ""
        suffix = f"_{number}" if several else ""
        pictures = {f"{picture.name}{suffix}.png": picture for picture in draw(task)}
        table = main_table(task)
        inside = {f"{picture.name}{suffix}.png": picture for picture in inside_pictures(task)}
        _write_task(written, task, heading, table, pictures, inside)
        files |= {name: picture.png for name, picture in (pictures | inside).items()}
        files[f"table{suffix}.csv"] = table.csv().encode()
        printed.append(f"{heading or title}\n\n{table.aligned()}")
    left_out = left_out_table(found)
    if left_out is not None:
        written.heading("Runs in no mean")
        written.table(left_out, "text reasons")
        lines = [f"{out.name}: {out.state}: {out.reason}" for out in found.left_out]
        printed.append("\n".join(["Runs in no mean", "", *lines]))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        files[HTML_FILE] = written.page.html().encode()
        files[RUNS_FILE] = runs_csv(separate, found).encode()
        files[MARKDOWN_FILE] = ("\n\n".join(written.lines) + "\n").encode()
        for name, content in files.items():
            _write(folder / name, content)
    except OSError as error:
        raise InputError(
            f"the report cannot be written into {str(folder)!r} ({error.strerror}): set --output"
        ) from error
    return "\n\n".join([*printed, f"report: {folder / HTML_FILE}"])


def _write_task(
    written: _Report,
    task: Task,
    heading: str,
    table: Table,
    pictures: Mapping[str, Picture],
    inside: Mapping[str, Picture],
) -> None:
    if heading:
        written.heading(heading)
    written.paragraph(_described(task))
    if task.apart_from_first:
        written.paragraph(f"Apart from task 1 by {told(task.apart_from_first, 12)}.")
    written.table(table)
    written.heading("Learning rates", 3)
    for reported in (False, True) if any(run.test for run in task.runs) else (False,):
        written.table(rate_table(task, reported))
    starts, seeds = start_table(task), seed_table(task)
    if starts is not None:
        written.heading("Before and after training", 3)
        written.table(starts)
    if seeds is not None:
        written.heading("Seed by seed", 3)
        written.table(seeds)
    written.heading("Pictures", 3)
    written.pictures(pictures)
    if inside:
        written.heading("Inside", 3)
        written.paragraph(
            "Each method's first seed at its best rate: how the factors stand to the one-step gradient, "
            "layer by layer (docs/inside.md)."
        )
        written.pictures(inside)
    settings = settings_table(task)
    if settings.rows:
        written.heading("In what the methods differ", 3)
        written.table(settings, "text")


def _task_name(task: Task) -> str:
    first = task.runs[0]
    data = first.told.get("data", {}).get("name", "data")
    model = first.told.get("model", {}).get("name", "model").partition("#")[0]
    return f"{data}, {model.rstrip('/').rpartition('/')[2]}"


def _described(task: Task) -> str:
    """Say what all runs share, and how many there are."""
    runs, first = task.runs, task.runs[0]
    rows = first.told.get("data", {}).get("rows", {})
    told_rows = ", ".join(f"{count:,} {split}" for split, count in rows.items())
    seeds = sorted({run.seed for run in runs})
    steps = sorted({run.told.get("train", {}).get("steps", 0) for run in runs})
    batch = task.shared.get("data.init_args.batch_size")
    accumulated = task.shared.get("trainer.accumulate_grad_batches") or 1
    times = f" of {batch} rows" + (f" x {accumulated}" if accumulated > 1 else "")
    parameters = first.told.get("model", {}).get("parameters")
    return (
        f"{len(runs)} finished runs of {_count(task.methods, 'method')}; "
        f"{_count(seeds, 'seed')}: {', '.join(map(str, seeds))}. "
        f"Rows: {told_rows}. {' or '.join(f'{count:,}' for count in steps)} optimizer steps{times}, "
        f"schedule {task.shared.get('model.lr_scheduler_type')}"
        + (f"; a model of {parameters:,} parameters." if parameters else ".")
    )


def _write(path: Path, content: bytes) -> None:
    """Write a file, whole or not at all, also where another process writes the same one."""
    with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".part", delete=False) as part:
        part.write(content)
    Path(part.name).chmod(0o644)
    Path(part.name).replace(path)


def _count(things: Sized, name: str) -> str:
    return f"{len(things)} {name}{'s' * (len(things) != 1)}"
