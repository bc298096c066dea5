"""Our side of `benchmarks.train_step`: `train.py fit` on given rows in their order.

python -m benchmarks.parts.our_step lora|preconditioned|packed TASK.json [--profile]
"""

import sys
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader

from app.cli.main import main as train
from app.training.step_mean import StepMean
from benchmarks.parts.limit import print_limit
from benchmarks.peers.turns import Turns, read_rows
from data_modules.rows import PaddedRows, TextRow
from data_modules.text import TextDataModule

MANY = 10**6  # epochs: the benchmark says when to stop
PROFILE = "--profile"


class GivenRows(TextDataModule):
    """Serve the texts of a task, in their order.

    Args:
        path: The task's file.
        **options: See `TextDataModule`.
    """

    task_name = "given_rows"
    splits = ("train",)

    def load(self) -> dict[str, list[TextRow]]:
        """Return the texts."""
        settings, _ = read_rows(Path(str(self.path)))
        return {"train": [TextRow(*text) for text in settings["texts"]]}

    def train_dataloader(self) -> DataLoader:
        """Return the rows in their order, or packed; their tokens must be those that the others get."""
        encoded = self.encoded("train")
        _, rows = read_rows(Path(str(self.path)))
        assert [[*row.prompt_ids, *row.answer_ids] for row in encoded] == [
            row["input_ids"] for row in rows
        ]
        if self.packing:
            return super().train_dataloader()
        return DataLoader(PaddedRows(encoded), self.batch_size, collate_fn=self.encoder.collate)


class TakeTurns(Callback):
    """Compute the loss of the compared batch, then wait before each epoch; or profile one epoch."""

    def __init__(self) -> None:
        self.profile = PROFILE in sys.argv
        if not self.profile:
            self.turns = Turns()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Report the loss of the compared batch."""
        module: Any = pl_module
        data: Any = trainer.datamodule
        settings, _ = read_rows(Path(data.path))
        rows = PaddedRows(data.encoded("train"))
        batch = data.encoder.collate([rows[i] for i in settings["check"]])

        def first_pass() -> Tensor:
            loss = module.training_step(batch, 0)
            loss.backward()
            module.zero_grad()
            module._step_mean = StepMean()
            return loss.detach()

        if self.profile:
            first_pass()
        else:
            self.turns.loaded(module)
            self.turns.ready(first_pass)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Wait for the turn."""
        if self.profile:
            self.profiler = torch.profiler.profile().__enter__()
        else:
            self.turns.begin()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End it."""
        if not self.profile:
            self.turns.end()
            return
        self.profiler.__exit__(None, None, None)
        table = self.profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=20)
        print(table)
        module: Any = pl_module
        print_limit(module, next(iter(trainer.train_dataloader)))
        trainer.should_stop = True


def arguments(method: str, task: Path) -> list[str]:
    """Return the command line of `train.py`."""
    settings, rows = read_rows(task)
    given: dict[str, Any] = {
        "trainer.max_steps": -1,
        "trainer.max_epochs": MANY,
        "trainer.accelerator": "cpu",
        "trainer.enable_checkpointing": False,
        "trainer.log_every_n_steps": settings["log_every_n_steps"],
        "trainer.callbacks+": "benchmarks.parts.our_step.TakeTurns",
        "model.name": settings["model"],
        "model.attn_implementation": "sdpa",
        "model.adapter.r": settings["r"],
        "model.adapter.lora_alpha": settings["lora_alpha"],
        "model.adapter.use_rslora": False,
        "model.adapter.lora_dropout": 0.0,
        "model.optimizer.lr": settings["lr"],
        "model.lr_scheduler_type": "constant",
        "data": "benchmarks.parts.our_step.GivenRows",
        "data.path": task,
        "data.batch_size": settings["batch_size"],
        "data.validation_size": 0,
        "data.max_length": settings["max_length"],
        "data.chat_template": settings["chat_template"],
        "output.root": settings["output"],
        "output.wandb": "disabled",
    }
    overlays = ["--config", "quickstart.yaml", "--config", "methods/lora.yaml"]
    if method == "preconditioned":
        given["model.optimizer"] = "PreconditionedAdamW"
    if method == "packed":
        # Packed rows of a batch, for about as many tokens.
        tokens = sum(len(row["labels"]) for row in rows) * settings["batch_size"] / len(rows)
        given["data.packing"] = True
        given["data.batch_size"] = max(1, round(tokens / settings["max_length"]))
    # A class comes before its arguments.
    ordered = sorted(given.items(), key=lambda item: item[0] not in ("data", "model.optimizer"))
    return ["fit", *overlays, *(f"--{name}={value}" for name, value in ordered)]


if __name__ == "__main__":
    method, task = sys.argv[1], Path(sys.argv[2])
    torch.set_num_threads(read_rows(task)[0]["threads"])
    sys.exit(train(arguments(method, task)))
