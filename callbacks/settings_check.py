"""Compare the settings of all processes before the model is loaded."""

from lightning.pytorch import Callback, LightningModule, Trainer

from app.distributed.rendezvous import check_same_settings


class SettingsCheck(Callback):
    """Raise InputError on all processes unless they were started with the same settings.

    Args:
        settings: This process's resolved configuration as YAML.
    """

    def __init__(self, settings: str) -> None:
        self.settings = settings

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Compare: the process group exists, and nothing but the data has been read."""
        check_same_settings(self.settings)
