"""Where training ends from first steps of several sizes: fixed gammas, two searches of gamma, one step size.

    python -m benchmarks.starts --data ../shared/data --output docs/starts

For each task and seed: one gradient of SmolLM2-135M (rank 8, alpha 16, rsLoRA), and from it

- `untouched`: LoRA's usual initialization, lora_B = 0, scaled alike;
- `gamma 128`, the paper's for causal models;
- `vocabulary`: the gamma, of 16 to 1024, with the lowest loss over the whole vocabulary on the same rows;
- `auto`: `init.gamma: auto`, by the task's own loss;
- `global`: the same search with `init.scale: global`.

Each start is trained with AdamW from each learning rate, which falls linearly to zero, for 40 steps and anew
for 160; the validation rows, the same for all seeds, choose no gamma and are scored before training and at the
end. Two starts with the same factors are trained once. The base is in bfloat16, the factors in float32, the
products under autocast (--precision). What is finished is a line of OUTPUT/runs.jsonl and is not repeated when
the script is started again; several may share a log, each with tasks or seeds of its own. At the end, or with
--report, it prints a Markdown table, in which each start has the learning rate of its lowest mean loss.
"""

import argparse
import functools
import itertools
import logging
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import seed_everything

from app.initialization.factors import spectral_factors, unit_of
from app.models.adapter_config import LoraSettings
from app.training.module import LoraModule
from benchmarks.gamma_search import DEVICE, MODEL, RANK, SAMPLES, Bench, data_module
from benchmarks.parts.runs import append_run, bare_trainer, read_runs

STARTS = ("untouched", "gamma 128", "vocabulary", "auto", "global")
TASKS = ("reviews", "sst2", "mrpc", "gsm8k", "code_alpaca")
BATCH = {"mrpc": 4, "gsm8k": 2, "code_alpaca": 2}  # 8 of all others
HELD_OUT = {"gsm8k": 64, "code_alpaca": 64}  # 200 of all others
STEPS = (40, 160)


class Task:
    """One task with one seed: its gradient, the gamma of each start, and their runs."""

    def __init__(self, bench: Bench, name: str, folder: Path, seed: int) -> None:
        self.bench, self.seed = bench, seed
        self.data = data_module(name, folder, HELD_OUT.get(name, 200), seed)
        self.data.batch_size = BATCH.get(name, 8)
        bench.attach(self.data)
        samples = SAMPLES.get(name, 64)
        self.svds, self.loss = bench.gradient(self.data, samples)
        self.losses = bench.losses(self.data, samples)
        self.before = bench.score(self.data)
        self.gamma = functools.cache(self._gamma)

    def _gamma(self, start: str) -> tuple[str, float | None]:
        """Return the scale and the gamma of a start; None leaves the untouched model."""
        if start == "untouched":
            return "layer", None
        if start.startswith("gamma "):
            return "layer", float(start.removeprefix("gamma "))
        self.bench.install(self.bench.usual)
        if start in ("auto", "global"):
            scale = "layer" if start == "auto" else "global"
            gamma = self.bench.search(self.svds, self.loss, scale, self.losses).gamma
            return (scale if gamma else "layer"), gamma
        return "layer", min((2.0**power for power in range(4, 11)), key=self.vocabulary_loss)

    def vocabulary_loss(self, gamma: float) -> float:
        """Return the training loss of the rows that judge, with the factors of a gamma."""
        self.bench.install([spectral_factors(svd, gamma, None) for svd in self.svds])
        losses = self.losses(label_token_ids=())  # type: ignore[call-arg]
        return float(losses.sums.sum() / losses.counts.sum())

    def train(self, scale: str, gamma: float | None, lr: float) -> dict[str, dict[str, float]]:
        """Train from a start, for each number of steps anew; return the scores by that number."""
        factors = self.bench.usual
        if gamma is not None:
            unit = unit_of(self.svds, scale)
            factors = [spectral_factors(svd, gamma, unit) for svd in self.svds]
        self.bench.install(factors)
        scores = {"0": self.before if gamma is None else self.bench.score(self.data)}
        for steps in STEPS:
            self.bench.install(factors)
            self.fit(lr, steps)
            scores[str(steps)] = self.bench.score(self.data)
        return scores

    def fit(self, lr: float, steps: int) -> None:
        """Train from the factors that are installed."""
        seed_everything(self.seed)
        module = LoraModule(
            MODEL,
            adapter=LoraSettings(r=RANK),
            optimizer=lambda groups: torch.optim.AdamW(groups, lr=lr, weight_decay=0.0),
        )
        module.model = self.bench.model.train()
        bare_trainer(steps, precision=self.bench.precision).fit(module, datamodule=self.data)
        self.bench.model.to(DEVICE)  # the trainer has left it on the CPU


