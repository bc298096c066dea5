"""transformers' Trainer with PEFT, or TRL's SFTTrainer, on given rows in their order.

python -m benchmarks.peers.trainer trainer|trl TASK.json
"""

import sys
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from benchmarks.peers.turns import Turns, read_rows

MANY = 10**6  # epochs: the benchmark says when to stop


class TakeTurns(TrainerCallback):
    """Compute the loss of the compared batch, then wait before each epoch."""

    def __init__(self, turns: Turns, check: list[int]) -> None:
        self.turns, self.check = turns, check
        self.trainer: Trainer

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """Report the loss of the compared batch."""
        self.turns.loaded(self.trainer.model)
        self.turns.ready(self.first_pass)

    def first_pass(self) -> torch.Tensor:
        """Compute the loss of the compared batch and its gradients, and drop these."""
        rows = [self.trainer.train_dataset[i] for i in self.check]
        batch = self.trainer.data_collator(rows)
        tokens = (batch["labels"] != -100).sum()
        loss = self.trainer.training_step(self.trainer.model, batch, num_items_in_batch=tokens)
        self.trainer.model.zero_grad()
        return loss

    def on_epoch_begin(self, *_: Any, **__: Any) -> None:
        """Wait for the turn."""
        self.turns.begin()

    def on_epoch_end(self, *_: Any, **__: Any) -> None:
        """End it."""
        self.turns.end()


def main(kind: str, task: Path) -> None:
    """Train for ever, an epoch at a time."""
    turns = Turns()
    settings, rows = read_rows(task)
    torch.set_num_threads(settings["threads"])
    tokenizer = AutoTokenizer.from_pretrained(settings["model"], padding_side="right")
    model = AutoModelForCausalLM.from_pretrained(
        settings["model"], dtype=torch.float32, attn_implementation="sdpa"
    )
    lora = LoraConfig(
        r=settings["r"], lora_alpha=settings["lora_alpha"], target_modules="all-linear"
    )
    arguments = {
        "output_dir": settings["output"],
        "per_device_train_batch_size": settings["batch_size"],
        "num_train_epochs": MANY,
        "learning_rate": settings["lr"],
        "lr_scheduler_type": "constant",
        "train_sampling_strategy": "sequential",
        "logging_steps": settings["log_every_n_steps"],
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "max_grad_norm": 0.0,
        "dataloader_pin_memory": False,
    }
    common = {"train_dataset": Dataset.from_list(rows), "processing_class": tokenizer}
    callback = TakeTurns(turns, settings["check"])
    if kind == "trl":
        from trl import SFTConfig, SFTTrainer

        trainer: Trainer = SFTTrainer(
            model,
            SFTConfig(**arguments, max_length=None),
            peft_config=lora,
            callbacks=[callback],
            **common,
        )
    else:
        trainer = Trainer(
            get_peft_model(model, lora),
            TrainingArguments(**arguments),
            DataCollatorForSeq2Seq(tokenizer),
            callbacks=[callback],
            **common,
        )
    callback.trainer = trainer
    trainer.train()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
