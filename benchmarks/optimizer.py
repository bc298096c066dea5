"""Time one optimizer step: ours, torch's fused AdamW, PEFT's Riemannian AdamW, LoRA-Pro's both modes.

    python -m benchmarks.optimizer [--shapes smollm2|llama2-7b|all] [--device cpu|cuda]

The parameters are rank-8 float32 factors for every linear layer of the model; no base weight is
allocated. All contenders live in one process and take turns, so that a change in the machine's
load hits each of them; the table shows medians over the rounds. `--json FILE` keeps the numbers.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
from peft.optimizers.riemannian import create_riemannian_optimizer
from torch import nn

from app.optim.lora_pro import LoraProAdamW
from app.optim.preconditioned_adamw import PreconditionedAdamW
from benchmarks import history

# Linear layers of one block as (out_features, in_features), and the number of blocks.
MODELS = {
    "smollm2": ([(576, 576)] * 2 + [(192, 576)] * 2 + [(1536, 576)] * 2 + [(576, 1536)], 30),
    "llama2-7b": ([(4096, 4096)] * 4 + [(11008, 4096)] * 2 + [(4096, 11008)], 32),
}
OURS, ADAMW, PEFT = "PreconditionedAdamW", "torch AdamW, fused", "PEFT Riemannian AdamW"
PRO, PRO_FULL = "LoraProAdamW, efficient", "LoraProAdamW, full"
MOST_GIB = 4.0  # of an optimizer's states


def lora_parameters(shapes: list[tuple[int, int]], rank: int, device: str) -> nn.Module:
    """Return a module that has factors and gradients under PEFT's parameter names."""
    generator = torch.Generator(device).manual_seed(0)
    root = nn.Module()
    for i, (m, n) in enumerate(shapes):
        layer = nn.Module()
        for name, shape in (("lora_A", (rank, n)), ("lora_B", (m, rank))):
            weight = nn.Parameter(0.05 * torch.randn(shape, generator=generator, device=device))
            weight.grad = torch.randn(shape, generator=generator, device=device)
            holder = nn.Module()
            holder.register_parameter("weight", weight)
            layer.add_module(name, nn.ModuleDict({"default": holder}))
        root.add_module(f"layer{i}", layer)
    return root


class Contender:
    """One optimizer on parameters of its own, with the gradients to start each step from."""

    def __init__(
        self, build: Callable[[nn.Module], torch.optim.Optimizer], model: nn.Module
    ) -> None:
        self.params = list(model.parameters())
        self.raw = [p.grad.clone() for p in self.params]
        self.optimizer = build(model)
        self.times: list[float] = []

    def time_step(self, device: str) -> None:
        """Take one step and note how long it took."""
        # PEFT overwrites the gradients; everybody gets them back, so that caches are equally warm.
        torch._foreach_copy_([p.grad for p in self.params], self.raw)
        synchronize(device)
        start = time.perf_counter()
        self.optimizer.step()
        synchronize(device)
        self.times.append(1e3 * (time.perf_counter() - start))


def synchronize(device: str) -> None:
    """Wait for the GPU, if there is one."""
    if device == "cuda":
        torch.cuda.synchronize()


BUILDERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    OURS: lambda model: PreconditionedAdamW(
        [{"params": list(model.parameters()), "lora_pairs": True}], lr=1e-5, damping=1e-6
    ),
    ADAMW: lambda model: torch.optim.AdamW(
        model.parameters(), lr=1e-5, weight_decay=0.0, fused=True
    ),
    PEFT: lambda model: create_riemannian_optimizer(
        model, torch.optim.AdamW, lr=1e-5, reg=1e-6, weight_decay=0.0, fused=True
    ),
    PRO: lambda model: lora_pro(model, "efficient"),
    PRO_FULL: lambda model: lora_pro(model, "full"),
}


def lora_pro(model: nn.Module, mode: Any) -> LoraProAdamW:
    """Return LoRA-Pro's optimizer of all pairs."""
    params = list(model.parameters())
    pairs = {"params": params, "lora_pairs": True, "scaling": [16 / 8**0.5] * (len(params) // 2)}
    return LoraProAdamW([pairs], lr=1e-5, mode=mode)


def state_mib(optimizer: torch.optim.Optimizer) -> float:
    """Return what an optimizer keeps between steps."""
    states = [s for state in optimizer.state.values() for s in state.values()]
    return sum(s.numel() * s.element_size() for s in states if torch.is_tensor(s)) / 2**20


def measure(name: str, rank: int, rounds: int, device: str) -> dict[str, Any]:
    """Time all contenders on one model's shapes."""
    block, num_blocks = MODELS[name]
    shapes = block * num_blocks
    whole = 8 * sum(m * n for m, n in shapes) / 2**30
    if whole > MOST_GIB:
        print(f"{PRO_FULL} would keep {whole:.0f} GiB of states: left out")
    runners = {
        label: Contender(build, lora_parameters(shapes, rank, device))
        for label, build in BUILDERS.items()
        if label != PRO_FULL or whole <= MOST_GIB
    }
    memory = {}
    for label, runner in runners.items():  # the first step allocates the moments
        runner.time_step(device)
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            runner.time_step(device)
            memory[label] = (torch.cuda.max_memory_allocated() - before) / 2**20
        runner.times.clear()
    for _ in range(rounds):
        for runner in runners.values():
            runner.time_step(device)
    ms = {label: statistics.median(runner.times) for label, runner in runners.items()}
    return {
        "shapes": name,
        "num_pairs": len(shapes),
        "rank": rank,
        "num_elements": sum(p.numel() for p in runners[OURS].params),
        "device": device,
        "rounds": rounds,
        "ms_per_step": ms,
        "ms_fastest": {label: min(runner.times) for label, runner in runners.items()},
        "ours_over_adamw": ms[OURS] / ms[ADAMW],
        "peft_over_ours": ms[PEFT] / ms[OURS],
        "peak_extra_mib": memory,
        "state_mib": {label: state_mib(runner.optimizer) for label, runner in runners.items()},
        "num_threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "peft": peft.__version__,
    }


def main() -> None:
    """Parse the command line, measure, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", choices=[*MODELS, "all"], default="all")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    args = parser.parse_args()
    results = []
    for name in MODELS if args.shapes == "all" else [args.shapes]:
        result = measure(name, args.rank, args.rounds, args.device)
        results.append(result)
        print(
            f"{name}: {result['num_pairs']} pairs, r = {args.rank}, "
            f"{result['num_elements'] / 1e6:.1f} M elements, {args.device}, "
            f"{result['num_threads']} threads, torch {result['torch']}, peft {result['peft']}"
        )
        for label, ms in result["ms_per_step"].items():
            extra = result["peak_extra_mib"].get(label)
            print(
                f"  {label:24s} {ms:9.2f} ms a step (fastest {result['ms_fastest'][label]:.2f}), "
                f"{result['state_mib'][label]:.1f} MiB of states"
                + (f", {extra:.1f} MiB extra at the peak" if extra is not None else "")
            )
        print(f"  ours / fused AdamW {result['ours_over_adamw']:.2f}", end="")
        print(f"   PEFT / ours {result['peft_over_ours']:.2f}", flush=True)
    figures = {
        f"{result['shapes']}, {key}": result[key]
        for result in results
        for key in ("ours_over_adamw", "peft_over_ours")
    }
    history.append("optimizer", vars(args), figures)
    if args.json:
        args.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
