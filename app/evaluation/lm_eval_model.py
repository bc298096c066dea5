"""Hand a model in memory to lm-evaluation-harness, which must be installed to import this file."""

import copy
import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch.utilities.seed import isolate_rng
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM

from app.distributed.collectives import from_first_process, gather_numbers
from app.distributed.processes import global_rank, world_size
from app.models.protocols import ScoredModel

KEPT = ("doc_id", "filter", "target", "filtered_resps")
"""What is kept of each row, beside its metrics; prompts would be long."""


class ModelInMemory(HFLM):
    """The harness's own model class around a model that is loaded, on each process its share of the rows."""

    def __init__(self, model: ScoredModel, batch_size: int) -> None:
        kind = model.device.type
        # The harness would switch the precision of the trainer off.
        autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        super().__init__(
            model.model,
            # It sets a padding token where there is none.
            tokenizer=copy.deepcopy(model.tokenizer),
            batch_size=batch_size,
            mixed_precision_dtype=autocast,
        )
        self._rank, self._world_size = global_rank(), world_size()

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return every process's number."""
        return torch.tensor(gather_numbers(int(tensor), self.device))

    def barrier(self) -> None:
        """Do nothing: the next `all_gather` waits for all processes."""


def evaluate_task(
    model: ScoredModel, task: str, manager: Any, batch_size: int, **options: Any
) -> dict[str, Any]:
    """Return the harness's `results` of a task, and `samples`: what it read in each row's outputs.

    Args:
        model: Runs on all processes together, each with a share of the rows.
        task: Its name, which `manager` knows.
        manager: The harness's TaskManager.
        batch_size: Requests of a batch.
        options: Of `simple_evaluate`.
    """
    # The harness seeds every generator.
    with isolate_rng(), _in_this_process():
        found = simple_evaluate(
            ModelInMemory(model, batch_size), tasks=[task], task_manager=manager, **options
        )
    return from_first_process(lambda: _kept(found))


def _kept(found: Any) -> dict[str, Any]:
    samples = {
        task: [{k: row[k] for k in (*KEPT, *row["metrics"])} for row in rows]
        for task, rows in found["samples"].items()
    }
    plain = json.loads(json.dumps(samples, default=str))
    return {"results": found["results"], "samples": plain}


@contextmanager
def _in_this_process() -> Iterator[None]:
    """Log the harness's errors alone, and keep it from forking, which may hang a process that has threads."""
    logger = logging.getLogger("lm_eval")
    level, before = logger.level, os.environ.get("DISABLE_MULTIPROC")
    logger.setLevel(logging.ERROR)
    os.environ["DISABLE_MULTIPROC"] = "1"  # its bootstrap draws the same samples then
    try:
        yield
    finally:
        logger.setLevel(level)
        os.environ.pop("DISABLE_MULTIPROC")
        if before is not None:
            os.environ["DISABLE_MULTIPROC"] = before
