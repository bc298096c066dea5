"""The classes that a `class_path` may name without their module."""

import importlib
import pkgutil
from typing import TYPE_CHECKING

import callbacks
import data_modules
import data_modules.evals
from app.evaluation.benchmark import Benchmark
from app.models.adapter_config import unsupported_settings
from app.training.protocols import DataModule
from app.utils.arguments import Parser
from data_modules.text import TextDataModule


def import_known_classes() -> None:
    """Import every callback, data module and benchmark of the project; the parser looks among subclasses."""
    for package in (callbacks, data_modules, data_modules.evals):
        for module in pkgutil.iter_modules(package.__path__):
            importlib.import_module(f"{package.__name__}.{module.name}")
    for base in (TextDataModule, Benchmark):
        if base not in Parser.bases:
            Parser.bases.append(base)
    for name, instead in unsupported_settings().items():
        message = f"PEFT's {name} is not supported: {instead}"
        Parser.unsupported[f"model.adapter.{name}"] = message
        Parser.unsupported[f"model.adapter.adalora.{name}"] = message


if TYPE_CHECKING:  # what the module and callbacks use of a data module is there
    _data: type[DataModule] = TextDataModule
