"""Twelve methods on three tasks, three seeds, each method at its own best learning rate.

    python -m benchmarks.comparison --data ../shared/data --output runs/comparison
    python train.py report runs/comparison/reviews --score task_loss --reference rslora
    python train.py report runs/comparison/code_alpaca --score loss --reference rslora

SmolLM2-135M, rank 8, every update scaled by lora_alpha / sqrt(r), the base in bfloat16 and the factors in
float32 (--precision). For each task and method: four learning rates on seed 0, and further ones until the best
has a neighbour on either side; then the other seeds at these three, and again further ones. Rates are compared
by the task loss of validation rows, on Code Alpaca by the loss of the answers; a method's best is then tested,
with each seed. Every run is a folder of `fit` below OUTPUT/TASK/cells, which `report` reads; what is finished
there is not run again. A run is a process that has its libraries from one that imports them once.
"""

import argparse
import math
import multiprocessing
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import BoundedSemaphore

from app.cli.main import main as lora_one
from app.commands.compare.cells import Cell, CellState, Variant, grid, state_of
from app.tracking.record import RunRecord
from app.tracking.run_folder import RunFolder
from app.utils.text import rate_text
from benchmarks.parts.runs import options_of

METHODS = (
    *("rslora", "lora_plus", "p_lora", "lora_pro", "reflora", "olora", "pissa", "loram"),
    *("loram_one", "lora_ga", "lora_one", "lora_one_adamw"),
)
RATES = (1e-6, 3e-6, 1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
FIRST = RATES[4:8]
TASKS = {
    "reviews": [
        "--config=reviews_smollm2.yaml",
        *("--data.validation_size=120", "--data.test_size=400"),
    ],
    "sst2": [
        *("--config=glue_sst2.yaml", "--config=models/smollm2.yaml"),
        *("--data.batch_size=8", "--data.validation_size=200"),
    ],
    "code_alpaca": [
        *("--config=code_alpaca_smollm2.yaml", "--data.evals=[]"),
        *("--data.batch_size=4", "--data.keep_below=160"),
        *("--data.validation_size=60", "--data.test_size=200"),
    ],
}
FILES = {"sst2": "glue", "code_alpaca": "code/code_alpaca_2k.json"}
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["app.cli.lora_cli", "transformers.models.llama", "pandas"])
OPTIONS = {
    # As large a step as its control's, loram_one; what `auto` finds differs from seed to seed.
    "lora_one": ["--init.gamma=128"],
    "lora_one_adamw": ["--init.gamma=128"],
    "pissa": ["--init.niter=16"],  # an exact SVD of all layers takes longer than the run
    "reflora": ["--model.optimizer.init_args.warmup_steps=3"],  # its 100 would be the whole run
}


def logged(log: Path, arguments: Sequence[str]) -> None:
    """Run a command of the project in this process, print into the log, and end with its exit status."""
    with log.open("ab") as stream:
        for descriptor in (1, 2):
            os.dup2(stream.fileno(), descriptor)
    raise SystemExit(lora_one(arguments))


class Task:
    """The runs of one task.

    Args:
        name: Of `TASKS`.
        given: The options of this script.
        free: Acquired by each process while it runs.
    """

    def __init__(self, name: str, given: argparse.Namespace, free: BoundedSemaphore) -> None:
        self.name, self.free, self.seeds = name, free, given.seeds
        self.folder = given.output / name / "cells"
        self.options = [
            f"--trainer.max_steps={given.steps}",
            f"--trainer.precision={given.precision}",
            *(f"--model.{key}={value}" for key, value in options_of(given.precision).items()),
            *("--trainer.val_check_interval=null", "--trainer.limit_val_batches=0"),
            "--data.eval_batch_size=32",
            *("--output.wandb=disabled", f"--output.root={self.folder}", "--ckpt_path=last"),
        ]
        if name in FILES:
            self.options.append(f"--data.path={given.data / FILES[name]}")

    def state(self, cell: Cell) -> CellState:
        """Return how far a run is."""
        return state_of(self.folder / cell.name)

    def loss(self, method: str, rate: float, seeds: Sequence[int]) -> float:
        """Return the mean task loss of the validation rows; infinite where a run did not finish."""
        losses = []
        for seed in seeds:
            run = self.state(Cell(method, rate, seed)).run
            scores = RunRecord.read(RunFolder(run).summary).metrics["final"] if run else {}
            losses.append(scores.get("task_loss", scores.get("loss", math.inf)))
        return sum(losses) / len(losses)

    def run(self, name: str, arguments: Sequence[str]) -> None:
        """Run a command of the project to its end, with its output in the cell's log."""
        folder = self.folder / name
        folder.mkdir(parents=True, exist_ok=True)
        with self.free:
            process = SERVER.Process(target=logged, args=(folder / "cell.log", arguments))
            process.start()
            process.join()
        print(f"{self.name} {arguments[0]} {name}: exit status {process.exitcode}", flush=True)

    def fit(self, cell: Cell) -> None:
        """Train one run unless that is done."""
        if self.state(cell).run is not None:
            return
        settings = [*TASKS[self.name], f"--config=methods/{cell.method}.yaml", *self.options]
        settings += OPTIONS.get(cell.method, [])
        rate = f"--model.optimizer.init_args.lr={rate_text(cell.learning_rate)}"
        own = [rate, f"--seed_everything={cell.seed}", f"--output.name={cell.name}"]
        self.run(cell.name, ["fit", *settings, *own])

    def test(self, cell: Cell) -> None:
        """Test one run unless that is done."""
        state = self.state(cell)
        if state.state == "trained":
            self.run(cell.name, ["test", "--run", str(state.run)])

    def search(self, method: str, rates: Sequence[float], seeds: Sequence[int]) -> int:
        """Train at rates, and at neighbours of the best one until it has both; return the best one's place."""
        tried = list(rates)
        while True:
            with ThreadPoolExecutor(len(tried) * len(seeds)) as pool:
                list(pool.map(self.fit, grid([Variant(method)], tried, seeds)))
            best = RATES.index(min(tried, key=lambda rate: self.loss(method, rate, seeds)))
            missing = [rate for rate in RATES[max(best - 1, 0) : best + 2] if rate not in tried]
            if not missing:
                return best
            tried += missing

    def compare(self, method: str) -> None:
        """Find the method's learning rate, on one seed and then on all, and test it."""
        best = self.search(method, FIRST, self.seeds[:1])
        best = self.search(method, RATES[max(best - 1, 0) : best + 2], self.seeds)
        with ThreadPoolExecutor(len(self.seeds)) as pool:
            list(pool.map(self.test, grid([Variant(method)], [RATES[best]], self.seeds)))


def main() -> None:
    """Run what is missing."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--data", type=Path, required=True, help="folder with glue/ and code/")
    add("--output", type=Path, required=True)
    add("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    add("--methods", nargs="+", default=METHODS)
    add("--seeds", type=int, nargs="+", default=[0, 1, 2])
    add("--steps", type=int, default=30)
    add("--precision", choices=["bf16-mixed", "32-true"], default="bf16-mixed")
    add("--jobs", type=int, default=1, help="processes at once")
    given = parser.parse_args()
    free = BoundedSemaphore(given.jobs)
    tasks = [Task(name, given, free) for name in given.tasks]
    with ThreadPoolExecutor(len(tasks) * len(given.methods)) as pool:
        chains = [pool.submit(task.compare, method) for method in given.methods for task in tasks]
        for chain in chains:
            chain.result()


if __name__ == "__main__":
    main()
