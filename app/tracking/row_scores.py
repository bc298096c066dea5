"""Write the scores of each row, row_scores/MOMENT.csv, from which reports compare methods row by row."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from app.tracking.metrics_table import write_table
from app.tracking.run_folder import RunFolder


def row_scores_path(folder: RunFolder, moment: str) -> Path:
    """Return the file of a moment: `final`, of the validation rows, or `test`."""
    return folder.row_scores / f"{moment}.csv"


def write_row_scores(folder: RunFolder, moment: str, rows: Mapping[str, Sequence[float]]) -> None:
    """Write the scores of each row, whole or not at all; none where there are no rows.

    Args:
        folder: The run's.
        moment: `final` or `test`.
        rows: A list by column; numbers are written so that they are read as they were.
    """
    if not rows:
        return
    folder.row_scores.mkdir(parents=True, exist_ok=True)
    lines = (
        dict(zip(rows, map(repr, values), strict=True))
        for values in zip(*rows.values(), strict=True)
    )
    write_table(row_scores_path(folder, moment), list(rows), lines)


def remove_row_scores(folder: RunFolder) -> None:
    """Remove the scores of rows, which are an earlier model's once a run is trained further."""
    for moment in ("final", "test"):
        row_scores_path(folder, moment).unlink(missing_ok=True)
