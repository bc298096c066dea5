"""Find the checkpoint to resume from, and its run folder; called where the command line reads `ckpt_path`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

from app.tracking.run_folder import RunFolder, checkpoints_to_resume, run_folders
from app.training.checkpoint_io import NEEDED, read_checkpoint
from app.utils.errors import InputError
from app.utils.files import load_yaml

LAST = "last"


@dataclass(frozen=True)
class ResumePoint:
    """Where a run goes on, and what its checkpoint says of the run."""

    checkpoint: Path
    folder: RunFolder | None  # around it; None if it lies elsewhere: the run gets a new folder
    wandb_id: str | None  # the W&B run to continue; None for a new one
    settings: dict[str, Any] | None  # resolved; None if an earlier version has not written them
    rows: str | None  # digest of the training rows, likewise
    processes: int
    restored: frozenset[str]  # arguments of the optimizer that its state brings back


def run_to_continue(ckpt_path: str, runs: Path) -> RunFolder | None:
    """Return the run folder around the checkpoint that `ckpt_path` names, if any; see `find_resume_point`."""
    if ckpt_path == LAST:
        newest = [RunFolder(path) for path in run_folders(runs)[-1:]]
        return next((run for run in newest if checkpoints_to_resume(run.checkpoints)), None)
    path = Path(ckpt_path)
    # A file name with a metric's slash, such as {val/loss}, makes folders below that of the checkpoints.
    around = (RunFolder(folder) for folder in path.parents)
    return next(
        (run for run in around if run.checkpoints in path.parents and run.config.is_file()), None
    )


def find_resume_point(
    ckpt_path: str, runs: Path, method: str, needed: Sequence[str] = NEEDED
) -> ResumePoint | None:
    """Find what `ckpt_path` names, and read it once, so that damage is noticed before any work.

    Args:
        ckpt_path: A file, or `last` for the newest complete one of the newest run below `runs`.
        runs: The folder of version_0, version_1, ...
        method: `model.method`; a checkpoint of another one is refused.
        needed: What the file must hold: `NEEDED`, or `TRAINED` where it is only scored.

    Returns:
        None if `last` finds no checkpoint: the run starts anew.

    Raises:
        InputError: There is no such file, it is damaged, or it belongs to another method.
    """
    if ckpt_path == LAST:
        newest = _newest(run_to_continue(LAST, runs), runs)
        if newest is None:
            return None
        path, checkpoint = newest
    else:
        path = Path(ckpt_path)
        if not path.is_file():
            what = "is a folder" if path.is_dir() else "does not exist"
            raise InputError(
                f"ckpt_path is {ckpt_path!r}, which {what}: expected `last` or a checkpoint file, such as "
                "runs/NAME/version_0/checkpoints/resume-step=100.ckpt"
            )
        checkpoint = read_checkpoint(path, needed)
    return resume_point(path, checkpoint, method)


def resume_point(path: Path, checkpoint: Mapping[str, Any], method: str) -> ResumePoint:
    """Return what a checkpoint that was read says of its run.

    Raises:
        InputError: It belongs to another method.
    """
    run = run_to_continue(str(path), Path())
    if checkpoint["method"] != method:
        raise InputError(
            f"the checkpoint {str(path)!r} belongs to the method {checkpoint['method']!r}, but model.method "
            f"is {method!r}: give the configuration of that run, or another ckpt_path"
        )
    settings = checkpoint.get("settings")
    if settings is None and run is not None:
        settings = run.config.read_text(encoding="utf-8")
    states = checkpoint.get("optimizer_states", [])
    groups = [group for state in states for group in state["param_groups"]]
    return ResumePoint(
        path,
        run,
        checkpoint.get("wandb_id") if run else None,
        None if settings is None else load_yaml(settings),
        checkpoint.get("rows"),
        len(checkpoint.get("random", [None])),
        frozenset(name for group in groups for name in group),
    )


def _newest(run: RunFolder | None, runs: Path) -> tuple[Path, dict[str, Any]] | None:
    for path in reversed(checkpoints_to_resume(run.checkpoints)) if run else ():
        try:
            checkpoint = read_checkpoint(path)
        except InputError as error:
            rank_zero_warn(f"{error}. Going back to the checkpoint before")
            continue
        rank_zero_info(f"going on from {path}")
        return path, checkpoint
    folders = run_folders(runs)
    where = f"in {folders[-1]}" if folders else f"below {runs}"
    rank_zero_info(f"ckpt_path is `last`, and there is no checkpoint {where} yet: starting anew")
    return None
