"""Write what a finished run leaves in its folder: weights and record first, then plots, and the same in W&B.

Nothing is lost once training has ended: what cannot be written is tried again after the final scores; a plot, a
logger or W&B that fails is a warning.
"""

import platform
import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from safetensors import SafetensorError

from app.distributed.collectives import largest_over_processes, sum_over_processes
from app.evaluation.scoring import lower_is_better
from app.models.adapter_io import save_adapter, save_model
from app.models.loading import base_reference
from app.models.lora import is_adapted
from app.tracking.loggers import remove_unused_folder, run_folder_of
from app.tracking.metrics_table import read_metrics
from app.tracking.model_card import write_run_card
from app.tracking.plots import write_plots
from app.tracking.record import RunRecord, TrainRecord
from app.tracking.run_folder import RunFolder
from app.tracking.run_text import finished_text
from app.tracking.tensorboard_summary import log_run_to_tensorboard
from app.tracking.wandb_summary import keep_wandb_run, log_run_summary
from app.training.held_out import data_record
from app.training.protocols import AdaptedModule, adapted, data_of
from app.utils.console import warn_on_failure
from app.utils.errors import InputError, reason
from app.utils.files import atomic_folder, read_json
from app.utils.memory import PeakMemory


class RunReport(Callback):
    """Time the training; at its end write adapter/ and summary.json, and with the final scores all else.

    Args:
        seed: The run's seed, for the record.
    """

    def __init__(self, seed: int | None = None) -> None:
        self.seed = seed
        self._seconds = 0.0  # of training without validation, until the clock was started
        self._clock: float | None = None  # when it was started; None while it is stopped
        self._samples = self._tokens = 0
        self._steps = 0
        self._counts: list[torch.Tensor] = []
        self._trained = False
        self._memory: PeakMemory | None = None
        self._peak_bytes = 0
        self._device, self._host = "", platform.node()
        self._began = self._ended = 0.0
        self._saved = False  # whether the trained weights are in the folder

    def state_dict(self) -> dict[str, Any]:
        """Keep what the parts of an interrupted run add up to, and where and when it has trained."""
        self._count()
        return {
            "seconds": self._now(),
            "samples": self._samples,
            "tokens": self._tokens,
            "steps": self._steps,
            "peak_bytes": self._largest_peak(),
            "device": self._device,
            "host": self._host,
            "began": self._began,
            "ended": self._ended or time.time(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Add to what the interrupted run has done."""
        self._seconds, self._samples = state_dict["seconds"], state_dict["samples"]
        self._steps = state_dict["steps"]
        self._tokens = state_dict.get("tokens", 0)
        self._peak_bytes = state_dict.get("peak_bytes", 0)
        # Those of a part that trains are set again; an earlier version has kept none.
        self._device = state_dict.get("device", "")
        self._host = state_dict.get("host", self._host)
        self._began, self._ended = state_dict.get("began", 0.0), state_dict.get("ended", 0.0)

    def _largest_peak(self) -> int:
        """Return the peak of all parts so far, of the process that needs most; all processes call it."""
        if self._memory is not None:
            peak = largest_over_processes(self._memory.peak_bytes, self._memory.device)
            self._peak_bytes = max(self._peak_bytes, peak)
        return self._peak_bytes

    def _now(self) -> float:
        running = 0.0 if self._clock is None else time.perf_counter() - self._clock
        return self._seconds + running

    def _count(self) -> None:
        if self._counts:
            samples, tokens = sum_over_processes(torch.stack(self._counts).sum(0)).tolist()
            self._samples, self._tokens = self._samples + samples, self._tokens + tokens
            self._counts.clear()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock, and watch the memory."""
        device = pl_module.device
        on_gpu = device.type == "cuda"
        self._device = torch.cuda.get_device_name(device) if on_gpu else device.type
        self._host = platform.node()
        self._memory = PeakMemory(device)
        self._memory.__enter__()
        self._clock = time.perf_counter()
        self._began, self._ended = time.time(), 0.0

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count the samples and tokens, and read the clock."""
        rows = batch["index"] >= 0  # without padding rows
        if "attention_mask" in batch:
            tokens = (batch["attention_mask"] * rows[:, None]).sum()
        else:  # packed rows have no mask, and hardly any padding
            tokens = torch.ones_like(batch["input_ids"]).sum()
        self._counts.append(torch.stack([rows.sum(), tokens]))
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
            self._largest_peak()
            self._memory = None  # the final scores do not count
        folder = run_folder_of(trainer.loggers)
        if folder is not None:
            again = "it is tried again after the final scores. Make room, or allow writing there"
            with warn_on_failure(f"saving the trained weights in {folder}", again):
                self._save(trainer, adapted(pl_module), folder)

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Remove the folder of a run that ended before anything was measured."""
        if not adapted(pl_module).record.metrics:
            remove_unused_folder(trainer.loggers)

    @rank_zero_only
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the folder."""
        module = adapted(pl_module)
        record, folder = module.record, run_folder_of(trainer.loggers)
        if folder is None:  # trainer.fast_dev_run logs nowhere
            rank_zero_info(f"\n{record.score_table()}")
            return
        if not self._trained and _is_scored(folder):
            rank_zero_info(
                f"the run in {folder} was finished at step {self._steps} already, and stays as it is: raise "
                "trainer.max_steps or trainer.max_epochs to train it further"
            )
            return
        try:
            self._save(trainer, module, folder)
        except (OSError, SafetensorError) as error:
            raise InputError(
                f"the run in {folder} is trained, but could not all be saved ({reason(error)}): make room, or "
                "allow writing there; from its checkpoint `--ckpt_path last` goes on"
            ) from error
        self._report(trainer, record, folder)
        rank_zero_info(finished_text(record, folder))

    def _save(self, trainer: Trainer, module: AdaptedModule, folder: RunFolder) -> None:
        """Write the trained weights, once, and the record with the scores that there are."""
        model = module.model
        trained = folder.adapter if is_adapted(model) else folder.model
        if not self._saved:
            with atomic_folder(trained, update=True) as part:
                if is_adapted(model):
                    base, revision = base_reference(module.source)
                    save_adapter(model, part, base, module.subtracted_factors, revision)
                    module.tokenizer.save_pretrained(str(part))
                else:
                    save_model(module.base, module.tokenizer, part)
            self._saved = True
        record = module.record
        record.seed = self.seed
        record.train = TrainRecord(
            steps=self._steps,
            seconds=self._seconds,
            samples=self._samples,
            samples_per_second=self._samples / self._seconds if self._seconds else 0.0,
            tokens=self._tokens,
            tokens_per_second=self._tokens / self._seconds if self._seconds else 0.0,
            peak_bytes=self._peak_bytes,
            device=self._device,
            host=self._host,
            began=self._began,
            ended=self._ended,
        )
        record.data = data_record(data_of(trainer))
        asked = data_of(trainer).prepare_benchmarks("validation")
        record.lower_is_better = lower_is_better(asked)
        record.write(folder.summary)
        with warn_on_failure("writing the model card"):
            write_run_card(folder, trained)

    def _report(self, trainer: Trainer, record: RunRecord, folder: RunFolder) -> None:
        """Draw and log the run; each of these is a warning if it fails."""
        for logger in trainer.loggers:
            with warn_on_failure(f"{type(logger).__name__}.save()"):
                logger.save()
        plots: list[Path] = []
        with warn_on_failure("drawing the plots"):
            curves = read_metrics(folder.metrics)
            plots += write_plots(folder.path, curves, record.metrics, record.init.layers)
        adapter = folder.adapter if folder.adapter.is_dir() else None
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                with warn_on_failure("logging the finished run to W&B"):
                    if not logger.experiment.disabled:
                        log_run_summary(logger, record, plots, adapter)
                        keep_wandb_run(logger, folder)
            if isinstance(logger, TensorBoardLogger):
                with warn_on_failure("logging the finished run to TensorBoard"):
                    log_run_to_tensorboard(logger, record, plots)


def _is_scored(folder: RunFolder) -> bool:
    """Return whether a folder's record has the final scores, which are measured when training has ended."""
    return "final" in (read_json(folder.summary) or {}).get("metrics", {})
