"""What the initialization moves between processes and holds on each, computed and measured.

    python -m benchmarks.communication [--samples 64] [--micro_batch_size 8] [--rank 8] [--oversampling 8]

The first table is computed for LLaMA-2-7B's linear layers on 2, 8 and 64 processes: bytes that the busiest
process sends, and bytes of gradients or sketches that it holds. The second runs the same code for
SmolLM2-135M's shapes on 2 and 4 real processes (gloo) with random activations, in a network namespace of
their own where the system allows it, and sets the bytes that the kernel counted on the loopback device
beside the computed ones. About a minute.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from app.initialization.gradient_exchange import (
    BUCKET_NUMBERS,
    Layer,
    assign_buckets,
    assign_owners,
)
from app.initialization.gradient_sketch import RandomColumns, SketchedGradient
from app.initialization.gradient_store import ExactStore, SketchStore

MODELS = {
    "SmolLM2-135M": ([(576, 576)] * 2 + [(192, 576)] * 2 + [(1536, 576)] * 2 + [(576, 1536)], 30),
    "LLaMA-2-7B": ([(4096, 4096)] * 4 + [(11008, 4096)] * 2 + [(4096, 11008)], 32),
}
BYTES = 4  # float32
MIB = 2**20


def layers_of(model: str) -> list[Layer]:
    """Return the model's linear layers in module order."""
    block, count = MODELS[model]
    shapes = block * count
    return [Layer(str(i), m, n) for i, (m, n) in enumerate(shapes)]


def shared(layers: list[Layer], owned: list[list[Layer]], width: int) -> int:
    """Return the bytes that each process sends when all estimates are shared."""
    sizes = [sum((m + n + 1) * min(width, m, n) + 3 for _, m, n in group) for group in owned]
    return BYTES * max(sizes) * (len(owned) - 1)


def computed(
    layers: list[Layer], processes: int, kind: str, given: argparse.Namespace
) -> tuple[int, int]:
    """Return (bytes sent, bytes held) of the busiest process."""
    total = sum(m * n for _, m, n in layers)
    if kind == "exact":
        buckets = assign_buckets(layers, processes)
        owned = [
            [x for o, group in buckets if o == rank for x in group] for rank in range(processes)
        ]
        own = [sum(m * n for _, m, n in group) for group in owned]
        largest = max(sum(m * n for _, m, n in group) for _, group in buckets)
        rows = -(-given.samples // processes)
        batches = -(-rows // given.micro_batch_size)
        sent = batches * BYTES * (total - min(own)) + shared(layers, owned, given.rank)
        return sent, BYTES * (max(own) + largest)
    width = given.rank + given.oversampling
    owners = assign_owners(layers, processes)
    owned = [[x for x in layers if owners[x.name] == rank] for rank in range(processes)]
    probes = SketchedGradient.PROBES
    size = [sum((m + n) * (min(width, m, n) + probes) for _, m, n in group) for group in owned]
    sent = BYTES * (sum(size) - min(size)) + shared(layers, owned, width)
    held = BYTES * sum((m + n) * (min(width, m, n) + 2 * probes) for _, m, n in layers)
    return sent, held + BYTES * (sum(size) + processes * max(size))


def loopback_bytes() -> int:
    """Return what the kernel has sent over the loopback device so far."""
    for line in Path("/proc/net/dev").read_text().splitlines():
        name, _, numbers = line.partition(":")
        if name.strip() == "lo":
            return int(numbers.split()[8])
    return 0


def work(
    rank: int, processes: int, kind: str, given: argparse.Namespace, port: int, out: str
) -> None:
    """Observe random activations on one process, and write what was sent."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=processes)
    layers, device = layers_of("SmolLM2-135M"), torch.device("cpu")
    store: ExactStore | SketchStore = ExactStore(layers, device)
    if kind == "sketch":
        widths = {layer.name: given.rank + given.oversampling for layer in layers}
        store = SketchStore(layers, widths, device, RandomColumns(device, 0))
    random = torch.Generator().manual_seed(rank)
    rows = -(-given.samples // processes)
    dist.barrier()
    before = loopback_bytes()
    for _ in range(-(-rows // given.micro_batch_size)):
        for layer in reversed(layers):
            x = torch.randn(32, layer.n, generator=random)
            delta = torch.randn(32, layer.m, generator=random)
            store.update(layer.name, x, delta, [layer.name])
        store.end_batch()
    store.end_pass()
    store.estimates({layer.name: given.rank for layer in layers}, 1.0)
    dist.barrier()
    wire = loopback_bytes() - before
    most = torch.tensor([store.sent_bytes], dtype=torch.int64)
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    if rank == 0:
        Path(out).write_text(f"{int(most)} {wire // processes}")
    dist.barrier()
    dist.destroy_process_group()


def measure(given: argparse.Namespace) -> None:
    """Print a row for each number of processes and estimator."""
    print("\nMeasured, SmolLM2-135M's shapes, MiB a process:\n")
    print("| processes | estimator | computed | handed to torch.distributed | on the wire, mean |")
    print("| --- | --- | --- | --- | --- |")
    for port, (processes, kind) in enumerate((p, k) for p in (2, 4) for k in ("exact", "sketch")):
        with tempfile.NamedTemporaryFile("r") as out:
            mp.spawn(work, (processes, kind, given, 29600 + port, out.name), nprocs=processes)
            handed, wire = map(int, out.read().split())
        sent, _ = computed(layers_of("SmolLM2-135M"), processes, kind, given)
        print(
            f"| {processes} | {kind} | {sent / MIB:.1f} | {handed / MIB:.1f} | {wire / MIB:.1f} |",
            flush=True,
        )


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--micro_batch_size", type=int, default=8)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--oversampling", type=int, default=8)
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.measure:
        measure(given)
        return
    layers = layers_of("LLaMA-2-7B")
    whole = BYTES * sum(m * n for _, m, n in layers) / MIB
    print(
        f"Computed, LLaMA-2-7B ({len(layers)} layers, all gradients together {whole:,.0f} MiB), "
        f"{given.samples} samples in micro-batches of {given.micro_batch_size}, r = {given.rank}, "
        f"buckets of {BYTES * BUCKET_NUMBERS // MIB} MiB, MiB on the busiest process:\n"
    )
    print("| processes | exact: sent | exact: held | sketch: sent | sketch: held |")
    print("| --- | --- | --- | --- | --- |")
    for processes in (2, 8, 64):
        cells = [
            f"{value / MIB:,.0f}"
            for kind in ("exact", "sketch")
            for value in computed(layers, processes, kind, given)
        ]
        print(f"| {processes} | {' | '.join(cells)} |", flush=True)
    # A network namespace of its own keeps other programs' bytes out of the counter.
    alone = ["unshare", "--net", "sh", "-c", 'ip link set lo up && exec "$@"', "sh"]
    probe = (
        subprocess.run([*alone, "true"], capture_output=True, check=False)
        if shutil.which("unshare")
        else None
    )
    prefix = alone if probe is not None and probe.returncode == 0 else []
    subprocess.run(
        [*prefix, sys.executable, "-m", "benchmarks.communication", *sys.argv[1:], "--measure"],
        check=True,
    )


if __name__ == "__main__":
    main()
