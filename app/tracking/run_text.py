"""Say at the end of a command what a run has come to, and what to type next."""

import shlex

from app.tracking.record import RunRecord, TrainRecord
from app.tracking.run_folder import RunFolder
from app.utils.console import bold


def finished_text(record: RunRecord, folder: RunFolder, tested: bool = False) -> str:
    """Return the scores of a run, its speed, memory and files, and the next commands.

    Args:
        record: The run's.
        folder: The run's.
        tested: Whether it has just been tested, so that the next command is not `test`.
    """
    trained = folder.adapter if folder.adapter.is_dir() else folder.model
    facts = {
        **_training(record.train),
        "adapter" if trained == folder.adapter else "model": str(trained),
        "run folder": str(folder),
    }
    lines = [f"{name}: {value}" for name, value in facts.items()]
    commands = [f"  {command}" for command in next_commands(record, folder, tested)]
    return "\n".join(
        ["", bold("scores"), record.score_table(), "", *lines, "", bold("next"), *commands]
    )


def next_commands(record: RunRecord, folder: RunFolder, tested: bool = False) -> list[str]:
    """Return the commands that go on with a finished run, to be pasted into a shell."""
    run = shlex.quote(str(folder))
    all_runs = shlex.quote(str(folder.path.parent))
    validated = record.data.rows.get("validation") != 0
    score = "test" if record.data.has_test else "validate" if validated else None
    # Without --merge an adapter is written, which a run that trains all weights has not.
    return [
        *([] if tested or score is None else [f"python train.py {score} --run {run}"]),
        f"python train.py export --run {run} --merge",
        f"python train.py report {all_runs}",
    ]


def duration_text(seconds: float) -> str:
    """Write a time in seconds as `7 s`, `2 min 05 s` or `3 h 07 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def _training(train: TrainRecord) -> dict[str, str]:
    """Return the lines of the training loop; those of what an earlier version did not record are left out."""
    lines = {}
    if train.seconds:
        speeds = [(train.samples_per_second, "examples"), (train.tokens_per_second, "tokens")]
        known = [f"{_rounded(speed)} {what} a second" for speed, what in speeds if speed]
        ended = ", ".join([f"{train.steps:,} steps in {duration_text(train.seconds)}", *known])
        lines["trained"] = ended
    if train.peak_bytes:
        lines["peak memory"] = f"{train.peak_bytes / 1e9:.2f} GB on {train.device or 'its device'}"
    return lines


def _rounded(speed: float) -> str:
    return f"{speed:,.1f}" if speed < 100 else f"{speed:,.0f}"
