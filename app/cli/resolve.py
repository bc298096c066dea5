"""Resolve the configuration of a `fit` without running it."""

from collections.abc import Sequence
from functools import cached_property
from typing import Any

from jsonargparse import Namespace

from app.cli.lora_cli import LoraCLI
from app.training.checks import check_length
from app.utils.arguments import class_named
from app.utils.files import load_yaml
from app.utils.signals import StopSignals


class ResolvedFit(LoraCLI):
    """A `fit` that is parsed and not run."""

    resolved: dict[str, Any]  # the configuration, as a run would write it

    def instantiate_classes(self) -> None:
        """Make nothing."""
        self.resolved = load_yaml(self.config_text)

    def run(self) -> None:
        """Run nothing."""

    def _resume_from(self, ckpt_path: str) -> None:
        """Leave the checkpoint to the run."""

    @cached_property
    def made(self) -> Namespace:
        """Everything of the run but the trainer; making it checks its settings."""
        return self.parser.instantiate(self.config)

    @property
    def data(self) -> Any:
        """The data module."""
        return self.made.data

    def class_named(self, path: str) -> Any:
        """Return the class that a `class_path` names."""
        return class_named(path)

    def check(self) -> None:
        """Raise an error if a part cannot be made, or training is too short for the adapter."""
        module, trainer = self.made.model, self.resolved["trainer"]
        adapter = module.adapter if module.adapter_path is None else None
        check_length(adapter, trainer.get("max_steps"), trainer.get("max_epochs"))

    def check_rank(self) -> None:
        """Raise an error if a layer is too small for the adapter's rank, without loading the weights."""
        model, init = self.made.model.blueprint, self.made.init
        if init is not None:
            init.check_rank(model)


def resolve_run(options: Sequence[str]) -> ResolvedFit:
    """Parse the options of a `fit`.

    Raises:
        InputError: A setting is unknown or wrong, or a file is missing.
    """
    return ResolvedFit("fit", options, StopSignals())
