"""Log to TensorBoard what a run ends with, under W&B's names: numbers, pictures, tables as text."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import TensorBoardLogger
from matplotlib.image import imread

from app.tracking.record import RunRecord
from app.tracking.wandb_summary import Tables, spectrum_table, summary_of

LARGEST_TABLE = 200
"""Rows of a table as text, which a page of TensorBoard shows whole."""


def log_run_to_tensorboard(
    logger: TensorBoardLogger, record: RunRecord, plots: Sequence[Path]
) -> None:
    """Log the columns of the table of runs, the spectrum and the plots of a finished run.

    Args:
        logger: One of the run's.
        record: The run's.
        plots: PNG files.
    """
    columns, step = summary_of(record), record.train.steps
    for name, value in columns.items():
        # Scores are logged already, when they are measured.
        if isinstance(value, int | float) and name.partition("/")[0] not in record.metrics:
            logger.experiment.add_scalar(name, value, step)
    tables: dict[str, tuple[list[str], list[list[Any]]]] = {
        "summary": (["name", "value"], [[name, value] for name, value in columns.items()])
    }
    if record.init.layers:
        tables["init/spectrum"] = spectrum_table(record.init.layers)
    log_texts(logger, tables, step)
    log_pictures(logger, plots, step)


def log_pictures(logger: TensorBoardLogger, plots: Sequence[Path], step: int) -> None:
    """Log PNG files as images of their name."""
    for plot in plots:
        logger.experiment.add_image(f"plots/{plot.stem}", imread(plot), step, dataformats="HWC")


def log_texts(logger: TensorBoardLogger, tables: Tables, step: int, folder: str = "") -> None:
    """Log tables as text, the first `LARGEST_TABLE` rows of each, named FOLDER/NAME."""
    for name, (columns, rows) in tables.items():
        logger.experiment.add_text(f"{folder}{name}", markdown_table(columns, rows), step)


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Return a table in Markdown, and how many rows there are beyond its last."""
    lines = [columns, ["---"] * len(columns), *rows[:LARGEST_TABLE]]
    text = "\n".join(f"| {' | '.join(map(_cell, line))} |" for line in lines)
    left = len(rows) - LARGEST_TABLE
    return text if left <= 0 else f"{text}\n\n{left:,} more rows"


def _cell(value: Any) -> str:
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    return " ".join(text.replace("|", "\\|").split())


def log_histograms(logger: TensorBoardLogger, values: Mapping[str, Any], step: int) -> None:
    """Log histograms of tensors by name; those without a finite number are left out."""
    for name, tensor in values.items():
        if tensor.isfinite().any():
            logger.experiment.add_histogram(name, tensor[tensor.isfinite()], step)
