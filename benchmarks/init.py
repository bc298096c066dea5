"""Time and memory of ways to compute a gradient-based LoRA initialization, on the real SmolLM2-135M.

    OMP_NUM_THREADS=1 python -m benchmarks.init [--samples 64] [--micro_batch_size 8] [--rank 8]
        [--rounds 3] [--contenders lora sketch exact lora_ga authors] [--profile] [--json out.json]

Contenders, over the same micro-batches of movie-review prompts and the same loss, with the LM head
applied to supervised positions only:

    lora     one plain LoRA forward and backward over the batches, as in training: the unit
    sketch   our default: streamed sketch, decompositions, installation
    exact    ours with the whole gradient, decompositions, installation
    lora_ga  PEFT's preprocess_loraga, then get_peft_model with init_lora_weights="lora_ga"
    authors  LoRA-One as first published: the weight gradients of all linear layers through autograd,
             moved out in float32 as each appears, mean of micro-batch means, then for each layer
             torch.svd_lowrank(q=512, niter=16)

Each run has a process of its own, which loads the model, warms up on one row, and then measures the
procedure alone. The first three take turns for `--rounds` rounds and the table shows medians. The
peak is the process's resident memory, as a user meets it; the excess is what lies above the loaded
model. `--profile` prints where the sketch's time goes instead.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
import yaml
from peft import LoraConfig, LoraGAConfig, get_peft_model
from peft.tuners.lora import preprocess_loraga
from torch import Tensor, nn
from transformers import PreTrainedModel

from app.initialization.factors import SVD, spectral_factors
from app.initialization.one_step_gradient import Estimator, one_step_gradients
from app.models.adapter_config import LoraSettings
from app.models.batch import Batch
from app.models.loading import load_model, load_tokenizer
from app.models.lora import add_lora, base_model, install, lora_pairs
from app.models.loss import summed_loss, supervised_logits
from app.models.source import resolve_model
from app.utils.memory import PeakMemory
from benchmarks import history

ROOT = Path(__file__).resolve().parents[1]

GAMMA = 128.0
REPEATED = ("lora", "sketch", "exact")
CONTENDERS = (*REPEATED, "lora_ga", "authors")
LABELS = {
    "lora": "plain LoRA forward + backward (unit)",
    "sketch": "ours, sketch (default)",
    "exact": "ours, exact",
    "lora_ga": "PEFT lora_ga",
    "authors": "the authors' procedure",
}
Procedure = Callable[[Sequence[Batch]], object]


def plain_lora(model: PreTrainedModel, rank: int) -> Procedure:
    """Return one pass of LoRA training without the optimizer."""
    wrapped = add_lora(model, LoraSettings(r=rank)).train()

    def run(batches: Sequence[Batch]) -> None:
        for batch in batches:
            output = supervised_logits(wrapped, base_model(wrapped), batch)
            (summed_loss(output) / output.labels.numel()).backward()
            wrapped.zero_grad()

    return run


def ours(model: PreTrainedModel, rank: int, estimator: Estimator) -> Procedure:
    """Return our whole pass, from batches to installed factors."""
    wrapped = add_lora(model, LoraSettings(r=rank)).train()
    pairs = lora_pairs(wrapped)

    def run(batches: Sequence[Batch]) -> None:
        result = one_step_gradients(wrapped, model, pairs, batches, rank, estimator)
        for pair in pairs:
            U, S, V = result.estimates[pair.name].svd
            factors = spectral_factors(SVD(U[:, :rank], S[:rank], V[:, :rank]), GAMMA)
            install(pair, factors.lora_A, factors.lora_B)

    return run


def mean_loss_backward(model: PreTrainedModel, batch: Batch) -> None:
    """Backpropagate the token mean over one micro-batch."""
    output = supervised_logits(model, model, batch)
    (summed_loss(output) / output.labels.numel()).backward()


def peft_lora_ga(model: PreTrainedModel, rank: int) -> Procedure:
    """Return PEFT's LoRA-GA: gradients of all target weights, then wrapping, which decomposes them."""
    targets = [name for name, _ in linear_layers(model)]

    def run(batches: Sequence[Batch]) -> None:
        config = LoraConfig(
            r=rank,
            lora_alpha=16,
            use_rslora=True,
            target_modules=targets,
            init_lora_weights="lora_ga",
            lora_ga_config=LoraGAConfig(),
        )

        def train_step() -> None:
            for batch in batches:
                mean_loss_backward(model, batch)

        preprocess_loraga(model, config, train_step)
        if len(batches) > 1 or len(batches[0]["labels"]) > 1:
            get_peft_model(model, config)

    return run


def authors_procedure(model: PreTrainedModel, rank: int) -> Procedure:
    """Return the procedure of LoRA-One's first publication (arXiv:2502.01235, its code written anew)."""
    layers = linear_layers(model)

    def run(batches: Sequence[Batch]) -> dict[str, tuple[Tensor, Tensor]]:
        total: dict[str, Tensor] = {}

        def move_out(name: str) -> Callable[[Tensor], None]:
            def hook(weight: Tensor) -> None:
                assert weight.grad is not None
                gradient = weight.grad.to("cpu", torch.float32)
                total[name] = total[name].add_(gradient) if name in total else gradient
                weight.grad = None

            return hook

        model.train().requires_grad_(False)
        handles = []
        for name, layer in layers:
            layer.weight.requires_grad_(True)
            handles.append(layer.weight.register_post_accumulate_grad_hook(move_out(name)))
        for batch in batches:
            mean_loss_backward(model, batch)
        for handle in handles:
            handle.remove()
        model.requires_grad_(False)
        factors = {}
        for name in list(total):
            gradient = total.pop(name) / len(batches)
            if len(batches[0]["labels"]) == 1:
                continue  # warming up
            U, S, V = torch.svd_lowrank(-gradient, q=min(512, *gradient.shape), niter=16)
            root = (S[:rank] / S[0] / GAMMA).sqrt()
            factors[name] = (root[:, None] * V[:, :rank].T, U[:, :rank] * root)
        return factors

    return run


