"""The command line: LightningCLI with the project's parts, config lookup and plain errors."""

import inspect
import os
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from jsonargparse import Namespace
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import LambdaCallback, ProgressBar, TQDMProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import Logger
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.plugins import CheckpointIO
from omegaconf.errors import OmegaConfBaseException

from app.cli.known_classes import import_known_classes
from app.commands.plan.command import PlanTrainer, plan_trainer
from app.distributed.processes import is_first_process
from app.distributed.rendezvous import check_same_settings
from app.models.loading import available_attention
from app.tracking.config_files import expand
from app.tracking.loggers import (
    OutputSettings,
    make_loggers,
    remove_unused_folder,
    run_folder_of,
)
from app.tracking.run_folder import RunFolder
from app.training import trainer_checks
from app.training.checkpoint_io import NEEDED, TRAINED, CheckpointFiles
from app.training.checks import check_span
from app.training.module import LoraModule
from app.training.resume import ResumePoint, find_resume_point, run_to_continue
from app.training.resume_checks import ADAPTER, TRAINING, check_rows_per_step, check_settings
from app.utils.arguments import Parser, PlainHelp, listed, wrong_reference
from app.utils.class_paths import failed_import
from app.utils.console import on_terminal
from app.utils.errors import InputError
from app.utils.files import absolute_folder, load_yaml
from app.utils.signals import StopSignals
from callbacks.adalora_pruning import AdaLoraPruning
from callbacks.benchmark_results import BenchmarkResults
from callbacks.checkpoints import Checkpoints
from callbacks.initialization import AdapterInit
from callbacks.mid_epoch_resume import MidEpochResume
from callbacks.plain_progress import PlainProgress
from callbacks.preemption import Preemption
from callbacks.run_report import RunReport
from callbacks.save_config import SaveConfig, config_text
from callbacks.score_at import ScoreAt
from data_modules.text import TextDataModule

COMMANDS = {
    "fit": {"model", "train_dataloaders", "val_dataloaders", "datamodule"},
    "plan": {"model", "datamodule"},
    "validate": {"model", "dataloaders", "datamodule"},
    "test": {"model", "dataloaders", "datamodule"},
}
"""The trainer's methods that are commands, and the arguments of each that the command line does not set."""

import_known_classes()


