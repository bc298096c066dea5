"""Where a run writes: runs/NAME/version_N, and the loggers that live there."""

import itertools
import re
from pathlib import Path

from lightning.pytorch.loggers import Logger

from app.utils.errors import InputError

CONFIG_FILE = "config.yaml"
SUMMARY_FILE = "summary.json"
ADAPTER_FOLDER = "adapter"
MODEL_FOLDER = "model"  # all weights, where all were trained
CHECKPOINT_FOLDER = "checkpoints"
ANSWERS_FOLDER = "answers"
SCORES_FILE = "benchmarks.json"
WANDB_FILE = "wandb.json"  # the W&B run that a test adds its scores to


def new_folder(runs: Path) -> Path:
    """Make version_0, version_1, ...: the first that is not there, also when two runs start at once."""
    for number in itertools.count():
        folder = runs / f"version_{number}"
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            if folder.is_dir():
                continue
            raise InputError(f"{str(folder)!r} is a file: set output.name or output.root") from None
        except OSError as error:
            raise InputError(
                f"the run folder {str(folder)!r} cannot be written ({error.strerror}): set output.root"
            ) from error
        return folder
    raise AssertionError("unreachable")


def remove_empty_folder(loggers: list[Logger]) -> None:
    """Remove the folder of a run that did not begin, if nothing but its settings is in it."""
    if not loggers:
        return
    folder = Path(str(loggers[0].log_dir))
    config = folder / CONFIG_FILE
    if folder.is_dir() and set(folder.iterdir()) <= {config}:
        config.unlink(missing_ok=True)
        folder.rmdir()


def run_folders(runs: Path) -> list[Path]:
    """Return version_0, version_1, ... below a folder, in the order of their numbers."""
    found = [path for path in runs.glob("version_*") if re.fullmatch(r"version_\d+", path.name)]
    return sorted(found, key=lambda path: int(path.name.removeprefix("version_")))


def checkpoint_name(step: int) -> str:
    """Return the file name of the checkpoint of an optimizer step."""
    return f"step={step}.ckpt"


def checkpoint_files(folder: Path) -> list[Path]:
    """Return the complete checkpoints in a folder, the oldest first."""
    found = [path for path in folder.glob("step=*.ckpt") if re.fullmatch(r"step=\d+", path.stem)]
    return sorted(found, key=lambda path: int(path.stem.removeprefix("step=")))


def check_run_folder(folder: Path) -> None:
    """Raise InputError unless the folder is that of a finished run."""
    missing = [name for name in (CONFIG_FILE, SUMMARY_FILE) if not (folder / name).is_file()]
    trained = (f"{ADAPTER_FOLDER}/adapter_config.json", f"{MODEL_FOLDER}/config.json")
    if not any((folder / name).is_file() for name in trained):
        missing.append(" or ".join(trained))
    if missing:
        state = "does not exist" if not folder.exists() else f"lacks {', '.join(missing)}"
        raise InputError(
            f"--run is {str(folder)!r}, which {state}: expected the folder of a finished run, such as "
            "runs/quickstart/version_0"
        )
