"""Write what a finished run leaves in its folder: record, adapter, plots, and the same in W&B."""

import platform
import time
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from app.distributed.collectives import largest_over_processes, sum_over_processes
from app.models.adapter_io import save_adapter, save_model
from app.models.loading import base_reference
from app.models.lora import is_adapted
from app.tracking.loggers import remove_unused_folder, run_folder_of
from app.tracking.metrics_table import read_metrics
from app.tracking.model_card import write_run_card
from app.tracking.plots import write_plots
from app.tracking.record import DataRecord, TrainRecord
from app.tracking.wandb_summary import keep_wandb_run, log_run_summary
from app.training.protocols import adapted, data_of
from app.utils.errors import InputError
from app.utils.memory import PeakMemory
from app.utils.signals import Stopped


class RunReport(Callback):
    """Time the training; at the end write summary.json, adapter/ and plots, and log them to W&B.

    Args:
        seed: The run's seed, for the record.
    """

    def __init__(self, seed: int | None = None) -> None:
        self.seed = seed
        self._seconds = 0.0  # of training without validation, until the clock was started
        self._clock: float | None = None  # when it was started; None while it is stopped
        self._samples = 0
        self._steps = 0
        self._counts: list[torch.Tensor] = []
        self._trained = False
        self._memory: PeakMemory | None = None
        self._peak_bytes = 0
        self._device = ""
        self._began = self._ended = 0.0

    def state_dict(self) -> dict[str, Any]:
        """Keep what the parts of an interrupted run add up to."""
        self._count()
        return {
            "seconds": self._now(),
            "samples": self._samples,
            "steps": self._steps,
            "peak_bytes": self._peak_bytes,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Add to what the interrupted run has done."""
        self._seconds, self._samples = state_dict["seconds"], state_dict["samples"]
        self._steps = state_dict["steps"]
        self._peak_bytes = state_dict.get("peak_bytes", 0)

    def _now(self) -> float:
        running = 0.0 if self._clock is None else time.perf_counter() - self._clock
        return self._seconds + running

    def _count(self) -> None:
        if self._counts:
            self._samples += int(sum_over_processes(torch.stack(self._counts).sum()))
            self._counts.clear()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock, and watch the memory."""
        device = pl_module.device
        on_gpu = device.type == "cuda"
        self._device = torch.cuda.get_device_name(device) if on_gpu else device.type
        self._memory = PeakMemory(device)
        self._memory.__enter__()
        self._clock = time.perf_counter()
        self._began = time.time()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count the samples, and read the clock."""
        self._counts.append((batch["index"] >= 0).sum())  # without padding rows
        self._steps = trainer.global_step
        self._trained = True
        pl_module.log("train/seconds", self._now())

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock while validating."""
        self._seconds, self._clock = self._now(), None

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Run the clock again."""
        self._clock = time.perf_counter()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Record how long training took and what it needed, before the final scores."""
        self._seconds, self._clock = self._now(), None
        self._ended = time.time()
        self._count()
        if self._memory is not None:
            self._memory.__exit__(None, None, None)
            peak = largest_over_processes(self._memory.peak_bytes, pl_module.device)
            self._peak_bytes = max(self._peak_bytes, peak)

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Remove the folder of a run that ended before anything was measured."""
        if isinstance(exception, InputError | Stopped) and not adapted(pl_module).record.metrics:
            remove_unused_folder(trainer.loggers)

    @rank_zero_only
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the folder."""
        module = adapted(pl_module)
        record, folder = module.record, run_folder_of(trainer.loggers)
        if folder is None:  # trainer.fast_dev_run logs nowhere
            rank_zero_info(f"\n{record.score_table()}")
            return
        if not self._trained and folder.summary.is_file():
            rank_zero_info(
                f"the run in {folder} was finished at step {self._steps} already, and stays as it is: raise "
                "trainer.max_steps or trainer.max_epochs to train it further"
            )
            return
        record.train = TrainRecord(
            steps=self._steps,
            seconds=self._seconds,
            samples=self._samples,
            samples_per_second=self._samples / self._seconds if self._seconds else 0.0,
            peak_bytes=self._peak_bytes,
            device=self._device,
            host=platform.node(),
            began=self._began,
            ended=self._ended,
        )
        record.seed = self.seed
        record.data = DataRecord(**data_of(trainer).describe())
        for logger in trainer.loggers:
            logger.save()
        adapter = None
        if is_adapted(module.model):
            adapter = folder.adapter
            base, revision = base_reference(module.source)
            save_adapter(module.model, adapter, base, module.subtracted_factors, revision)
            module.tokenizer.save_pretrained(str(adapter))
        else:
            save_model(module.base, module.tokenizer, folder.model)
        plots = write_plots(
            folder.path, read_metrics(folder.metrics), record.metrics, record.init.layers
        )
        record.write(folder.summary)
        write_run_card(folder, adapter or folder.model)
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                log_run_summary(logger, record, plots, adapter)
                keep_wandb_run(logger, folder)
        rank_zero_info(f"\n{record.score_table()}\n\nrun folder: {folder}")