def linear_layers(model: PreTrainedModel) -> list[tuple[str, nn.Linear]]:
    """List every linear layer but the LM head."""
    head = model.get_output_embeddings()
    named = model.named_modules()
    return [(name, m) for name, m in named if isinstance(m, nn.Linear) and m is not head]


def model_name() -> str:
    """Return SmolLM2's `model.name`."""
    overlay = yaml.safe_load((ROOT / "configs" / "models" / "smollm2.yaml").read_text())
    return overlay["model"]["name"]


def run_one(contender: str, rank: int, folder: Path, profile: bool) -> dict[str, float]:
    """Load the model, warm up, measure one contender; runs in its own process."""
    batches: list[Batch] = torch.load(folder / "batches.pt", weights_only=True)
    model = load_model(resolve_model(model_name()))
    procedure = {
        "lora": lambda: plain_lora(model, rank),
        "sketch": lambda: ours(model, rank, Estimator()),
        "exact": lambda: ours(model, rank, Estimator("exact")),
        "lora_ga": lambda: peft_lora_ga(model, rank),
        "authors": lambda: authors_procedure(model, rank),
    }[contender]()
    procedure([{key: value[:1] for key, value in batches[-1].items()}])
    if profile:
        with torch.profiler.profile() as profiler:
            procedure(batches)
        print(profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=12))
        return {}
    before = psutil.Process().memory_info().rss
    with PeakMemory(torch.device("cpu")) as memory:
        start, cpu_start = time.perf_counter(), time.process_time()
        procedure(batches)
        seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
    return {
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "peak_mib": memory.peak_bytes / 2**20,
        "excess_mib": (memory.peak_bytes - before) / 2**20,
    }


def run_apart(contender: str, args: argparse.Namespace, folder: Path) -> dict[str, float]:
    """Start a process for one contender and read what it measured."""
    result = folder / "result.json"
    program = [sys.executable, "-m", "benchmarks.init"]
    command = [*program, "--only", contender, "--folder", str(folder)]
    command += ["--rank", str(args.rank)] + (["--profile"] if args.profile else [])
    subprocess.run(command, check=True)
    return json.loads(result.read_text())


def main() -> None:
    """Parse the command line, prepare the batches, run the contenders, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--micro_batch_size", type=int, default=8)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3, help="rounds of the first three")
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--profile", action="store_true", help="profile the sketch and stop")
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    parser.add_argument("--only", choices=CONTENDERS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only:
        measured = run_one(args.only, args.rank, args.folder, args.profile)
        (args.folder / "result.json").write_text(json.dumps(measured))
        return

    from data_modules.movie_reviews import MovieReviewsDataModule

    data = MovieReviewsDataModule()
    data.attach(load_tokenizer(resolve_model(model_name())), False)
    batches = data.gradient_batches(args.samples, args.micro_batch_size)
    measured: dict[str, list[dict[str, float]]] = {name: [] for name in args.contenders}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        torch.save(batches, folder / "batches.pt")
        if args.profile:
            run_apart("sketch", args, folder)
            return
        for number in range(args.rounds):
            for contender in args.contenders:
                if contender in REPEATED or number == 0:
                    measured[contender].append(run_apart(contender, args, folder))
                    print(contender, measured[contender][-1], file=sys.stderr, flush=True)
    tokens = sum(int(batch["attention_mask"].sum()) for batch in batches)
    padded = sum(batch["input_ids"].numel() for batch in batches)
    print(
        f"SmolLM2-135M, {args.samples} movie-review prompts ({tokens} tokens, {padded} with padding) "
        f"in micro-batches of {args.micro_batch_size}, r = {args.rank}, "
        f"{torch.get_num_threads()} threads, torch {torch.__version__}\n"
    )
    history.append("init", vars(args), report(measured))
    if args.json:
        args.json.write_text(json.dumps(measured, indent=2) + "\n")


def report(measured: dict[str, list[dict[str, float]]]) -> dict[str, float]:
    """Print medians, and ratios to plain LoRA, as a Markdown table; return the ratios."""
    medians: dict[str, dict[str, Any]] = {
        name: {key: statistics.median(run[key] for run in runs) for key in runs[0]}
        for name, runs in measured.items()
    }
    unit = medians.get("lora", next(iter(medians.values())))
    print(
        "| contender | runs | seconds | x unit | CPU s | x unit | peak MiB | x unit | excess MiB |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for name, median in medians.items():
        print(
            f"| {LABELS[name]} | {len(measured[name])} | {median['seconds']:.1f} | "
            f"{median['seconds'] / unit['seconds']:.2f} | {median['cpu_seconds']:.1f} | "
            f"{median['cpu_seconds'] / unit['cpu_seconds']:.2f} | {median['peak_mib']:.0f} | "
            f"{median['peak_mib'] / unit['peak_mib']:.2f} | {median['excess_mib']:.0f} |"
        )
    return {
        f"{name}, {key}": median[key] / unit[key]
        for name, median in medians.items()
        for key in ("seconds", "peak_mib")
        if median is not unit
    }


if __name__ == "__main__":
    main()
