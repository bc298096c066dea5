"""The processes of a run meet: same settings everywhere, and somebody watches who is alive."""

from typing import Any

import torch.distributed as dist
import yaml
from lightning.pytorch import Callback, LightningModule, Trainer

from app.errors import InputError
from app.heartbeat import Heartbeat
from app.processes import world_size


class Meeting(Callback):
    """Refuse processes whose settings differ, before anything is loaded; start the heartbeat.

    Args:
        settings: The resolved configuration as YAML.
    """

    def __init__(self, settings: str) -> None:
        self.settings = settings
        self.heartbeat: Heartbeat | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Compare the settings of all processes."""
        if world_size() == 1:
            return
        everyone: list[Any] = [None] * world_size()
        dist.all_gather_object(everyone, self.settings)
        for other, settings in enumerate(everyone):
            if settings != everyone[0]:
                raise InputError(
                    f"process {other} was started with other settings than process 0: "
                    f"{first_difference(yaml.safe_load(everyone[0]), yaml.safe_load(settings))}. "
                    "Give all processes the same command line and files"
                )
        if self.heartbeat is None:
            self.heartbeat = Heartbeat()
            self.heartbeat.start()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Stop the heartbeat, unless an error has to be explained first."""
        if self.heartbeat is not None and not trainer.interrupted:
            self.heartbeat.stop()


def first_difference(first: Any, other: Any, name: str = "") -> str:
    """Name the first setting that differs, with both values."""
    if isinstance(first, dict) and isinstance(other, dict):
        for key in [*first, *(key for key in other if key not in first)]:
            if first.get(key) != other.get(key):
                inner = f"{name}.{key}" if name else str(key)
                return first_difference(first.get(key), other.get(key), inner)
    return f"{name} is {other!r}, not {first!r}"
