"""`python train.py one_step` as a `fit` that scores steps of the base weights and trains nothing."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import LambdaCallback

from app.cli.untrained_cli import UntrainedCLI, check_writable
from app.commands.one_step.command import Grid
from app.commands.one_step.experiment import Experiment, check
from app.commands.one_step.measurements import Measurements
from app.commands.one_step.report import write_report
from app.distributed.fsdp import Fsdp2Strategy
from app.tracking.run_folder import RunFolder
from app.training.checks import check_new_adapter
from app.training.protocols import adapted, data_of
from app.training.resume_checks import differences
from app.utils.errors import InputError
from app.utils.files import load_yaml, read_yaml
from app.utils.signals import StopSignals
from callbacks.initialization import GradientInit

MEASUREMENTS_FILE = "measurements.jsonl"
MEASURED = (
    *(
        "seed_everything.",
        "model.name.",
        "model.dtype.",
        "model.adapter.",
        "data.",
        "trainer.precision.",
    ),
    *("init.samples.", "init.weighting.", "init.train_mode."),
)
"""Sections and settings, with a dot behind, that all measurements of a folder share."""
FREE = ("data.batch_size", "data.eval_batch_size", "data.num_workers")
"""Those of them that change no score."""


class OneStepCLI(UntrainedCLI):
    """A `fit` that stops before its first step and scores W - eta G instead.

    Args:
        arguments: Options of `fit`.
        grid: The steps.
        target: Folder to write; None for `one_step` beside the runs of the experiment.
        signals: Note a request to stop.
    """

    purpose = "one_step scores an untrained model"

    def __init__(
        self, arguments: Sequence[str], grid: Grid, target: Path | None, signals: StopSignals
    ) -> None:
        self.grid, self.target = grid, target
        super().__init__("fit", arguments, signals)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Make the trainer if the run takes a gradient, in one process, and the folder is its own."""
        init, adapter = self.made.init, self.made.model.adapter
        if not isinstance(init, GradientInit):
            name = "null" if init is None else type(init).__name__
            raise InputError(
                f"init is {name}, which takes no gradient: use --config methods/lora_one.yaml, whose "
                "micro-batches (and samples, without --samples) one_step takes"
            )
        check_new_adapter(type(init).__name__, adapter, self.made.model.adapter_path)
        self.grid = self.grid.completed(init.num_samples, adapter.r)
        output = self.made.output
        self.target = self.target or Path(output.root) / output.name / "one_step"
        _check_folder(self.target, load_yaml(self.config_text))
        trainer = super().instantiate_trainer(**kwargs)
        if trainer.world_size > 1 or isinstance(trainer.strategy, Fsdp2Strategy):
            raise InputError(
                "one_step moves whole weights in one process: set trainer.devices and trainer.num_nodes to 1, "
                "and leave --config strategies/ out"
            )
        return trainer

    def _fit_callbacks(self) -> list[Callback]:
        """List what checks the grid once the rows are there, and scores it once the weights are."""

        def setup(trainer: Trainer, module: LightningModule, stage: str) -> None:
            check(trainer, module, self.grid)

        return [LambdaCallback(setup=setup, on_fit_start=self._score)]

    def _score(self, trainer: Trainer, module: LightningModule) -> None:
        """Measure what is missing, report, and let Lightning train nothing."""
        trainer.should_stop = True
        assert self.target is not None  # from `instantiate_trainer`
        self.target.mkdir(parents=True, exist_ok=True)
        RunFolder(self.target).config.write_text(self.config_text, encoding="utf-8")
        measurements = Measurements(self.target / MEASUREMENTS_FILE)
        Experiment(trainer, module, self.grid, measurements, self.made.init).run()
        about = {
            "model": adapted(module).record.model.model_dump(exclude_unset=True),
            "data": data_of(trainer).describe(),
            "seed": self.config.seed_everything,
        }
        adapter = vars(self.made.model.adapter)
        print(f"\n{write_report(self.target, measurements, self.grid, adapter, about)}")
        print(f"wrote {self.target}", flush=True)


def _check_folder(folder: Path, settings: dict[str, Any]) -> None:
    """Raise InputError if a folder cannot be written, or has what is not measured with these settings."""
    check_writable(folder)
    config = RunFolder(folder).config
    if not config.is_file():
        if folder.exists() and any(folder.iterdir()):
            raise InputError(
                f"--output is {str(folder)!r}, which holds other files: name another folder"
            )
        return
    differ = differences(read_yaml(config, "--output"), settings)
    # Which rows a dropout mask falls on depends on the micro-batches.
    drops = settings["init"]["init_args"].get("train_mode")
    measured = (*MEASURED, "init.micro_batch_size.") if drops else MEASURED
    told = [
        f"{name} {then} (now {now})"
        for name, (then, now) in sorted(differ.items())
        if f"{name}.".startswith(measured) and name not in FREE
    ]
    if told:
        raise InputError(
            f"{folder} holds measurements with other settings: {', '.join(told)}. Give those, or another "
            "--output"
        )
