"""Find the checkpoint to resume from, and its run folder; called where the command line reads `ckpt_path`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

from app.tracking.run_folder import RunFolder, checkpoint_files, run_folders
from app.training.checkpoint_io import read_checkpoint
from app.utils.errors import InputError

LAST = "last"


@dataclass(frozen=True)
class ResumePoint:
    """Where a run goes on."""

    checkpoint: Path
    folder: RunFolder | None  # around it; None if it lies elsewhere: the run gets a new folder
    wandb_id: str | None  # the W&B run to continue; None for a new one


def find_resume_point(ckpt_path: str, runs: Path, method: str) -> ResumePoint | None:
    """Find what `ckpt_path` names, and read it once, so that damage is noticed before any work.

    Args:
        ckpt_path: A file, or `last` for the newest complete one of the newest run below `runs`.
        runs: The folder of version_0, version_1, ...
        method: `model.method`; a checkpoint of another one is refused.

    Returns:
        None if `last` finds no checkpoint: the run starts anew.

    Raises:
        InputError: There is no such file, it is damaged, or it belongs to another method.
    """
    if ckpt_path == LAST:
        newest = _newest(runs)
        if newest is None:
            return None
        path, checkpoint = newest
    else:
        path = Path(ckpt_path)
        if not path.is_file():
            what = "is a folder" if path.is_dir() else "does not exist"
            raise InputError(
                f"ckpt_path is {ckpt_path!r}, which {what}: expected `last` or a checkpoint file, such as "
                "runs/NAME/version_0/checkpoints/step=100.ckpt"
            )
        checkpoint = read_checkpoint(path)
    if checkpoint["method"] != method:
        raise InputError(
            f"the checkpoint {str(path)!r} belongs to the method {checkpoint['method']!r}, but model.method "
            f"is {method!r}: give the configuration of that run, or another ckpt_path"
        )
    folder = RunFolder(path.parent.parent)
    inside = path.parent == folder.checkpoints and folder.config.is_file()
    return ResumePoint(
        path, folder if inside else None, checkpoint.get("wandb_id") if inside else None
    )


def _newest(runs: Path) -> tuple[Path, dict[str, Any]] | None:
    folders = run_folders(runs)
    files = checkpoint_files(RunFolder(folders[-1]).checkpoints) if folders else []
    for path in reversed(files):
        try:
            checkpoint = read_checkpoint(path)
        except InputError as error:
            rank_zero_warn(f"{error}. Going back to the checkpoint before")
            continue
        rank_zero_info(f"going on from {path}")
        return path, checkpoint
    where = f"in {folders[-1]}" if folders else f"below {runs}"
    rank_zero_info(f"ckpt_path is `last`, and there is no checkpoint {where} yet: starting anew")
    return None
