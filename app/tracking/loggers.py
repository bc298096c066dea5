"""Make the loggers of a run: the CSV table in its folder, and W&B.

Private names of Lightning stand here and in `wandb_logger.py` alone: CSVLogger's `_experiment` and its writer's
`_check_log_dir_exists`, since CSVLogger deletes a table that it finds (an argument of CSVLogger that lets it
append would replace both).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import CSVLogger, Logger, WandbLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from typing_extensions import override

from app.distributed.processes import global_rank, is_first_process
from app.tracking.metrics_table import append_rows, read_table, write_table
from app.tracking.run_folder import RunFolder, new_run_folder
from app.tracking.wandb_logger import RunWandbLogger, Setting, wandb_mode
from app.utils.errors import InputError


class MetricsTable(CSVLogger):
    """Log to metrics.csv as CSVLogger does, but append to a table that is there."""

    @property
    @override
    def experiment(self) -> Any:
        """The writer; only the first process has one that writes."""
        if self._experiment is None and global_rank() == 0:
            self._experiment = _Writer(self.log_dir)
        return self._experiment


class _Writer(ExperimentWriter):
    def __init__(self, log_dir: str) -> None:
        super().__init__(log_dir)
        self.metrics_keys = read_table(Path(self.metrics_file_path))[0]
        self._has_warned = False

    @override
    def _check_log_dir_exists(self) -> None:
        """Keep the table that is there."""

    @override
    def save(self) -> None:
        """Append the new rows; if that fails, warn once and keep them until the next time."""
        if not self.metrics:
            return
        path = Path(self.metrics_file_path)
        names = sorted({*self.metrics_keys, *(name for row in self.metrics for name in row)})
        try:
            if names != self.metrics_keys or not path.is_file():
                write_table(path, names, read_table(path)[1])
                self.metrics_keys = names
            append_rows(path, names, self.metrics)
        except OSError as error:
            if not self._has_warned:
                rank_zero_warn(
                    f"{path} could not be written ({error.strerror or error}): training goes on, and its rows "
                    "are kept until they can be. Make room, or allow writing there"
                )
            self._has_warned = True
        else:
            self.metrics, self._has_warned = [], False


@dataclass(frozen=True)
class OutputSettings:
    """Where a run writes, and how it uses W&B.

    Args:
        name: Name of the experiment; runs go to ROOT/NAME/version_0, version_1, ...
        root: Folder of all runs.
        wandb: `auto` follows WANDB_MODE, else is online with an API key and a network and offline without;
            never asks.
        wandb_project: W&B project.
        wandb_group: W&B group, for comparing runs of one task; null takes the task's name.
        wandb_tags: W&B tags, beside the method and the seed.
        checkpoint_every_n_steps: Optimizer steps between two checkpoints; there is one at the end, too.
    """

    name: str = "run"
    root: str = "runs"
    wandb: Setting = "auto"
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
    continued: RunFolder | None = None,
    wandb_id: str | None = None,
    task: str | None = None,
    tags: Sequence[str] = (),
    own: Sequence[Logger] = (),
) -> list[Logger]:
    """Make the run folder's CSV logger, and W&B's beside it.

    Args:
        settings: Where to write. The folder's number is the first free one.
        continued: The folder of an interrupted run that goes on, instead of a new one.
        wandb_id: The W&B run that goes on; None for a new one.
        task: W&B group where the settings name none.
        tags: W&B tags beside those of the settings.
        own: The user's loggers. A WandbLogger among them is the run's: W&B knows one of a process.

    Returns:
        The CSV logger first: its `log_dir` is the run folder. Only the first process has one.

    Raises:
        InputError: If the folder cannot be written, or W&B cannot be online as the settings say.
    """
    if not is_first_process():
        return []
    given = any(isinstance(logger, WandbLogger) for logger in own)
    mode = "disabled" if given else wandb_mode(settings.wandb)
    folder = (continued or new_run_folder(Path(settings.root) / settings.name)).path
    table = MetricsTable(str(folder.parent.parent), folder.parent.name, folder.name)
    loggers: list[Logger] = [table]
    if mode != "disabled":
        logger = RunWandbLogger(
            mode=mode,
            may_change=settings.wandb == "auto",
            name=f"{folder.parent.name}/{folder.name}",
            id=wandb_id,
            project=settings.wandb_project,
            save_dir=str(folder),
            group=settings.wandb_group or task,
            tags=[*settings.wandb_tags, *tags] or None,
        )
        loggers.append(logger)
    return loggers


def run_folder_of(loggers: Sequence[Logger]) -> RunFolder | None:
    """Return the folder that a run's loggers write to.

    None without that of the table: under `fast_dev_run`, and on other processes than the first.
    """
    tables = (logger for logger in loggers if isinstance(logger, MetricsTable))
    table = next(tables, None)
    return None if table is None else RunFolder(Path(table.log_dir))


def remove_unused_folder(loggers: Sequence[Logger]) -> None:
    """Remove the folder of a run that did not begin."""
    if folder := run_folder_of(loggers):
        folder.remove_if_unused()
