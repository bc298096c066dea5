"""Write a report: report.html, report.md, runs.csv, and of each task table.csv, differences.csv and plots."""

import base64
import re
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence, Sized
from dataclasses import dataclass, field
from pathlib import Path

from jinja2 import Environment, FileSystemLoader
from markupsafe import Markup, escape

from app.commands.compare import tables
from app.commands.compare.collect import Run
from app.commands.compare.difference_plot import differences_plot
from app.commands.compare.differences import (
    Differences,
    differences_csv,
    differences_notes,
    differences_table,
    differences_to,
)
from app.commands.compare.figures import Plot, alignment_plots, comparison_plots, rank_plot
from app.commands.compare.selection import Comparison, by_rank, comparisons
from app.commands.compare.settings import check_reference, differences_text
from app.commands.compare.tables import Table
from app.utils.errors import InputError

TEMPLATE = "report.html.j2"
HTML_FILE = "report.html"
MARKDOWN_FILE = "report.md"
RUNS_FILE = "runs.csv"


@dataclass(frozen=True)
class Section:
    """A part of a report, in the order of its attributes; without a title it has no heading.

    Paragraphs have `**bold**` as in Markdown; plots go by the names of their files.
    """

    title: str = ""
    level: int = 3
    paragraphs: Sequence[str] = ()
    tables: Sequence[Table] = ()
    plots: dict[str, Plot] = field(default_factory=dict)


def write_report(
    runs: Sequence[Run], folder: Path, score: str | None = None, reference: str | None = None
) -> str:
    """Write everything about some runs into a folder.

    Args:
        runs: From `collect`.
        folder: Where to.
        score: To report; None takes the usual one of each task.
        reference: The method that the others are compared to; None takes the usual one.

    Returns:
        The main tables as text, and where the report is.

    Raises:
        InputError: No run has that score or that method, or the folder cannot be written.
    """
    check_reference(reference, [run.method for run in runs])
    compared = comparisons(runs, score)
    several = len(compared) > 1
    count = len({name for comparison in compared for name in comparison.rows.family})
    what = f"{len(compared)} tasks" if several else _task_name(compared[0])
    title = f"{count} method{'s' * (count > 1)} on {what}"
    sections, printed = [], []
    files = {RUNS_FILE: tables.runs_csv(compared, runs).encode()}
    if several:
        text = (
            f"These runs belong to {len(compared)} tasks, which share no table: they differ in more than the "
            "method, its learning rate and the seed."
        )
        sections.append(Section(paragraphs=[text]))
    for number, comparison in enumerate(compared, 1):
        heading = f"Task {number}: {_task_name(comparison)}" if several else ""
        suffix = f"_{number}" if several else ""
        several_ranks = [differences_to(part, reference) for part in by_rank(comparison)]
        differences = [each for each in several_ranks if each is not None]
        own = _sections(comparison, differences, heading, suffix)
        [table] = own[0].tables
        files[f"table{suffix}.csv"] = table.frame.to_csv().encode()
        files[f"differences{suffix}.csv"] = differences_csv(differences).encode()
        printed.append(f"{heading or title}\n\n{table.text()}")
        printed += [table.text() for table in map(differences_table, differences) if table]
        sections += own
    excluded = tables.excluded_table(runs)
    if excluded is not None:
        sections.append(Section("Runs in no mean", level=2, tables=[excluded]))
        lines = [f"{r.folder}: {r.state}: {r.reason}" for r in runs if r.state != "finished"]
        printed.append("\n".join(["Runs in no mean", "", *lines]))
    files |= {name: plot.png for section in sections for name, plot in section.plots.items()}
    files[HTML_FILE] = _html(title, sections).encode()
    files[MARKDOWN_FILE] = _markdown(title, sections).encode()
    _write(folder, files)
    return "\n\n".join([*printed, f"report: {folder / HTML_FILE}"])


def _earlier_files(folder: Path) -> set[str]:
    """Return the names of the tables and plots of an earlier report in a folder, if there is one."""
    markdown = folder / MARKDOWN_FILE
    if not markdown.is_file():
        return set()
    text = markdown.read_text("utf-8", errors="replace")
    plots = re.findall(r"^!\[.*?\]\(([^/\n]+\.png)\)$", text, re.MULTILINE)
    names = (path.name for path in folder.glob("*.csv"))
    return {*plots, *(n for n in names if re.fullmatch(r"(table|differences)(_\d+)?\.csv", n))}


def _write(folder: Path, files: Mapping[str, bytes]) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name in _earlier_files(folder) - files.keys():
            (folder / name).unlink(missing_ok=True)
        for name, content in files.items():
            # Whole or not at all, also where another process writes the same one.
            with tempfile.NamedTemporaryFile(dir=folder, suffix=".part", delete=False) as part:
                part.write(content)
            Path(part.name).chmod(0o644)
            Path(part.name).replace(folder / name)
    except OSError as error:
        raise InputError(
            f"the report cannot be written into {str(folder)!r} ({error.strerror}): set --output"
        ) from error


