"""config.yaml: the resolved configuration of a run."""

from typing import Any

from jsonargparse import ArgumentParser, Namespace
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger

from app.tracking.loggers import run_folder_of
from app.tracking.wandb_summary import cell_of
from app.training.protocols import data_of
from app.utils.arguments import class_named
from app.utils.class_paths import bare_name, shorten_class_paths


class SaveConfig(SaveConfigCallback):
    """Write the resolved configuration into the run folder and to the loggers."""

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write `config.yaml` when fitting starts."""
        folder = run_folder_of(trainer.loggers)
        if stage != "fit" or folder is None:
            return
        folder.path.mkdir(parents=True, exist_ok=True)
        if not folder.config.exists():  # a resumed run keeps its own
            folder.config.write_text(config_text(self.parser, self.config), encoding="utf-8")
        settings = self.config.as_dict()
        task = data_of(trainer).task_name
        for logger in trainer.loggers:
            if not isinstance(logger, CSVLogger):  # would write the same again as hparams.yaml
                logger.log_hyperparams({**settings, "cell": cell_of(settings, task)})


def config_text(parser: ArgumentParser, config: Namespace) -> str:
    """Return a resolved configuration as YAML, with bare names of the project's own classes.

    A run folder stays readable when they move; the classes of a user keep their full path.
    """
    # What the parser has returned is valid.
    text: Any = parser.dump(config, skip_unset=False, skip_validation=True)
    return shorten_class_paths(text, _has_bare_name)


def _has_bare_name(path: str) -> bool:
    try:
        kind = class_named(bare_name(path))
    except ImportError:
        return False
    return path == f"{kind.__module__}.{kind.__qualname__}"
