"""The command line: LightningCLI with the project's parts, config lookup and plain errors."""

import argparse
import difflib
import logging
import re
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from jsonargparse import DefaultHelpFormatter, set_parsing_settings
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from omegaconf.errors import OmegaConfBaseException

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
from callbacks.lora_one_init import LoraOneInit
from callbacks.plain_progress import PlainProgress
from callbacks.run_report import RunReport
from callbacks.score_at import ScoreAt
from data_modules.text import TextDataModule

PROJECT = Path(__file__).resolve().parent.parent
CONFIGS = PROJECT / "configs"

DESCRIPTION = """Fine-tune a language model with LoRA-One.

  python train.py fit --config quickstart.yaml            train; writes runs/quickstart/version_0
  python train.py fit --config glue_sst2.yaml --config methods/lora.yaml     later files win
  python train.py test --run runs/quickstart/version_0    score a finished run's adapter
  python train.py export --run runs/quickstart/version_0 --merge    write a merged model
"""

# Interpolations are resolved after overrides, so that `${model.adapter.r}` is never stale.
set_parsing_settings(omegaconf_absolute_to_relative_paths=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: Arguments after the program's name; None takes the process's own.

    Returns:
        Exit status: 0, or 2 after an error that is the user's to mend.
    """
    arguments = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    _silence()
    try:
        if arguments[0] == "export":
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
                trainer_defaults={
                    "num_sanity_val_steps": 0,
                    "use_distributed_sampler": False,
                    "enable_model_summary": False,
                },
                auto_configure_optimizers=False,
                args=expand(arguments),
            )
    except ValueError as error:
        # The parser wraps what a class says of its arguments.
        told = next((e for e in _chain(error) if isinstance(e, InputError)), None)
        if told is None:
            raise
        print(f"error: {told}", file=sys.stderr)
        return 2
    return 0


def _silence() -> None:
    """Drop what no user can act on: advertisements, absent hardware, deprecations inside libraries."""
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.seed"):
        logging.getLogger(name).addFilter(_says_something)
    for inside in (
        "Experiment logs directory .* exists and is not empty",  # make_loggers has just made it
        "The dirpath has changed from",  # a resumed run gets a folder of its own
        "`is_gradient_checkpointing` is deprecated",
        "`gradient_checkpointing_enable` is deprecated",
        r"`isinstance\(treespec, LeafSpec\)`",
    ):
        warnings.filterwarnings("ignore", message=inside)


def _says_something(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(("💡", "TPU available", "Seed set"))


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


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
            path = find_config(value)
            _check_yaml(path)
            expanded.append(f"--config={path}")
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
    stems = {path.removesuffix(".yaml"): path for path in known}
    wanted = name.removesuffix(".yaml")
    close = difflib.get_close_matches(wanted, stems, n=1, cutoff=0.5)
    hint = f" Did you mean {stems[close[0]]}?" if close else ""
    raise InputError(
        f"--config is {name!r}, which is neither a file nor a name in configs/.{hint} "
        f"There are: {', '.join(known)}"
    )


def _check_yaml(path: Path) -> None:
    """Refuse a file that is no YAML mapping, by its name: the parser names none."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        told = " ".join(str(error).replace('"<unicode string>"', "it").split())
        raise InputError(f"--config {path} cannot be read as YAML: {told}") from error
    if not isinstance(content, dict):
        raise InputError(
            f"--config {path} holds {type(content).__name__}: expected sections such as model:, data:"
        )


class PlainHelp(DefaultHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """The parser's usual help, with the lines of a description as they are."""


class WrongSetting(InputError):
    """An unknown setting or a wrong value.

    Args:
        told: The message, with a `%s` for each of the names.
        names: Settings, as the parser at hand knows them; those around it add what stands before.
    """

    def __init__(self, told: str, *names: str) -> None:
        super().__init__(told % names)
        self.told = told
        self.names = names

    def below(self, key: str) -> "WrongSetting":
        """Return the same error as the parser around sees it."""
        return WrongSetting(self.told, *(f"{key}.{name}" for name in self.names))


class Parser(LightningArgumentParser):
    """LightningCLI's parser, whose errors are one plain line with the nearest known name."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.allow_abbrev = False  # else a misspelt --output.nam would mean --output.name

    def error(self, message: str, ex: Exception | None = None) -> Any:
        """Raise InputError instead of printing the usage."""
        text = " ".join(str(message).split())
        at = re.match(r'Parser key "([^"]+)": ', text)
        inner = next((e for e in _chain(ex) if isinstance(e, WrongSetting)), None)
        if at and inner:
            raise inner.below(at[1]) from ex
        if at:
            raise _wrong_value(at[1], text[at.end() :]) from ex
        unknown = re.search(
            r"(?:Option|does not accept option) '([^']+)'|unrecognized arguments: --([\w.]+)", text
        )
        if unknown:
            raise self._unknown(unknown[1] or unknown[2], text) from ex
        choice = re.search(r"invalid choice: '([^']*)'", text)
        if choice or '"subcommand"' in text:
            got = f"there is no command {choice[1]!r}" if choice else "no command is given"
            raise InputError(f"{got}: expected fit, validate, test or export") from ex
        extra = re.match("unrecognized arguments: (.*)", text)
        if extra:
            raise InputError(f"{extra[1]!r} belongs to no setting: expected --NAME VALUE") from ex
        required = re.match("the following arguments are required: (.*)", text)
        if required:
            names = re.sub(r"\b(fit|validate|test)\.", "", required[1])
            raise InputError(
                f"no value is given for {names}: name a file with --config, such as quickstart.yaml"
            ) from ex
        raise InputError(text) from ex

    def _unknown(self, wrong: str, text: str) -> WrongSetting:
        actions = list(self._actions)
        command = re.match(r"Subcommand '([^']+)'", text)
        for parsers in [a.choices for a in self._actions if isinstance(a.choices, dict)]:
            actions += parsers[command[1]]._actions if command else []
        group = re.match(r"Group '([^']+)'", text)
        # `data.batch_size` is short for `data.init_args.batch_size`
        full = (f"{group[1]}." if group else "") + wrong.removeprefix("init_args.")
        known = [action.dest for action in actions if action.dest != "help"]
        close = difflib.get_close_matches(full, known, n=1, cutoff=0.5)
        if close:
            return WrongSetting("there is no setting %s; did you mean %s?", full, close[0])
        return WrongSetting("there is no setting %s; see --help", full)


def _wrong_value(key: str, text: str) -> WrongSetting:
    """Say in plain words what the parser says of a value."""
    simple = re.match(r"Expected an? (.+?)\. Got value: (.*)", text)
    if not simple:  # a value below an optional section, given on the command line
        nested = re.search(r'- Parser key "([^"]+)": (Expected .*?)(?: - Expected|$)', text)
        if nested:
            return _wrong_value(f"{key}.{nested[1]}", nested[2])
    if simple:
        kinds, got = simple[1], simple[2]
        choices = re.findall(r"'([^']+)'", kinds) if "Literal" in kinds else []
        close = difflib.get_close_matches(got, choices, n=1, cutoff=0.5)
        hint = f"; did you mean {close[0]}?" if close else ""
        wanted = f"one of {', '.join(choices)}" if choices else _kinds(kinds)
        return WrongSetting("%s is " + f"{got}: expected {wanted}{hint}".replace("%", "%%"), key)
    name = re.search(
        r"given class_path '([^']+)'|dot import path string: ([A-Za-z]\S+)|class_path='([^']+)'",
        text,
    )
    if name:
        wrong = next(group for group in name.groups() if group)
        known = {kind.__name__: kind for kind in _known_classes()}
        close = difflib.get_close_matches(wrong.rpartition(".")[2], known, n=1, cutoff=0.6)
        kind = known[close[0]] if close else None
        hint = f"; did you mean {kind.__module__}.{kind.__name__}?" if kind else ""
        return WrongSetting(
            "%s is " + f"{wrong!r}, which is no class{hint}".replace("%", "%%"), key
        )
    union = re.match(r".*Subtypes: \[(.*?)\] Errors: .* Given value: (.*)", text)
    if union:
        told = f"{union[2]}: expected {_kinds(union[1])}"
        return WrongSetting("%s is " + told.replace("%", "%%"), key)
    return WrongSetting("%s: " + text.replace("%", "%%"), key)


def _kinds(text: str) -> str:
    words = {"int": "a whole number", "float": "a number", "bool": "true or false"}
    words |= {"str": "text", "NoneType": "null"}
    names = [name.rpartition(".")[2] for name in re.findall(r"<class '([^']+)'>", text)]
    return " or ".join(words.get(name, name) for name in names) or text


def _known_classes() -> Iterator[type]:
    """Yield the classes that a `class_path` may name."""
    waiting: list[type] = [TextDataModule, Callback, torch.optim.Optimizer]
    for kind in waiting:
        yield kind
        waiting += kind.__subclasses__()


class RunConfig(SaveConfigCallback):
    """Write the resolved configuration into the run folder and to the loggers."""

    def save_config(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        """Write `config.yaml` when fitting starts."""
        if stage != "fit" or not trainer.loggers:
            return
        folder = Path(str(trainer.log_dir))
        folder.mkdir(parents=True, exist_ok=True)
        self.parser.save(
            self.config,
            str(folder / CONFIG_FILE),
            skip_unset=False,
            overwrite=True,
            multifile=False,
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
        try:
            self.config = parser.parse_args(args)
        except OmegaConfBaseException as error:
            key = str(error.full_key).removeprefix(f"{args[0]}.")
            told = str(error).partition("\n")[0]
            name = (
                re.search(r"resolved to '(?:\w+\.)?(.+?)'", told) if "not found" in told else None
            )
            reason = f"refers to {name[1]}, which is no setting" if name else f"is wrong: {told}"
            raise InputError(f"{key} {reason}") from error

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """Make the parser; that of all commands describes the program."""
        kwargs = {"description": DESCRIPTION, **kwargs}
        kwargs["formatter_class"] = PlainHelp
        return super().init_parser(**kwargs)

    def before_instantiate_classes(self) -> None:
        """Look for the checkpoint before a model is loaded."""
        path = self._get(self.config, "ckpt_path")
        if path is not None and not Path(path).exists():
            raise InputError(
                f"ckpt_path is {str(path)!r}, which does not exist: expected a checkpoint file, such as "
                "runs/NAME/version_0/checkpoints/epoch=0-step=100.ckpt"
            )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the sections `init` and `output`, and one seed for everything."""
        parser.add_argument(
            "--init",
            type=LoraOneInit | None,
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
        extra: list[Callback] = []
        if self._get(self.config_init, "trainer")["enable_progress_bar"] is not False:
            extra.append(TQDMProgressBar() if on_terminal() else PlainProgress())
        own = self._get(self.config_init, "trainer")["logger"]
        kwargs["logger"] = own
        if self.subcommand == "fit":
            dry = self._get(self.config_init, "trainer")["fast_dev_run"]
            loggers = [] if dry else make_loggers(output)
            given = [] if own in (None, True, False) else own if isinstance(own, list) else [own]
            kwargs["logger"] = loggers + given or False
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
        try:
            return self._instantiate_trainer(trainer_config, extra)
        except (ValueError, MisconfigurationException) as error:
            raise InputError(f"the settings in trainer cannot be used: {error}") from error
