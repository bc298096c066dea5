"""Run commands of the project on the processes that torchrun starts, and keep what tests compare.

    torchrun --nproc_per_node 2 -m tests.support.worker JOBS.json

JOBS.json is a list of {"argv": [...], "keep": FOLDER}; all jobs run in one start of the processes, since
importing Lightning takes longer than a tiny run. FOLDER gets `gradients_RANK.pt` (this process's sums, as the
mean over tokens), `factors_RANK.pt` (after the initialization) and `trained_RANK.pt`.

A job may have {END: [RANK, MOMENT, TIMES]}: what happens to that process when it comes to the moment for the
TIMES-th time. END is `die` (SIGKILL), `hang` (SIGSTOP), `term` (SIGTERM), `usr1` (SIGUSR1), `fail` (its disk is
full) or `stall` (its data loader fails); MOMENT is `weights`, `gradient`, `training`, `checkpoint`, `benchmark`
or `report`. With {"first_reads": true} only the first process may read the weights; {"slow_finish": SECONDS}
is how long the first process takes to finish.
"""

import itertools
import json
import os
import signal
import sys
import time
from pathlib import Path

import torch
from lightning.pytorch import Callback

import app.cli.exit
import app.training.module
import callbacks.run_report
from app.cli.lora_cli import LoraCLI
from app.cli.main import main
from app.distributed.processes import global_rank
from app.evaluation.runner import BenchmarkRunner
from app.initialization.gradient_store import ExactStore, SketchStore
from app.training.module import LoraModule


def keep_from_now_on(folder: Path) -> None:
    """Write what tests compare into a folder, from the runs that follow."""
    folder.mkdir(parents=True, exist_ok=True)
    estimates = ExactStore.estimates

    def watched(store, ranks, scale):
        sums = {name: scale * gradient.total for name, gradient in store.sums.items()}
        torch.save(sums, folder / f"gradients_{global_rank()}.pt")
        return estimates(store, ranks, scale)

    def factors(module):
        pairs = module.lora_pairs()
        return {p.name: (p.lora_A.detach().clone(), p.lora_B.detach().clone()) for p in pairs}

    class Keep(Callback):
        """Writes the factors when the initialization is done and when training is."""

        def on_train_start(self, trainer, pl_module):
            torch.save(factors(pl_module), folder / f"factors_{global_rank()}.pt")

        def on_train_end(self, trainer, pl_module):
            torch.save(factors(pl_module), folder / f"trained_{global_rank()}.pt")

    original = LoraCLI.instantiate_trainer

    def with_keeper(cli, **options):
        trainer = original(cli, **options)
        trainer.callbacks.append(Keep())
        return trainer

    ExactStore.estimates = watched
    LoraCLI.instantiate_trainer = with_keeper


ENDS = {
    "die": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "hang": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "term": lambda: os.kill(os.getpid(), signal.SIGTERM),
    "usr1": lambda: os.kill(os.getpid(), signal.SIGUSR1),
    "fail": lambda: fail(OSError(28, "No space left on device")),
    "stall": lambda: fail(RuntimeError("DataLoader timed out after 5 seconds")),
}


def fail(error: Exception) -> None:
    raise error


def end_at(last, moment: str, times: int) -> None:
    """Call `last` when this process comes to a moment for the given time."""
    owner, name = {
        "weights": (app.training.module, "load_model"),
        "report": (callbacks.run_report.RunReport, "_save"),
        "gradient": (SketchStore, "end_batch"),
        "training": (LoraModule, "on_before_optimizer_step"),
        "checkpoint": (LoraModule, "on_save_checkpoint"),
        "benchmark": (BenchmarkRunner, "ask"),
    }[moment]
    original, come = getattr(owner, name), itertools.count(1)

    def dying(*arguments):
        if next(come) == times:
            last()
        return original(*arguments)

    setattr(owner, name, dying)


def run(jobs: list[dict]) -> None:
    """Run each job; stop at the first that fails."""
    number = int(os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0")))
    shutdown = app.cli.exit.shutdown
    callbacks.run_report.write_plots = lambda *_: []
    untouched = ExactStore.estimates, LoraCLI.instantiate_trainer
    environment = dict(os.environ)
    for job in jobs:
        os.environ.update(environment)  # Lightning removes WORLD_SIZE when a job ends
        ExactStore.estimates, LoraCLI.instantiate_trainer = untouched
        keep_from_now_on(Path(job["keep"]))
        # One process group for all jobs.
        app.cli.exit.shutdown = shutdown if job is jobs[-1] else lambda: None
        if job.get("first_reads") and number > 0:
            app.training.model_building.load_model = None
        for end in ENDS.keys() & job.keys():
            if job[end][0] == number:
                end_at(ENDS[end], *job[end][1:])
        if "slow_finish" in job and number == 0:
            seconds = iter([job["slow_finish"]])  # a W&B run is finished once
            app.cli.exit._finish_wandb = lambda _, left=seconds: time.sleep(next(left, 0))
        status = main(job["argv"])
        if status != 0:
            sys.exit(status)


if __name__ == "__main__":
    run(json.loads(Path(sys.argv[1]).read_text()))
