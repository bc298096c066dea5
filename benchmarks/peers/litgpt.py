"""litgpt's LoRA fine-tuning, with its own model code and loop, on given rows in their order.

python -m benchmarks.peers.litgpt TASK.json
"""

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from litgpt.args import EvalArgs, TrainArgs
from litgpt.data import DataModule
from litgpt.data.base import get_sft_collate_fn
from litgpt.finetune import lora
from litgpt.prompts import Default
from litgpt.utils import chunked_cross_entropy
from torch.utils.data import DataLoader

from benchmarks.peers.turns import Turns, read_rows

MODEL = "SmolLM2-135M-Instruct"  # litgpt's name of the model
MANY = 10**6  # epochs: the benchmark says when to stop


class TurnLoader(DataLoader):
    """Give out an epoch a turn; the loop asks for more once it has taken the last step."""

    turns: Turns

    def __iter__(self) -> Iterator[Any]:
        """Yield the batches of one turn."""
        self.turns.begin()
        yield from super().__iter__()
        self.turns.end()


class Rows(DataModule):
    """Serve rows of token ids."""

    def __init__(self, rows: list[dict[str, Any]], batch_size: int, turns: Turns) -> None:
        super().__init__()
        self.prompt_style = Default()
        self.rows = [
            {
                **{name: torch.tensor(ids) for name, ids in row.items()},
                "token_counts": dict.fromkeys(
                    ("raw", "raw_plus_prompt_template"), len(row["labels"])
                ),
            }
            for row in rows
        ]
        self.batch_size, self.turns = batch_size, turns

    def connect(self, *_: Any, **__: Any) -> None:
        """Take nothing from the loop."""

    def train_dataloader(self) -> TurnLoader:
        """Return the rows in their order."""
        loader = TurnLoader(self.rows, self.batch_size, collate_fn=get_sft_collate_fn())
        loader.turns = self.turns
        return loader

    def val_dataloader(self) -> DataLoader:
        """Return one row, which the loop scores before it begins."""
        return DataLoader(self.rows[:1], 1, collate_fn=get_sft_collate_fn())


def converted(folder: Path, target: Path) -> Path:
    """Copy a model's folder, with litgpt's own files beside the weights."""
    if not target.exists():
        shutil.copytree(folder, target)
        # In a process of its own, whose memory is not measured.
        program = [sys.executable, "-m", "litgpt", "convert_to_litgpt"]
        subprocess.run(
            [*program, str(target), "--model_name", MODEL], check=True, stdout=sys.stderr
        )
    return target


def checked_fit(turns: Turns, fit: Any, check: list[int]) -> Any:
    """Return `fit` that first computes the loss of the compared batch as it does itself."""

    def run(**given: Any) -> Any:
        data, model = given["data"], given["model"]

        def first_pass() -> torch.Tensor:
            batch = get_sft_collate_fn()([data.rows[i] for i in check])
            logits = model(batch["input_ids"], lm_head_chunk_size=128)
            logits[-1] = logits[-1][..., :-1, :]
            loss = chunked_cross_entropy(logits, batch["labels"][..., 1:])
            given["fabric"].backward(loss)
            given["optimizer"].zero_grad()
            return loss.detach()

        turns.loaded(model)
        turns.ready(first_pass)
        return fit(**given)

    return run


def main(task: Path) -> None:
    """Train for ever, an epoch at a time."""
    turns = Turns()
    settings, rows = read_rows(task)
    torch.set_num_threads(settings["threads"])
    output, size = Path(settings["output"]), settings["batch_size"]
    lora.fit = checked_fit(turns, lora.fit, settings["check"])
    lora.setup(
        converted(Path(settings["model"]), output.with_name("litgpt")),
        output,
        precision="32-true",
        lora_r=settings["r"],
        lora_alpha=settings["lora_alpha"],
        lora_dropout=0.0,
        lora_query=True,
        lora_key=True,
        lora_value=True,
        lora_projection=True,
        lora_mlp=True,
        data=Rows(rows, size, turns),
        train=TrainArgs(
            save_interval=None,
            log_interval=settings["log_every_n_steps"],
            global_batch_size=size,
            micro_batch_size=size,
            lr_warmup_steps=1,
            epochs=MANY,
        ),
        eval=EvalArgs(interval=MANY, max_new_tokens=1, max_iters=1),
        optimizer={
            "class_path": "torch.optim.AdamW",
            "init_args": {"lr": settings["lr"], "weight_decay": 0.0},
        },
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
