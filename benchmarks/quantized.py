"""LoRA-One on a base of four bits: its factors beside those of the float base, and what a start takes.

    python -m benchmarks.quantized [--samples 64] [--parts gradient planned llama measured]

gradient: SmolLM2-135M; the observed gradient against autograd at the values of the codes, and the rank-8 part
and its singular spaces against those of the float base. planned: bytes on the meta device; llama: those of
LLaMA-2-7B's shapes. measured: memory that a process takes beyond its model, each in its own process, PEFT's
LoRA-GA beside.
"""

import argparse
import contextlib
import ctypes
import gc
import io
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import psutil
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, PreTrainedTokenizerFast

from app.cli.main import main as run_command
from app.commands.plan.memory import RunMemory, tensor_bytes
from app.initialization.factors import truncated_svd
from app.initialization.gradient_store import ExactStore
from app.initialization.one_step_gradient import Estimator, one_step_gradients
from app.models.adapter_config import LoraSettings
from app.models.batch import Batch
from app.models.loading import load_float32, load_model, load_tokenizer
from app.models.lora import add_lora, lora_pairs
from app.models.loss import summed_loss, supervised_logits
from app.models.quantization import scales
from app.models.source import ModelSource, resolve_model
from app.optim.preconditioned_adamw import PreconditionedAdamW
from app.training.optimization import parameter_groups
from app.utils.memory import PeakMemory
from benchmarks import history
from benchmarks.init import mean_loss_backward, model_name, ours, peft_lora_ga
from data_modules.movie_reviews import MovieReviewsDataModule

RANK = 8
MIB = 2**20
BASES = {  # model.dtype and model.quantization
    "float32": ("float32", None),
    "bfloat16": ("bfloat16", None),
    "nf4": ("bfloat16", "nf4"),
}
PROCEDURES = ("training step", "sketch", "lora_ga")


def smollm2(quantization: str | None = None) -> ModelSource:
    """Return where SmolLM2 is, and how it is held."""
    return replace(resolve_model(model_name()), quantization=quantization)


def prompts(samples: int) -> list[Batch]:
    """Return the initialization rows in micro-batches of eight."""
    data = MovieReviewsDataModule()
    data.attach(load_tokenizer(smollm2()), is_encoder_decoder=False)
    return data.gradient_batches(samples, 8)


def observed(source: ModelSource, batches: Sequence[Batch]) -> dict[str, Tensor]:
    """Return the exact observed gradient (m, n) of every layer."""
    gradients: dict[str, Tensor] = {}

    def keep(store: ExactStore, ranks: dict[str, int], scale: float) -> dict[str, Tensor]:
        gradients.update({name: scale * found.total for name, found in store.sums.items()})
        return {}

    model = load_model(source)
    wrapped = add_lora(model, LoraSettings(r=RANK)).train()
    with patch.object(ExactStore, "estimates", keep):
        one_step_gradients(wrapped, model, lora_pairs(wrapped), batches, RANK, Estimator("exact"))
    return gradients


def of_autograd(batch: Batch) -> dict[str, Tensor]:
    """Return torch's gradient of every linear layer at the values that the codes of NF4 stand for."""
    model = load_float32(smollm2("nf4")).requires_grad_(False)
    layers = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    layers.pop("lm_head")
    for layer in layers.values():
        layer.weight.requires_grad_(True)
    mean_loss_backward(model, batch)
    return {name: layer.weight.grad for name, layer in layers.items()}


def relative(found: Tensor, expected: Tensor) -> float:
    """Return |found - expected| / |expected|."""
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def angles(U: Tensor, W: Tensor) -> Tensor:
    """Return the principal angles in degrees between two subspaces with orthonormal columns (m, r)."""
    return torch.linalg.svdvals(U.double().T @ W.double()).clamp(max=1).acos().rad2deg()


def gradient(samples: int) -> dict[str, float]:
    """Print how far LoRA-One's factors on NF4 are from those on the float base; return the means."""
    batches = prompts(samples)
    errors = [
        relative(found, expected)
        for found, expected in zip(
            observed(smollm2("nf4"), batches[:1]).values(),
            of_autograd(batches[0]).values(),
            strict=True,
        )
    ]
    print(f"observed gradient against autograd, worst of {len(errors)} layers: {max(errors):.1e}\n")
    plain, codes = observed(smollm2(), batches), observed(smollm2("nf4"), batches)
    rows: dict[str, list[float]] = {key: [] for key in ("error", "left", "right")}
    for name, G in plain.items():
        svd, of_codes = truncated_svd(G, RANK), truncated_svd(codes[name], RANK)
        parts = [(each.U * each.S) @ each.V.T / each.S[0] for each in (svd, of_codes)]
        rows["error"].append(relative(parts[1], parts[0]))
        rows["left"].append(float(angles(svd.U, of_codes.U).mean()))
        rows["right"].append(float(angles(svd.V, of_codes.V).mean()))
    print("| NF4 against float32 | mean layer | worst layer |\n| --- | --- | --- |")
    labels = {
        "error": ("relative error of lora_B lora_A", ".1%"),
        "left": ("mean principal angle of lora_B, degrees", ".1f"),
        "right": ("mean principal angle of lora_A, degrees", ".1f"),
    }
    means = {}
    for key, (label, form) in labels.items():
        means[label] = sum(rows[key]) / len(rows[key])
        print(f"| {label} | {means[label]:{form}} | {max(rows[key]):{form}} |")
    return means


