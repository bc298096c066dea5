"""What benchmarks that train many times share: a trainer that writes nothing, and a log to go on from."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer


def bare_trainer(
    steps: int, callbacks: Sequence[Callback] = (), precision: Any = "32-true"
) -> Trainer:
    """Return a trainer of so many steps that logs, shows and saves nothing and validates at no step."""
    return Trainer(
        max_steps=steps,
        callbacks=list(callbacks),
        precision=precision,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        limit_val_batches=0,
        use_distributed_sampler=False,
    )


def options_of(precision: str) -> dict[str, str]:
    """Return how a model is loaded that is trained in a precision.

    In `bf16-mixed` the base is in bfloat16. The fused attention of the CPU is slower in it than plain products,
    mostly in the backward pass.
    """
    if precision != "bf16-mixed":
        return {}
    options = {"dtype": "bfloat16"}
    return options if torch.cuda.is_available() else {**options, "attn_implementation": "eager"}


def read_runs(log: Path) -> list[dict[str, Any]]:
    """Return what is finished, a line each; nothing where there is no log yet."""
    return [json.loads(line) for line in log.read_text().splitlines()] if log.is_file() else []


def append_run(log: Path, run: Mapping[str, Any]) -> None:
    """Add what has been finished."""
    with log.open("a") as stream:
        stream.write(json.dumps(run) + "\n")
