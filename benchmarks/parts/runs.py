"""What benchmarks that train many times share: a trainer that writes nothing, and a log to go on from."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, Trainer


def bare_trainer(steps: int, callbacks: Sequence[Callback] = ()) -> Trainer:
    """Return a trainer of so many steps that logs, shows and saves nothing and validates at no step."""
    return Trainer(
        max_steps=steps,
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        limit_val_batches=0,
        use_distributed_sampler=False,
    )


def read_runs(log: Path) -> list[dict[str, Any]]:
    """Return what is finished, a line each; nothing where there is no log yet."""
    return [json.loads(line) for line in log.read_text().splitlines()] if log.is_file() else []


def append_run(log: Path, run: Mapping[str, Any]) -> None:
    """Add what has been finished."""
    with log.open("a") as stream:
        stream.write(json.dumps(run) + "\n")
