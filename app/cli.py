"""The command line: LightningCLI with the project's parts, config lookup and plain errors."""

import difflib
import logging
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jsonargparse import set_parsing_settings
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback

import callbacks.lora_one_init  # noqa: F401 (makes the class known by its short name)
import data_modules.glue
import data_modules.movie_reviews  # noqa: F401
from app.errors import InputError
from app.export import export_command
from app.module import LoraModule
from app.progress import on_terminal
from app.run_folder import (
    ADAPTER_FOLDER,
    CONFIG_FILE,
    OutputSettings,
    check_run_folder,
    make_loggers,
)
from callbacks.plain_progress import PlainProgress
from callbacks.run_report import RunReport
from callbacks.score_at import ScoreAt
from data_modules.text import TextDataModule

PROJECT = Path(__file__).resolve().parent.parent
CONFIGS = PROJECT / "configs"

# Interpolations are resolved after overrides, so that `${model.adapter.r}` is never stale.
set_parsing_settings(omegaconf_absolute_to_relative_paths=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: Arguments after the program's name; None takes the process's own.

    Returns:
        Exit status: 0, or 2 after an error that is the user's to mend.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.seed"):
        logging.getLogger(name).addFilter(_says_something)
    try:
        if arguments[:1] == ["export"]:
            export_command(arguments[1:])
        else:
            LoraCLI(
                LoraModule,
                TextDataModule,
                subclass_mode_data=True,
                parser_class=Parser,
                parser_kwargs={"parser_mode": "omegaconf+"},
                save_config_callback=RunConfig,
                save_config_kwargs={"save_to_log_dir": False},
                seed_everything_default=0,
                trainer_defaults={"num_sanity_val_steps": 0, "use_distributed_sampler": False},
                auto_configure_optimizers=False,
                args=expand(arguments),
            )
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _says_something(record: logging.LogRecord) -> bool:
    """Drop Lightning's advertisements and its notes on absent hardware."""
    return not record.getMessage().startswith(("💡", "TPU available", "Seed set"))


def expand(arguments: Sequence[str]) -> list[str]:
    """Replace config names by paths, and `--run FOLDER` by that run's config and adapter."""
    expanded: list[str] = []
    waiting = iter(arguments)
    for argument in waiting:
        option, equals, value = argument.partition("=")
        if option not in ("--config", "-c", "--run"):
            expanded.append(argument)
            continue
        if not equals:
            value = next(waiting, "")
        if option == "--run":
            folder = Path(value)
            check_run_folder(folder)
            expanded += [f"--config={folder / CONFIG_FILE}"]
            expanded += [f"--model.adapter_path={folder / ADAPTER_FOLDER}"]
        else:
            expanded.append(f"--config={find_config(value)}")
    return expanded


def find_config(name: str) -> Path:
    """Find a configuration file: as given, then below `configs/`.

    Raises:
        InputError: If there is none; names the closest and lists all.
    """
    for candidate in (Path(name), CONFIGS / name, CONFIGS / f"{name}.yaml"):
        if candidate.is_file():
            return candidate
    known = sorted(str(path.relative_to(CONFIGS)) for path in CONFIGS.rglob("*.yaml"))
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
    hint = f" Did you mean {close[0]}?" if close else ""
    raise InputError(
        f"--config is {name!r}, which is neither a file nor a name in configs/.{hint} "
        f"There are: {', '.join(known)}"
    )


class Parser(LightningArgumentParser):
    """LightningCLI's parser, whose errors are one line with the nearest known name."""

    def error(self, message: str, ex: Exception | None = None) -> Any:
        """Raise InputError instead of printing the usage."""
        text = " ".join(str(message).split())
        found = re.search(r"option '([^']+)'|for key '([^']+)'|arguments?: --([\w.]+)", text)
        if found:
            wrong = next(group for group in found.groups() if group)
            close = difflib.get_close_matches(wrong, self._known_keys(), n=1, cutoff=0.5)
            if close:
                text += f" Did you mean {close[0]}?"
        raise InputError(text) from ex

    def _known_keys(self) -> list[str]:
        return [a.dest for a in self._actions]


class RunConfig(SaveConfigCallback):
    """Write the resolved configuration into the run folder and to the loggers."""

    def save_config(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        """Write `config.yaml` when fitting starts."""
        if stage != "fit" or trainer.log_dir is None:
            return
        folder = Path(trainer.log_dir)
        folder.mkdir(parents=True, exist_ok=True)
        self.parser.save(
            self.config, str(folder / CONFIG_FILE), skip_none=False, overwrite=True, multifile=False
        )
        for logger in trainer.loggers:
            logger.log_hyperparams(self.config.as_dict())


class LoraCLI(LightningCLI):
    """`fit`, `validate` and `test` of a LoraModule on a TextDataModule."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """List the commands and the arguments that the command line does not set."""
        return {
            "fit": {"model", "train_dataloaders", "val_dataloaders", "datamodule"},
            "validate": {"model", "dataloaders", "datamodule"},
            "test": {"model", "dataloaders", "datamodule"},
        }

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse without Lightning's warning about tests that call `main` themselves."""
        self.config = parser.parse_args(args)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the sections `init` and `output`, and one seed for everything."""
        parser.add_argument(
            "--init",
            type=Callback | None,
            default=None,
            help="The callback that gives the adapter its start, such as LoraOneInit; null keeps "
            "PEFT's (lora_A random, lora_B zero).",
        )
        parser.add_class_arguments(OutputSettings, "output")
        parser.link_arguments("seed_everything", "data.init_args.seed")

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Make the trainer with the run's loggers and the project's callbacks."""
        init = self._get(self.config_init, "init")
        output = self._get(self.config_init, "output")
        progress = TQDMProgressBar() if on_terminal() else PlainProgress()
        extra: list[Callback] = [progress]
        own = self._get(self.config_init, "trainer")["logger"]
        kwargs["logger"] = own
        if self.subcommand == "fit":
            loggers = make_loggers(output)
            given = [] if own in (None, True, False) else own if isinstance(own, list) else [own]
            kwargs["logger"] = loggers + given
            extra.append(ScoreAt("zero_shot"))
            if init is not None:
                extra += [init, ScoreAt("after_init")]
            else:
                extra.append(ScoreAt("after_init", same_as="zero_shot"))
            seed = self._get(self.config, "seed_everything")
            extra += [RunReport(seed), ScoreAt("final")]
        elif own is None:
            kwargs["logger"] = False
        trainer_config = {**self._get(self.config_init, "trainer", default={}), **kwargs}
        return self._instantiate_trainer(trainer_config, extra)
