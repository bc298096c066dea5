"""Training progress as plain lines, for log files."""

import time
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar

from app.training.lightning_internals import total_steps
from app.training.protocols import adapted
from app.utils.console import SECONDS_BETWEEN_LINES


class PlainProgress(ProgressBar):
    """Print a line every few seconds of training and after each validation, instead of a bar."""

    def __init__(self) -> None:
        super().__init__()
        self._enabled = True
        self._start = self._last = self._loop_start = 0.0
        self._first_step = 0

    def disable(self) -> None:
        """Stop printing (Lightning calls this on all ranks but the first)."""
        self._enabled = False

    def enable(self) -> None:
        """Print again."""
        self._enabled = True

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self._start = self._last = time.perf_counter()
        self._first_step = trainer.global_step  # of this process: a resumed run does not start at 0

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Print epoch, step and metrics when it is time."""
        now = time.perf_counter()
        total = total_steps(trainer)
        if now - self._last >= SECONDS_BETWEEN_LINES or trainer.global_step == total:
            self._last = now
            elapsed = now - self._start
            made = trainer.global_step - self._first_step
            left = elapsed / max(1, made) * (total - trainer.global_step)
            self._print(
                f"epoch {trainer.current_epoch}, step {trainer.global_step}/{total}"
                f"{self._metrics(trainer, pl_module)}, {elapsed:.0f} s, {left:.0f} s left"
            )

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock of a validation or test."""
        self._loop_start = self._last = time.perf_counter()

    on_test_start = on_validation_start

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Print how far the validation or test is when it is time."""
        now = time.perf_counter()
        if now - self._last >= SECONDS_BETWEEN_LINES:
            self._last = now
            name, sizes = "validation", trainer.num_val_batches
            if trainer.testing:
                name, sizes = "test", trainer.num_test_batches
            done = sum(sizes[:dataloader_idx]) + batch_idx + 1
            speed = adapted(pl_module).scoring.speed()
            self._print(
                f"{name}: {done:.0f}/{sum(sizes):.0f} batches, {now - self._loop_start:.0f} s"
                + (f", {speed}" if speed else "")
            )

    on_test_batch_end = on_validation_batch_end

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the scores."""
        self._print(f"validation at step {trainer.global_step}{self._metrics(trainer, pl_module)}")

    def _metrics(self, trainer: Trainer, pl_module: LightningModule) -> str:
        shown = self.get_metrics(trainer, pl_module)
        numbers = {k: float(v) for k, v in shown.items() if k != "v_num"}  # type: ignore[arg-type]
        return "".join(f", {name} {value:.4f}" for name, value in numbers.items())

    def _print(self, line: str) -> None:
        if self._enabled:
            print(line, flush=True)