def _sections(
    comparison: Comparison, differences: Sequence[Differences], heading: str, suffix: str
) -> list[Section]:
    """Return what a report shows of one task; the first section has the main table."""
    paragraphs = [_description(comparison)]
    if comparison.differs_by:
        paragraphs.append(f"Apart from task 1 by {differences_text(comparison.differs_by, 12)}.")
    has_tests = comparison.finished.reported_score.notna().any()
    rates = [tables.rate_table(comparison, test) for test in (False, True)[: 1 + has_tests]]
    before, seeds = tables.before_training_table(comparison), tables.seed_table(comparison)
    settings = tables.settings_table(comparison)
    parts = by_rank(comparison)
    ranks, over_ranks = tables.rank_table(parts), rank_plot(parts)
    plots = [plot for part in parts for plot in comparison_plots(part)]
    maps = alignment_plots(comparison)

    def files(drawn: Iterable[Plot]) -> dict[str, Plot]:
        return {f"{plot.name}{suffix}.png": plot for plot in drawn}

    about_maps = (
        "Each method's first seed at its best rate: how the factors stand to the one-step gradient, layer by "
        "layer (docs/alignment.md)."
    )
    sections = [
        Section(heading, 2, paragraphs, [tables.main_table(comparison)]),
        _differences_section(differences, files),
        Section("Ranks", tables=[ranks] if ranks else [], plots=files(filter(None, [over_ranks]))),
        Section("Learning rates", tables=rates),
        Section("Before and after training", tables=[before] if before else []),
        Section("Seed by seed", tables=[seeds] if seeds else []),
        Section("Plots", plots=files(plots)),
        Section("Alignment metrics", paragraphs=[about_maps] if maps else [], plots=files(maps)),
        Section("In what the methods differ", tables=[settings] if settings else []),
    ]
    return [s for s in sections if s.paragraphs or s.tables or s.plots]


def _differences_section(
    differences: Sequence[Differences], files: Callable[[Iterable[Plot]], dict[str, Plot]]
) -> Section:
    """Return the differences to the reference, or why there are none."""
    references = dict.fromkeys(each.reference for each in differences)
    shown = [table for table in map(differences_table, differences) if table]
    notes = [note for each in differences if not each.found for note in differences_notes(each)]
    plots = filter(None, map(differences_plot, differences))
    return Section(f"Difference to {' or '.join(references)}", 3, notes, shown, files(plots))


def _task_name(comparison: Comparison) -> str:
    record = comparison.finished.run.iloc[0].record
    model = (record.model.name or "model").partition("#")[0]
    return f"{record.data.name or 'data'}, {model.rstrip('/').rpartition('/')[2]}"


def _description(comparison: Comparison) -> str:
    """Say what all runs share, and how many there are."""
    runs = list(comparison.finished.run)
    record = runs[0].record
    methods = comparison.rows.family.unique()
    ranks = [str(part.rank) for part in by_rank(comparison) if part.rank is not None]
    rows = ", ".join(f"{count:,} {split}" for split, count in record.data.rows.items())
    seeds = sorted({run.seed or 0 for run in runs})
    steps = sorted({run.record.train.steps for run in runs})
    batch = comparison.shared.get("data.init_args.batch_size")
    accumulated = comparison.shared.get("trainer.accumulate_grad_batches") or 1
    times = f" of {batch} rows" + (f" x {accumulated}" if accumulated > 1 else "")
    parameters = record.model.parameters
    return (
        f"{len(runs)} finished runs of {_count(methods, 'method')}"
        + (f" at ranks {', '.join(ranks)}; " if ranks else "; ")
        + f"{_count(seeds, 'seed')}: {', '.join(map(str, seeds))}. "
        f"Rows: {rows}. {' or '.join(f'{count:,}' for count in steps)} optimizer steps{times}, "
        f"schedule {comparison.shared.get('model.lr_scheduler_type')}"
        + (f"; a model of {parameters:,} parameters." if parameters else ".")
    )


def _count(things: Sized, name: str) -> str:
    return f"{len(things)} {name}{'s' * (len(things) != 1)}"


def _html(title: str, sections: Sequence[Section]) -> str:
    """Return the report as one HTML file with all plots in it."""

    def marked(text: str) -> Markup:
        bold = re.sub(r"\*\*(.+?)\*\*", r"<b>\1</b>", str(escape(text)))
        return Markup(re.sub(r"`(.+?)`", r"<code>\1</code>", bold))

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["marked"] = marked
    environment.filters["base64"] = lambda content: base64.b64encode(content).decode()
    return environment.get_template(TEMPLATE).render(title=title, sections=sections)


def _markdown(title: str, sections: Sequence[Section]) -> str:
    """Return the report as Markdown, with the plots beside it."""
    blocks = [f"# {title}"]
    for section in sections:
        if section.title:
            blocks.append(f"{'#' * section.level} {section.title}")
        blocks += section.paragraphs
        for table in section.tables:
            titles, *rows = table.lines
            rows = [titles, ["---", *["---:"] * (len(titles) - 1)], *rows]
            rows = [[" ".join(cell.replace("|", "\\|").split()) for cell in row] for row in rows]
            blocks.append("\n".join(f"| {' | '.join(row)} |" for row in rows))
            blocks += table.notes
        if section.plots:
            links = (f"![{plot.title}]({name})" for name, plot in section.plots.items())
            blocks.append("\n".join(links))
    return "\n\n".join(blocks) + "\n"