def run(
    bench: Bench, folder: Path, task: str, seed: int, cells: Sequence[tuple[str, float]], log: Path
) -> None:
    """Train the starts of a task and a seed that are not in the log, each from its learning rate."""
    here = {"task": task, "seed": seed, "precision": bench.precision}
    done = [line for line in read_runs(log) if here.items() <= line.items()]
    had = {(line["start"], line["lr"]) for line in done}
    missing = [cell for cell in cells if cell not in had]
    if not missing:
        return
    rows = Task(bench, task, folder, seed)
    for start, lr in missing:
        began = time.perf_counter()
        scale, gamma = rows.gamma(start)
        what = {"scale": scale, "gamma": gamma, "lr": lr}
        same = [line for line in done if what.items() <= line.items()]
        scores = same[0]["scores"] if same else rows.train(scale, gamma, lr)
        line = {**here, "start": start, **what, "scores": scores}
        done.append(line | {"seconds": time.perf_counter() - began})
        append_run(log, done[-1])
        losses = {step: values["task_loss"] for step, values in scores.items()}
        print(task, seed, start, gamma, lr, losses, flush=True)


def summary(runs: Sequence[Mapping[str, Any]], step: int, name: str) -> tuple[float, float]:
    """Return mean and standard error over seeds of a score after some steps."""
    values = [run["scores"][str(step)][name] for run in runs]
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
    return statistics.mean(values), error


def best(runs: Sequence[Mapping[str, Any]], step: int) -> list[Mapping[str, Any]]:
    """Return the runs from the learning rate of the lowest mean task loss after some steps."""
    by_rate = [[run for run in runs if run["lr"] == lr] for lr in {run["lr"] for run in runs}]
    most = max(map(len, by_rate))  # rates are compared where they have all seeds
    whole = [own for own in by_rate if len(own) == most]
    return min(whole, key=lambda own: summary(own, step, "task_loss"))


def row(task: str, start: str, runs: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the table's row of a task and start."""
    gammas = {run["seed"]: f"{run['gamma']:g}" if run["gamma"] else "none" for run in runs}
    cells = [task, start, ", ".join(gammas[seed] for seed in sorted(gammas))]
    several = len({run["lr"] for run in runs}) > 1
    for step in (0, *STEPS):
        chosen = best(runs, step)
        loss = "{:.3f} ± {:.3f}".format(*summary(chosen, step, "task_loss"))
        cells.append(f"{loss} at {chosen[0]['lr']:g}" if step and several else loss)
    if "accuracy" not in runs[0]["scores"]["0"]:
        return [*cells, ""]
    mean, error = summary(chosen, STEPS[-1], "accuracy")
    return [*cells, f"{100 * mean:.1f} ± {100 * error:.1f}"]


def table(runs: Sequence[Mapping[str, Any]]) -> str:
    """Return a Markdown table: task losses and accuracy, a row for each task and start."""
    after = [f"{step} steps" for step in STEPS]
    rows = [["task", "start", "gamma", "before training", *after, f"accuracy, {after[-1]}"]]
    rows.append(["---"] * len(rows[0]))
    for task, start in itertools.product(TASKS, STARTS):
        own = [run for run in runs if (run["task"], run["start"]) == (task, start)]
        rows += [row(task, start, own)] if own else []
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows)


def main() -> None:
    """Run what is missing, then print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder with glue/, gsm8k/, code/")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--tasks", type=lambda text: text.split(","), default=TASKS)
    parser.add_argument("--starts", nargs="+", choices=STARTS, default=STARTS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    rates = [5e-4, 1e-3, 2e-4]
    parser.add_argument("--learning_rates", type=float, nargs="+", default=rates)
    parser.add_argument("--precision", choices=["bf16-mixed", "32-true"], default="bf16-mixed")
    parser.add_argument("--report", action="store_true", help="train nothing more")
    given = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    given.output.mkdir(parents=True, exist_ok=True)
    log = given.output / "runs.jsonl"
    cells = list(itertools.product(given.starts, given.learning_rates))
    bench: Bench | None = None
    for seed in () if given.report else given.seeds:
        for task in given.tasks:
            bench = bench or Bench(given.precision)
            run(bench, given.data, task, seed, cells, log)
    asked = ("precision", [given.precision]), ("seed", given.seeds), ("lr", given.learning_rates)
    runs = read_runs(log)
    print(table([run for run in runs if all(run[name] in values for name, values in asked)]))


if __name__ == "__main__":
    main()
