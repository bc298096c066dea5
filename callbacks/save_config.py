"""config.yaml: the resolved configuration of a run."""

from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger

from app.tracking.loggers import run_folder_of
from app.tracking.wandb_summary import cell_of


class SaveConfig(SaveConfigCallback):
    """Write the resolved configuration into the run folder and to the loggers."""

    def save_config(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        """Write `config.yaml` when fitting starts."""
        folder = run_folder_of(trainer.loggers)
        if stage != "fit" or folder is None:
            return
        folder.path.mkdir(parents=True, exist_ok=True)
        if not folder.config.exists():  # a continued run keeps its own
            self.parser.save(self.config, str(folder.config), skip_unset=False, multifile=False)
        settings = self.config.as_dict()
        task = getattr(trainer.datamodule, "task_name", None)  # type: ignore[attr-defined]
        for logger in trainer.loggers:
            if not isinstance(logger, CSVLogger):  # would write the same again as hparams.yaml
                logger.log_hyperparams({**settings, "cell": cell_of(settings, task)})
