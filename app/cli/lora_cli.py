"""The command line: LightningCLI with the project's parts, config lookup and plain errors."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from jsonargparse import set_parsing_settings
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.plugins import CheckpointIO
from lightning.pytorch.strategies import FSDPStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from omegaconf.errors import OmegaConfBaseException

from app.cli.known_classes import import_known_classes
from app.commands.plan.command import PlanTrainer, plan_trainer
from app.distributed.rendezvous import install_setup_checks
from app.tracking.config_files import expand
from app.tracking.loggers import OutputSettings, make_loggers, remove_unused_folder
from app.tracking.run_folder import RunFolder
from app.training.checkpoint_io import CheckpointFiles
from app.training.checks import check_precision, check_trainer
from app.training.module import LoraModule
from app.training.resume import ResumePoint, find_resume_point
from app.utils.arguments import Parser, PlainHelp
from app.utils.console import on_terminal
from app.utils.errors import InputError
from app.utils.signals import StopSignals
from callbacks.adalora_pruning import AdaLoraPruning
from callbacks.benchmark_results import BenchmarkResults
from callbacks.checkpoints import Checkpoints
from callbacks.lora_ga_init import LoraGaInit
from callbacks.lora_one_init import LoraOneInit
from callbacks.mid_epoch_resume import MidEpochResume
from callbacks.pissa_init import PissaInit
from callbacks.plain_progress import PlainProgress
from callbacks.preemption import Preemption
from callbacks.run_report import RunReport
from callbacks.save_config import SaveConfig
from callbacks.score_at import ScoreAt
from data_modules.benchmark_data import BenchmarkDataModule

DESCRIPTION = """Fine-tune a language model with LoRA-One.

  python train.py fit --config quickstart.yaml            train; writes runs/quickstart/version_0
  python train.py fit --config glue_sst2.yaml --config methods/lora.yaml     later files win
  python train.py plan --config quickstart.yaml           does it fit? no weights are loaded
  python train.py test --run runs/quickstart/version_0    score a finished run's adapter
  python train.py export --run runs/quickstart/version_0 --merge    write a merged model
  python train.py dashboard --entity me                   make a W&B workspace that compares methods
  python train.py theory --config theory/linear.yaml      the paper's theorems and figures, in a minute
  python train.py compare --config glue_sst2.yaml --methods lora,lora_one --learning_rates 1e-4,1e-3
  python train.py report runs/quickstart                  tables and pictures of any runs
