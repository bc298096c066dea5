"""Where a run writes: runs/NAME/version_N, and the loggers that live there."""

import itertools
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from lightning.pytorch.loggers import Logger, WandbLogger

from app.errors import InputError
from app.metrics_table import MetricsTable
from app.processes import is_first_process

CONFIG_FILE = "config.yaml"
SUMMARY_FILE = "summary.json"
ADAPTER_FOLDER = "adapter"
MODEL_FOLDER = "model"  # all weights, where all were trained
CHECKPOINT_FOLDER = "checkpoints"
ANSWERS_FOLDER = "answers"
SCORES_FILE = "benchmarks.json"
WANDB_FILE = "wandb.json"  # the W&B run that a test adds its scores to


@dataclass(frozen=True)
class OutputSettings:
    """Where a run writes, and whether W&B hears of it.

    Args:
        name: Name of the experiment; runs go to ROOT/NAME/version_0, version_1, ...
        root: Folder of all runs.
        wandb: `auto` is online with an API key and offline without one; never asks.
        wandb_project: W&B project.
        wandb_group: W&B group, for comparing runs of one task; null takes the task's name.
        wandb_tags: W&B tags, beside the method and the seed.
        checkpoint_every_n_steps: Optimizer steps between two checkpoints; there is one at the end, too.
    """

    name: str = "run"
    root: str = "runs"
    wandb: Literal["auto", "online", "offline", "disabled"] = "auto"
    wandb_project: str = "lora-one"
    wandb_group: str | None = None
    wandb_tags: list[str] = field(default_factory=list)
    checkpoint_every_n_steps: int = 100

    def __post_init__(self) -> None:
        if self.checkpoint_every_n_steps < 1:
            raise InputError(
                f"output.checkpoint_every_n_steps must be >= 1, got {self.checkpoint_every_n_steps}; "
                "trainer.enable_checkpointing: false turns checkpoints off"
            )


def make_loggers(
    settings: OutputSettings,
    continued: Path | None = None,
    wandb_id: str | None = None,
    task: str | None = None,
    tags: Sequence[str] = (),
) -> list[Logger]:
    """Make the run folder's CSV logger, and W&B's beside it.

    Args:
        settings: Where to write. The folder's number is the first free one.
        continued: The folder of an interrupted run that goes on, instead of a new one.
        wandb_id: The W&B run that goes on; None for a new one.
        task: W&B group where the settings name none.
        tags: W&B tags beside those of the settings.

    Returns:
        The CSV logger first: its `log_dir` is the run folder. Only the first process has one.

    Raises:
        InputError: If the folder cannot be written.
    """
    if not is_first_process():
        return []
    folder = continued or new_folder(Path(settings.root) / settings.name)
    table = MetricsTable(str(folder.parent.parent), folder.parent.name, folder.name)
    loggers: list[Logger] = [table]
    if settings.wandb != "disabled":
        os.environ.setdefault("WANDB_SILENT", "true")
        mode = wandb_mode(settings)
        logger = WandbLogger(
            name=f"{folder.parent.name}/{folder.name}",
            id=wandb_id,
            project=settings.wandb_project,
            save_dir=str(folder),
            offline=mode == "offline",
            # The logger's own switch is an environment variable, which comes too late once W&B
            # has looked for a key.
            mode=mode,
            group=settings.wandb_group or task,
            tags=[*settings.wandb_tags, *tags] or None,
        )
        # Lightning hands this on unasked, and W&B then warns that it means nothing any more.
        logger._wandb_init.pop("anonymous", None)
        loggers.append(logger)
    return loggers


def wandb_mode(settings: OutputSettings) -> Literal["online", "offline"]:
    """Return how W&B hears of a run that is not kept from it."""
    if settings.wandb == "auto":
        return "online" if _has_key() else "offline"
    return "offline" if settings.wandb == "offline" else "online"


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


def _has_key() -> bool:
    import wandb  # slow, and of no use to a run with `output.wandb: disabled`

    return wandb.login(prompt=False, verify=False)


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
