"""Write a report: report.html, report.md, runs.csv and the plots."""

import base64
import html
import re
import tempfile
from collections.abc import Mapping, Sequence, Sized
from pathlib import Path

from app.commands.compare.collect import Collection
from app.commands.compare.figures import Picture, draw, inside_pictures
from app.commands.compare.selection import Task, tasks
from app.commands.compare.settings import told
from app.commands.compare.tables import (
    Table,
    left_out_table,
    main_table,
    rate_table,
    runs_csv,
    seed_table,
    settings_table,
    start_table,
)
from app.utils.errors import InputError

STYLE = """
:root { color-scheme: light dark;
  --text: #1d2129; --soft: #5b6472; --back: #fff; --line: #d9dde3; --stripe: #f5f6f8; }
@media (prefers-color-scheme: dark) {
  :root { --text: #e6e8eb; --soft: #a3abb6; --back: #15181c; --line: #363c44; --stripe: #1d2126; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 76rem; background: var(--back); color: var(--text);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", sans-serif; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 .5rem; overflow-wrap: anywhere; }
h2 { font-size: 1.25rem; margin: 2.5rem 0 .75rem; }
h3 { font-size: 1rem; margin: 1.75rem 0 .5rem; }
p { margin: .5rem 0; max-width: 50rem; overflow-wrap: anywhere; }
.note { color: var(--soft); font-size: .875rem; }
.table { overflow-x: auto; border: 1px solid var(--line); border-radius: 8px; margin: .75rem 0; }
table { border-collapse: collapse; width: 100%; font-size: .875rem; font-variant-numeric: tabular-nums; }
th, td { padding: .45rem .75rem; text-align: right; vertical-align: top; }
td { white-space: nowrap; }
th { font-weight: 600; color: var(--soft); vertical-align: bottom; border-bottom: 1px solid var(--line); }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: var(--back); }
tbody tr:nth-child(even) td { background: var(--stripe); }
table.text th, table.text td { text-align: left; white-space: normal; overflow-wrap: anywhere; }
table.text td { min-width: 7rem; }
table.reasons td:nth-child(5) { min-width: 20rem; }
table.reasons td:nth-child(6) { min-width: 14rem; }
.pictures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); gap: 1rem; }
figure { margin: 0; padding: .5rem; background: #fff; border: 1px solid var(--line); border-radius: 8px; }
img { display: block; width: 100%; height: auto; }
code { font-size: .875em; overflow-wrap: anywhere; }
"""


class Page:
    """An HTML page that grows from top to bottom.

    Args:
        title: Its title and first heading.
    """

    def __init__(self, title: str) -> None:
        self.title = title
        self._parts = [f"<h1>{_text(title)}</h1>"]

    def heading(self, text: str, level: int = 2) -> None:
        """Add a heading."""
        self._parts.append(f"<h{level}>{_text(text)}</h{level}>")

    def paragraph(self, text: str, note: bool = False) -> None:
        """Add a paragraph; `**bold**` and backquoted code are those of Markdown."""
        kind = ' class="note"' if note else ""
        self._parts.append(f"<p{kind}>{_marked(text)}</p>")

    def table(self, table: Table, kind: str = "") -> None:
        """Add a table, which scrolls in a box of its own where it is too wide.

        Args:
            table: The table.
            kind: Its classes in the style: `text` for words instead of numbers, `reasons` for sentences.
        """
        head = "".join(f'<th scope="col">{_text(cell)}</th>' for cell in table.columns)
        rows = "".join(
            "<tr>" + "".join(f"<td>{_marked(cell)}</td>" for cell in row) + "</tr>"
            for row in table.rows
        )
        self._parts.append(
            f'<div class="table" tabindex="0"><table class="{kind}"><thead><tr>{head}</tr></thead>'
            f"<tbody>{rows}</tbody></table></div>"
        )
        for note in table.notes:
            self.paragraph(note, note=True)

    def pictures(self, pictures: Sequence[Picture]) -> None:
        """Add pictures, beside each other where there is room."""
        figures = "".join(
            f'<figure><img alt="{_text(picture.title)}" '
            f'src="data:image/png;base64,{base64.b64encode(picture.png).decode()}"></figure>'
            for picture in pictures
        )
        self._parts.append(f'<div class="pictures">{figures}</div>')

    def html(self) -> str:
        """Return the file's content."""
        return (
            '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            f'<link rel="icon" href="data:,">\n<title>{_text(self.title)}</title>\n'
            f"<style>{STYLE}</style>\n</head>\n<body>\n"
            + "\n".join(self._parts)
            + "\n</body>\n</html>\n"
        )


def _text(text: str) -> str:
    return html.escape(text, quote=True)


def _marked(text: str) -> str:
    bold = re.sub(r"\*\*(.+?)\*\*", r"<b>\1</b>", _text(text))
    return re.sub(r"`(.+?)`", r"<code>\1</code>", bold)


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
