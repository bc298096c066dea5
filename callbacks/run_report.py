"""Leave a finished run's folder complete: record, adapter, plots, and the same in W&B."""

import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from app.adapters import lora_pairs, save_adapter
from app.errors import InputError
from app.plots import read_metrics, write_plots
from app.processes import sum_over_processes
from app.run_folder import ADAPTER_FOLDER, CONFIG_FILE, SUMMARY_FILE


class RunReport(Callback):
    """Time the training; at the end write summary.json, adapter/, plots, and tell W&B.

    Args:
        seed: The run's seed, for the record.
    """

    def __init__(self, seed: int | None = None) -> None:
        self.seed = seed
        self._start = self._paused = self._pause = 0.0
        self._samples = 0
        self._counts: list[torch.Tensor] = []
        self._first_step = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self._start = time.perf_counter()
        self._first_step = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count the samples."""
        self._counts.append((batch["index"] >= 0).sum())  # without padding rows

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock while validating."""
        self._pause = time.perf_counter()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Run the clock again."""
        self._paused += time.perf_counter() - self._pause

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Record how long training took, before the final scores."""
        seconds = time.perf_counter() - self._start - self._paused
        if self._counts:
            self._samples += int(sum_over_processes(torch.stack(self._counts).sum()))
        pl_module.record.train = {
            "steps": trainer.global_step - self._first_step,
            "seconds": seconds,
            "samples": self._samples,
            "samples_per_second": self._samples / seconds,
        }

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the folder."""
        self._write(trainer, pl_module)

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Remove the folder of a run that a wrong setting ended before anything was measured."""
        measured = pl_module.record.metrics  # type: ignore[union-attr]
        if isinstance(exception, InputError) and trainer.loggers and not measured:
            folder = Path(str(trainer.loggers[0].log_dir))
            config = folder / CONFIG_FILE
            if folder.is_dir() and set(folder.iterdir()) <= {config}:
                config.unlink(missing_ok=True)
                folder.rmdir()

    @rank_zero_only
    def _write(self, trainer: Trainer, pl_module: Any) -> None:
        record = pl_module.record
        if not trainer.loggers:  # trainer.fast_dev_run logs nowhere
            rank_zero_info(f"\n{record.score_table()}")
            return
        folder = Path(str(trainer.loggers[0].log_dir))
        record.seed = self.seed
        record.data = trainer.datamodule.describe()  # type: ignore[attr-defined]
        for logger in trainer.loggers:
            logger.save()
        if lora_pairs(pl_module.model):
            save_adapter(pl_module.model, folder / ADAPTER_FOLDER, pl_module.base_name)
            pl_module.tokenizer.save_pretrained(str(folder / ADAPTER_FOLDER))
        layers = record.init.get("layers", {})
        plots = write_plots(folder, read_metrics(folder / "metrics.csv"), record.metrics, layers)
        record.write(folder / SUMMARY_FILE)
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                _tell_wandb(logger, record.metrics, layers, plots)
        rank_zero_info(f"\n{record.score_table()}\n\nrun folder: {folder}")


def _tell_wandb(
    logger: WandbLogger,
    metrics: dict[str, dict[str, float]],
    layers: dict[str, dict[str, Any]],
    plots: list[Path],
) -> None:
    for moment, scores in metrics.items():
        for name, value in scores.items():
            logger.experiment.summary[f"{moment}/{name}"] = value
    if layers:
        rows = [
            [name, i + 1, value, values["captured_energy"]]
            for name, values in layers.items()
            for i, value in enumerate(values["singular_values"])
        ]
        columns = ["layer", "index", "singular_value", "captured_energy"]
        logger.log_table("init/spectrum", columns=columns, data=rows)
    for plot in plots:
        logger.log_image(f"plots/{plot.stem}", [str(plot)])