@contextlib.contextmanager
def llama_shapes() -> Iterator[str]:
    """Yield a folder with LLaMA-2-7B's configuration, a tokenizer of bytes, and no weights."""
    with tempfile.TemporaryDirectory() as folder:
        LlamaConfig(
            vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32,
            num_attention_heads=32, num_key_value_heads=32, dtype="float32",
        ).save_pretrained(folder)  # fmt: skip
        alphabet = ["<unk>", "<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
        core = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, [], unk_token="<unk>"))
        core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        special = {"unk_token": "<unk>", "eos_token": "<eos>", "pad_token": "<eos>"}
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, **special)
        tokenizer.add_tokens([" negative", " positive"])
        tokenizer.save_pretrained(folder)
        yield folder


def plan_of(name: str, base: str) -> RunMemory:
    """Return what `plan` adds up for the quickstart on another base."""
    dtype, quantization = BASES[base]
    found: list[RunMemory] = []
    options = ["--config=quickstart.yaml", f"--model.name={name}", f"--model.dtype={dtype}"]
    options += [f"--model.quantization={quantization or 'null'}", "--memory_gib=1000"]
    with (
        patch(
            "app.commands.plan.command.memory_text", lambda needed, _: found.append(needed) or ""
        ),
        contextlib.redirect_stdout(io.StringIO()),
    ):
        run_command(["plan", *options])
    return found[0]


def planned(samples: int) -> dict[str, float]:
    """Print what a start and a step of SmolLM2 take by `plan`; return what `print_plans` does."""
    return print_plans("SmolLM2-135M", model_name())


def llama(samples: int) -> dict[str, float]:
    """Print the same of LLaMA-2-7B's shapes."""
    with llama_shapes() as folder:
        return print_plans("LLaMA-2-7B", folder)


def print_plans(title: str, name: str) -> dict[str, float]:
    """Print a model's plan on each base; return the peaks of the start by those of the step."""
    print("| model | base | weights | start, sketch | training step | PEFT lora_ga, at least |")
    print("| --- | --- | --- | --- | --- | --- |")
    shares = {}
    for base, (dtype, quantization) in BASES.items():
        needed = plan_of(name, base)
        init, itemsize = needed.initialization, getattr(torch, dtype).itemsize
        theirs = needed.weights + init.activations + init.exact // 4 * itemsize
        start = needed.initialization_peaks["sketch"]
        shares[f"{title}, {base}, start / step"] = start / needed.training_peak
        sizes = [needed.frozen, start, needed.training_peak]
        cells = [f"{size / MIB:,.0f} MiB" for size in sizes]
        cells.append("refuses" if quantization else f"{theirs / MIB:,.0f} MiB")
        print(f"| {title} | {base} | {' | '.join(cells)} |", flush=True)
    return shares


def measure(procedure: str, base: str, folder: Path) -> dict[str, float | str]:
    """Load SmolLM2, warm up, and measure one procedure; runs in its own process."""
    batches: list[Batch] = torch.load(folder / "batches.pt", weights_only=True)
    dtype, quantization = BASES[base]
    model = load_model(smollm2(quantization), getattr(torch, dtype))
    weights = tensor_bytes([*model.parameters(), *scales(model)])
    if procedure == "lora_ga":
        run = peft_lora_ga(model, RANK)
    elif procedure == "sketch":
        run = ours(model, RANK, Estimator())
    else:
        wrapped = add_lora(model, LoraSettings(r=RANK)).train()
        optimizer = PreconditionedAdamW(parameter_groups(wrapped), lr=1e-4)

        def run(batches: Sequence[Batch]) -> None:
            for batch in batches:
                output = supervised_logits(wrapped, model, batch)
                (summed_loss(output) / output.labels.numel()).backward()
                optimizer.step()
                optimizer.zero_grad()

    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what loading has freed is not the procedure's to use
    before = psutil.Process().memory_info().rss
    try:
        with PeakMemory(torch.device("cpu")) as memory:
            run(batches)
    except ValueError as error:
        return {"error": str(error)}
    return {"weights": weights / MIB, "excess": (memory.peak_bytes - before) / MIB}


def measured(samples: int) -> dict[str, float]:
    """Print what each procedure takes beyond its model, in its own process; return it by the step's."""
    print("| base | weights | procedure | beyond the model |\n| --- | --- | --- | --- |")
    shares = {}
    with tempfile.TemporaryDirectory() as name:
        torch.save(prompts(samples), Path(name) / "batches.pt")
        for base in BASES:
            found = {}
            for procedure in PROCEDURES:
                command = [
                    sys.executable,
                    "-m",
                    "benchmarks.quantized",
                    "--only",
                    procedure,
                    base,
                    name,
                ]
                told = subprocess.run(command, check=True, capture_output=True, text=True).stdout
                found[procedure] = json.loads(told.splitlines()[-1])
                result = found[procedure]
                weights = found["training step"]["weights"]
                excess = result.get("error") or f"{result['excess']:,.0f} MiB"
                print(f"| {base} | {weights:,.0f} MiB | {procedure} | {excess} |", flush=True)
                if "excess" in result:
                    step = found["training step"]["excess"]
                    shares[f"measured, {base}, {procedure} / step"] = result["excess"] / step
    return shares


PARTS = {"gradient": gradient, "planned": planned, "llama": llama, "measured": measured}


def main() -> None:
    """Print the parts that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--only", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only:
        procedure, base, folder = args.only
        print(json.dumps(measure(procedure, base, Path(folder))))
        return
    figures: dict[str, float] = {}
    for part in args.parts:
        print(f"\n{part}\n")
        figures |= PARTS[part](args.samples)
    history.append("quantized", vars(args), figures)


if __name__ == "__main__":
    main()
