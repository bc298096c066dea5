"""What a run's record keeps of its rows, and which rows the run may be scored on later."""

from collections.abc import Mapping
from pathlib import Path

from app.tracking.record import DataRecord
from app.training.protocols import DataModule
from app.training.resume_checks import rows_digest
from app.utils.errors import InputError


def data_record(data: DataModule) -> DataRecord:
    """Return what a data module says of itself, with a digest of each split's rows."""
    described = data.describe()
    digests = {split: rows_digest(data.rows(split)) for split in ("train", "validation", "test")}
    return DataRecord(**described, digests=digests)


def check_held_out(trained: DataRecord, data: DataModule, stage: str) -> None:
    """Raise InputError if rows are scored that a run may have been trained on: others were set aside then.

    Rows of other data, or of a file of their own, are scored whatever the run was trained on.

    Args:
        trained: The data of the run, as its summary has it.
        data: What is scored, with all options given now.
        stage: "validate" or "test".
    """
    split = "test" if stage == "test" and data.rows("test") else "validation"
    if stage == "test" and split == "validation":
        asked = data.prepare_benchmarks("test")
        if not any(each.benchmark.asks_rows for each in asked):
            return
    rows = data.rows(split)
    if not rows or any(rows == data.rows(part) for part in _splits_of_files(data)):
        return
    sources = (getattr(trained, "source", None), data.describe().get("source"))
    if None in sources or len({Path(str(source)).resolve() for source in sources}) > 1:
        return
    left, then = data.rows("train"), trained.digests
    if then:
        same = rows_digest(rows) in (then["validation"], then["test"])
        refused = not same and rows_digest(left) != then["train"]
    else:  # a run of an earlier version
        refused = len(left) < trained.rows.get("train", 0)
    if refused:
        now = {part: len(data.rows(part)) for part in trained.rows}
        raise InputError(
            f"the {split} rows are not those that the run set aside, and may be rows that it was trained on: "
            f"it had {_counts(trained.rows)} rows, and with these settings there are {_counts(now)}; leave out "
            f"the settings that choose or change rows, such as --data.{split}_size, or train anew with them"
        )


def _splits_of_files(data: DataModule) -> list[str]:
    """Return the splits that are read from a file of their own, none of which can have been trained on."""
    files = getattr(data, "files", {})
    return [part for part in files if files[part] and getattr(data, f"{part}_size", None) is None]


def _counts(rows: Mapping[str, int]) -> str:
    return ", ".join(f"{count:,} {split}" for split, count in rows.items())