class LoraCLI(LightningCLI):
    """`fit`, `plan`, `validate` and `test` of a LoraModule on a data module.

    Each command has a parser of its own instead of Lightning's one with subcommands, which parses twice.

    Args:
        command: Name of the trainer's method.
        arguments: The options of the command.
        signals: Note a request to stop.
    """

    made_parsers: ClassVar[dict[str, LightningArgumentParser]] = {}
    """The parser of each command; making one takes reading the sources of all its classes."""

    def __init__(self, command: str, arguments: Sequence[str], signals: StopSignals) -> None:
        self.command = command
        self.signals = signals
        self.resume_point: ResumePoint | None = None  # None for a new run
        self.status = 0  # of the command, for the program to exit with
        if os.getcwd() not in sys.path:  # a class of the user's in the current folder
            sys.path.append(os.getcwd())
        # Holds the run folder until the command ends.
        with ExitStack() as self.held, trainer_checks.misconfiguration_in_one_line():
            super().__init__(
                LoraModule,
                TextDataModule,
                trainer_class=PlanTrainer,
                subclass_mode_data=True,
                parser_class=Parser,
                # Interpolations are resolved after overrides, so that `${model.adapter.r}` is never stale.
                parser_kwargs={"parser_mode": "omegaconf+"},
                save_config_callback=SaveConfig,
                save_config_kwargs={"save_to_log_dir": False},
                seed_everything_default=0,
                trainer_defaults={
                    "num_sanity_val_steps": 0,
                    "use_distributed_sampler": False,
                    "enable_model_summary": False,
                },
                auto_configure_optimizers=False,
                load_from_checkpoint_support=False,  # a checkpoint holds what was trained, and no model
                args=expand(arguments),
                run=False,
            )
            self.run()

    def run(self) -> None:
        """Call the trainer's method with the settings that are its arguments."""
        method = getattr(self.trainer, self.command)
        names = inspect.signature(method).parameters.keys() & vars(self.made).keys()
        method(datamodule=self.datamodule, **{name: self.made[name] for name in names})
        assert isinstance(self.trainer, PlanTrainer)
        self.status = 0 if self.trainer.fits else 1

    def setup_parser(self, *args: Any) -> None:
        """Take the parser of the command that is there, or make it."""
        made = self.made_parsers.pop(self.command, None)
        if made is None:
            super().setup_parser(*args)
        else:
            self.parser = made

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """Make the parser, whose help has descriptions as they are."""
        about = inspect.getdoc(getattr(PlanTrainer, self.command)) or ""
        return super().init_parser(
            **kwargs,
            prog=f"train.py {self.command}",
            description=about.partition("\n")[0],
            formatter_class=PlainHelp,
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the sections `init` and `output`, one seed for everything, and the method's arguments."""
        parser.add_argument(
            "--init",
            type=AdapterInit | None,
            default=None,
            help="The callback that initializes the adapter, such as LoraOneInit; null keeps "
            "PEFT's initialization (lora_A random, lora_B zero).",
        )
        parser.add_class_arguments(OutputSettings, "output")
        parser.link_arguments("seed_everything", "data.init_args.seed")
        parser.add_method_arguments(PlanTrainer, self.command, skip={*COMMANDS[self.command]})

    @property
    def made(self) -> Namespace:
        """The settings with the objects that were made of them."""
        return self.config_init

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse, and find the checkpoint to go on from before a model is loaded."""
        try:
            # Without Lightning's warning about tests that call `main` themselves.
            self.config = parser.parse_args(args)
        except OmegaConfBaseException as error:
            raise wrong_reference(error) from error
        except Exception as error:  # whatever the module of a user's class raises
            failure = None if isinstance(error, InputError) else failed_import(error)
            if failure is None:
                raise
            raise InputError(
                f"a class_path names a class that cannot be imported: {failure}"
            ) from error
        # One that has raised may still have to print, for --print_config, and would in the next command.
        self.made_parsers[self.command] = self.parser
        # The run's config.yaml is read in other working directories, too.
        self.config.model.name = absolute_folder(self.config.model.name)
        seed, ckpt_path = self.config.seed_everything, self.config.ckpt_path
        if not 0 <= seed < 2**32:
            raise InputError(f"seed_everything is {seed}: expected 0 to 4294967295")
        if ckpt_path is not None:
            self._resume_from(str(ckpt_path))

    def _resume_from(self, ckpt_path: str) -> None:
        """Find the checkpoint, and refuse settings that are not those of its run."""
        settings, fits = self.config, self.command == "fit"
        fixed, needed = (TRAINING, NEEDED) if fits else (ADAPTER, TRAINED)
        runs = Path(settings.output.root) / settings.output.name
        if fits:
            self._hold(run_to_continue(ckpt_path, runs))
        self.resume_point = find_resume_point(ckpt_path, runs, settings.model.method, needed)
        settings.ckpt_path = None
        if self.resume_point is not None:
            check_settings(self.resume_point, load_yaml(config_text(self.parser, settings)), fixed)
            settings.ckpt_path = str(self.resume_point.checkpoint)

    def _hold(self, folder: RunFolder | None) -> None:
        """Keep other processes from training in a run folder."""
        if folder is not None and is_first_process():
            self.held.enter_context(folder.held())

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Make the trainer with the run's loggers and the project's callbacks."""
        given = self.made.trainer
        trainer_checks.check_trainer_settings(given, self.command)
        model = self.made.model
        if self.command in ("fit", "plan"):
            starts = self.made.init is not None
            check_span(model.pair_optimizer, starts, model.adapter, model.adapter_path)
        available_attention(model.attn_implementation)
        loggers = self._run_loggers() if self.command == "fit" else []
        try:
            if self.command == "plan":
                trainer: Trainer = plan_trainer(given, self.made.init)
                trainer_checks.check_precision(trainer)
                return trainer
            own = listed(given.logger)
            kwargs["logger"] = [*loggers, *own] or bool(given.logger and self.command != "fit")
            kwargs["callbacks"] = [*listed(given.callbacks), *self._callbacks()]
            kwargs["plugins"] = listed(given.plugins)
            if not any(isinstance(plugin, CheckpointIO) for plugin in kwargs["plugins"]):
                kwargs["plugins"].append(CheckpointFiles())
            trainer = super().instantiate_trainer(**kwargs)
            trainer_checks.check_trainer(trainer)
            if self.command == "fit" and self.resume_point is not None:
                settings = load_yaml(self.config_text)
                check_rows_per_step(self.resume_point, settings, trainer.world_size)
        except trainer_checks.ERRORS as error:
            if self.resume_point is None:
                remove_unused_folder(loggers)
            if isinstance(error, InputError):
                raise
            raise InputError(f"the settings in trainer cannot be used: {error}") from error
        return trainer

    def _run_loggers(self) -> list[Logger]:
        """Make the run folder, or go on in that of the checkpoint."""
        if self.made.trainer.fast_dev_run:
            return [DummyLogger()]  # writes nothing; callbacks may ask for a logger
        point = self.resume_point
        folder, wandb_id = (None, None) if point is None else (point.folder, point.wandb_id)
        tags = (self.config.model.method, f"seed {self.config.seed_everything}")
        task, own = self.made.data.task_name, listed(self.made.trainer.logger)
        loggers = make_loggers(self.made.output, folder, wandb_id, task, tags, own)
        if folder is None:
            self._hold(run_folder_of(loggers))
        return loggers

    def _callbacks(self) -> list[Callback]:
        """List the project's callbacks in the order in which Lightning calls them, behind the user's."""
        # The process group exists then, and nothing but the data has been read.
        callbacks: list[Callback] = [
            LambdaCallback(setup=lambda *_, **__: check_same_settings(lambda: self.config_text))
        ]
        given = self.made.trainer
        bars = [each for each in listed(given.callbacks) if isinstance(each, ProgressBar)]
        if given.enable_progress_bar is not False and not bars:
            callbacks.append(TQDMProgressBar() if on_terminal() else PlainProgress())
        if self.command != "fit":
            return [*callbacks, BenchmarkResults(self._test_folder(), self.made.output)]
        return [*callbacks, *self._fit_callbacks()]

    def _fit_callbacks(self) -> list[Callback]:
        """List those of `fit` alone."""
        given, output = self.made.trainer, self.made.output
        init, seed, point = self.made.init, self.config.seed_everything, self.resume_point
        saves = given.enable_checkpointing is not False
        checkpoints = Checkpoints(output.checkpoint_every_n_steps) if saves else None
        preemption = Preemption(self.signals, checkpoints.save if checkpoints else None)
        return [
            AdaLoraPruning(),  # before all that measure or save the adapter
            # Notes the place that the callbacks below save.
            MidEpochResume(seed, self.config_text, point),
            ScoreAt("zero_shot"),  # the untouched model
            *([init] if init else []),
            ScoreAt("after_init", same_as=None if init else "zero_shot"),
            ScoreAt("final", between_batches=preemption.stop_if_asked),
            BenchmarkResults(),
            RunReport(seed),  # when all scores are there
            preemption,
            *([checkpoints] if checkpoints else []),  # Lightning puts these behind the user's, too
        ]

    @cached_property
    def config_text(self) -> str:
        """The settings of which everything is made, as YAML."""
        return config_text(self.parser, self.config)

    def _test_folder(self) -> Path:
        """Return where a test keeps answers: the run's folder, or that of the experiment's name."""
        model, output = self.config.model, self.made.output
        trained = Path(model.adapter_path or model.name)
        run = RunFolder(trained.parent)
        if trained in (run.adapter, run.model) and run.config.is_file():
            # The scores of the run are those of the model that was trained.
            return run.path / f"merged_{model.merged}" if model.merged else run.path
        return Path(output.root) / output.name