"""

CLI = TypeVar("CLI", bound="LoraCLI")

import_known_classes()
# Interpolations are resolved after overrides, so that `${model.adapter.r}` is never stale.
set_parsing_settings(omegaconf_absolute_to_relative_paths=True)


def run_cli(kind: type[CLI], arguments: Sequence[str], signals: StopSignals) -> CLI:
    """Make the command line of a kind, which parses and runs the arguments."""
    return kind(
        LoraModule,
        BenchmarkDataModule,
        trainer_class=PlanTrainer,
        subclass_mode_data=True,
        parser_class=Parser,
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
        args=expand(arguments),
        signals=signals,
    )


class LoraCLI(LightningCLI):
    """`fit`, `plan`, `validate` and `test` of a LoraModule on a data module."""

    status = 0
    """Exit status of the command."""

    def __init__(self, *args: Any, signals: StopSignals, **kwargs: Any) -> None:
        self.signals = signals
        self.continuation: ResumePoint | None = None
        super().__init__(*args, **kwargs)

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """List the commands and the arguments that the command line does not set."""
        return {
            "fit": {"model", "train_dataloaders", "val_dataloaders", "datamodule"},
            "plan": {"model", "datamodule"},
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

    def _parse_ckpt_path(self) -> None:
        """Look for the checkpoint before a model is loaded, and read it once."""
        settings = self.config[self.config.subcommand]
        if settings.get("ckpt_path") is None:
            return
        runs = Path(settings.output.root) / settings.output.name
        self.continuation = find_resume_point(str(settings.ckpt_path), runs, settings.model.method)
        found = self.continuation
        settings.ckpt_path = None if found is None else str(found.checkpoint)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the sections `init` and `output`, and one seed for everything."""
        parser.add_argument(
            "--init",
            type=LoraOneInit | LoraGaInit | PissaInit | None,
            default=None,
            help="The callback that gives the adapter its start, such as LoraOneInit; null keeps "
            "PEFT's (lora_A random, lora_B zero).",
        )
        parser.add_class_arguments(OutputSettings, "output")
        parser.link_arguments("seed_everything", "data.init_args.seed")

    def _settings(self) -> str:
        """Return the resolved configuration as YAML."""
        return str(
            self._parser(self.subcommand).dump(self.config[self.subcommand], skip_unset=False)
        )

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Make the trainer with the run's loggers and the project's callbacks."""
        strategy = self._get(self.config_init, "trainer")["strategy"]
        if isinstance(strategy, FSDPStrategy) or str(strategy).startswith("fsdp"):
            raise InputError(
                f"trainer.strategy is {strategy!r}, which is FSDP1: give --config strategies/fsdp.yaml, which "
                "is FSDP2, instead"
            )
        init = self._get(self.config_init, "init")
        output = self._get(self.config_init, "output")
        extra: list[Callback] = []
        seed = self._get(self.config, "seed_everything")
        if self._get(self.config_init, "trainer")["enable_progress_bar"] is not False:
            extra.append(TQDMProgressBar() if on_terminal() else PlainProgress())
        own = self._get(self.config_init, "trainer")["logger"]
        kwargs["logger"] = own
        if self.subcommand == "fit":
            dry = self._get(self.config_init, "trainer")["fast_dev_run"]
            going_on = self.continuation
            folder, wandb_id = (
                (None, None) if going_on is None else (going_on.folder, going_on.wandb_id)
            )
            method = self._get(self.config, "model")["method"]
            task = getattr(self._get(self.config_init, "data"), "task_name", None)
            about = (task, (method, f"seed {seed}"))
            loggers = [] if dry else make_loggers(output, folder, wandb_id, *about)
            given = [] if own in (None, True, False) else own if isinstance(own, list) else [own]
            kwargs["logger"] = loggers + given or False
            extra += [
                AdaLoraPruning(),
                MidEpochResume(seed, folder is not None),
                ScoreAt("zero_shot"),
            ]
            if init is not None:
                extra += [init, ScoreAt("after_init")]
            else:
                extra.append(ScoreAt("after_init", same_as="zero_shot"))
            checkpoints = Checkpoints(output.checkpoint_every_n_steps)
            keeps = self._get(self.config_init, "trainer")["enable_checkpointing"] is not False
            preemption = Preemption(self.signals, checkpoints.save if keeps else None)
            final = ScoreAt("final", between_batches=preemption.stop_if_asked)
            extra += [final, BenchmarkResults(), RunReport(seed), preemption]
            extra += [checkpoints] if keeps else []
        else:
            extra.append(BenchmarkResults(self._test_folder(output), output))
            if own is None:
                kwargs["logger"] = False
        plugins = self._get(self.config_init, "trainer")["plugins"] or []
        plugins = plugins if isinstance(plugins, list) else [plugins]
        if not any(isinstance(plugin, CheckpointIO) for plugin in plugins):
            kwargs["plugins"] = [*plugins, CheckpointFiles()]
        trainer_config = {**self._get(self.config_init, "trainer", default={}), **kwargs}
        try:
            if self.subcommand == "plan":
                trainer: Trainer = plan_trainer(trainer_config, init)
                check_precision(trainer)
                return trainer
            trainer = self._instantiate_trainer(trainer_config, extra)
            check_trainer(trainer)
        except (ValueError, ImportError, MisconfigurationException) as error:
            if self.subcommand == "fit" and self.continuation is None:
                remove_unused_folder(loggers)
            if isinstance(error, InputError):
                raise
            raise InputError(f"the settings in trainer cannot be used: {error}") from error
        install_setup_checks(trainer.strategy, self._settings())
        return trainer

    def _test_folder(self, output: OutputSettings) -> Path:
        """Return where a test keeps answers: the run's folder, or that of the experiment's name."""
        model = self._get(self.config, "model")
        trained = Path(model.get("adapter_path") or model["name"])
        folder = RunFolder(trained.parent)
        if trained in (folder.adapter, folder.model) and folder.config.is_file():
            return folder.path
        return Path(output.root) / output.name

    def after_plan(self) -> None:
        """Let the exit status say whether the run fits."""
        trainer: Any = self.trainer
        self.status = 0 if trainer.fits else 1
