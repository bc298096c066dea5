"""How many bytes a run takes on each process: arithmetic on shapes, without weights."""

import functools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import nn
from transformers import PreTrainedConfig

from app.commands.plan.fake_pass import PassMemory
from app.commands.plan.placement import Placement
from app.distributed.fsdp import blocks
from app.initialization.gradient_exchange import BUCKET_NUMBERS
from app.initialization.gradient_sketch import SketchedGradient
from app.models.lora import LoraPair
from app.models.quantization import scales

FLOAT32 = 4


@dataclass(frozen=True)
class InitializationMemory:
    """Bytes of an initialization that is made of the one-step gradient.

    Most at once in the pass over a micro-batch, what either estimator keeps of all gradients, and which of the
    two the run uses.
    """

    activations: int
    sketch: int
    exact: int
    estimator: str


@dataclass(frozen=True)
class RunMemory:
    """Bytes on each process, part by part.

    Attributes:
        frozen: Frozen weights and buffers: the whole, or this process's share.
        gathered: Weights of other processes that are here while a block is computed.
        trained: Trained weights; their gradients take as much again.
        loading: Host memory of the process that reads the weights, before they are sharded.
        exchange: The buffer in which gradients are summed over processes.
        optimizer: The optimizer's states.
        training: The pass over a training batch.
        validation: Most at once in the pass over a validation batch; 0 without validation rows.
        generation: Keys and values of the largest batch of benchmark questions; 0 without benchmarks.
        initialization: What it takes; None if it observes no gradient.
    """

    frozen: int
    gathered: int
    trained: int
    loading: int
    exchange: int
    optimizer: int
    training: PassMemory
    validation: int = 0
    generation: int = 0
    initialization: InitializationMemory | None = None

    @property
    def weights(self) -> int:
        """All weights that are here at a time."""
        return self.frozen + self.gathered + self.trained

    @property
    def initialization_peaks(self) -> dict[str, int]:
        """Most bytes during the initialization, which comes before the optimizer has states, by estimator."""
        given = self.initialization
        if given is None:
            return {}
        kept = {"sketch": given.sketch, "exact": given.exact}
        return {kind: self.weights + given.activations + size for kind, size in kept.items()}

    @property
    def training_peak(self) -> int:
        """Most bytes during a training step; an optimizer step makes a copy of the gradients."""
        resident = self.weights + self.trained + self.optimizer
        return resident + max(self.training.peak, self.exchange + self.trained)

    @property
    def validation_peak(self) -> int:
        """Most bytes during validation between training steps."""
        return self.weights + self.optimizer + max(self.validation, self.generation)

    @property
    def peak(self) -> int:
        """Most bytes during the whole run."""
        peaks = [self.training_peak, self.validation_peak]
        if self.initialization is not None:
            peaks.append(self.initialization_peaks[self.initialization.estimator])
        return max(peaks)


def tensor_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Sum numel * itemsize."""
    return sum(t.numel() * t.element_size() for t in tensors)


def frozen_bytes(model: nn.Module, placement: Placement) -> int:
    """Return the bytes of frozen weights, their scales where they are quantised, and buffers on one process.

        whole: m * n * itemsize        shard: ceil(m / world size) * n * itemsize

    Tied weights count once; a share in host memory is none on the device.
    """
    buffers = tensor_bytes([*model.buffers(), *scales(model)])
    frozen = [p for p in model.parameters() if not p.requires_grad]
    if not placement.sharded:
        return tensor_bytes(frozen) + buffers
    if placement.cpu_offload:
        return buffers
    shards = (
        -(-p.shape[0] // placement.world_size) * (p.numel() // p.shape[0]) * p.element_size()
        for p in frozen
    )
    return sum(shards) + buffers


def gathered_bytes(model: nn.Module, placement: Placement) -> int:
    """Return the bytes of whole weights that a process holds while it computes with shards.

    The two largest neighbouring blocks at once (one computes, the next one arrives) and what is in no
    block (embeddings, LM head); all of them if a block is kept until its backward pass.
    """
    if not placement.sharded:
        return 0

    def whole(parameters: Iterable[nn.Parameter]) -> int:
        dtype = placement.gather_dtype
        return sum(
            p.numel() * (p.element_size() if dtype is None else dtype.itemsize)
            for p in parameters
            if not p.requires_grad
        )

    units = list(blocks(model))
    inside = {p for unit in units for p in unit.parameters()}
    sizes = [whole(unit.parameters()) for unit in units]
    root = whole(p for p in model.parameters() if p not in inside)
    if not placement.reshard_after_forward:
        return root + sum(sizes)
    return root + max((sum(sizes[i : i + 2]) for i in range(len(sizes))), default=0)


def optimizer_bytes(make_optimizer: OptimizerCallable, groups: Iterable[dict[str, Any]]) -> int:
    """Return the bytes of an optimizer's states after its first step.

    The optimizer makes one step on small parameters, whose sides differ where those of the large ones do; the
    shapes of its states then say what it keeps of large parameters (AdamW two of each parameter's shape,
    LoRA-Pro two of the weight's).

    Args:
        make_optimizer: From parameters or groups to an optimizer.
        groups: Of the parameters it will train, also on the meta device; a group with `lora_pairs` lists
            lora_A (r, n) and lora_B (m, r) in turn, and the number of experts that are stacked in each pair.
    """
    total = 0
    for group in groups:
        params = group["params"]
        together = 2 if group.get("lora_pairs") else 1
        for i in range(0, len(params), together):
            shapes = [p.shape for p in params[i : i + together]]
            experts = group["experts"][i // 2] if together == 2 else 1
            if experts > 1:
                (rows, n), (m, columns) = shapes
                shapes = [torch.Size((rows // experts, n)), torch.Size((m, columns // experts))]
            sides = sorted({side for shape in shapes for side in shape})
            small = {side: 2 + place for place, side in enumerate(sides)}
            large = {2 + place: side for place, side in enumerate(sides)}
            made = tuple(tuple(small[side] for side in shape) for shape in shapes)
            # One count of steps stands for all experts.
            total += sum(
                (experts if shape else 1)
                * itemsize
                * math.prod(large.get(side, side) for side in shape)
                for itemsize, shape in _states(make_optimizer, made, params[i].dtype)
            )
    return total


@functools.cache
def _states(
    make_optimizer: OptimizerCallable, shapes: tuple[tuple[int, ...], ...], dtype: torch.dtype
) -> list[tuple[int, tuple[int, ...]]]:
    """Return item size and shape of all states after a step on parameters of these shapes."""
    params = [nn.Parameter(torch.ones(shape, dtype=dtype)) for shape in shapes]
    for p in params:
        p.grad = torch.ones_like(p)
    pair = {"params": params, "lora_pairs": True, "scaling": [1.0]}
    optimizer = make_optimizer([pair] if len(params) == 2 else params)
    optimizer.step()
    states = [s for state in optimizer.state.values() for s in state.values()]
    return [(s.element_size(), tuple(s.shape)) for s in states if isinstance(s, torch.Tensor)]


def cache_bytes(config: PreTrainedConfig, rows: int, tokens: int, itemsize: int) -> int:
    """Return the bytes of all keys and values while a batch of outputs is generated.

        2 * layers * rows * tokens * key-value heads * head size * itemsize

    Args:
        config: A causal or sequence-to-sequence model's: the latter keeps the prompt's positions once, for
            the decoder to look at, and the output's.
        rows: Outputs that are generated at once.
        tokens: Most tokens of prompt and output together.
        itemsize: Bytes of a number.
    """
    config = config.get_text_config()  # of a model that reads images, too
    heads = config.num_attention_heads
    size = getattr(config, "head_dim", None) or getattr(config, "d_kv", None)
    size = size or config.hidden_size // heads
    kept = getattr(config, "num_key_value_heads", None) or heads
    return 2 * config.num_hidden_layers * rows * tokens * kept * size * itemsize


def sketch_bytes(pairs: Sequence[LoraPair], oversampling: int) -> int:
    """Return what the sketch keeps on each process.

    sum over layers of (m + n) * (width + probes) * 4 bytes, width = min(r + oversampling, m, n); and once for
    all layers of one size, probes * m * 4, probes * n * 4 and width * n * 4 bytes
    """
    probes = SketchedGradient.PROBES
    total = 0
    shared: dict[tuple[str | int, int], int] = {}
    for m, n, r in _shapes(pairs):
        width = min(r + oversampling, m, n)
        total += (m + n) * (width + probes)
        shared |= {("output", m): probes * m, ("input", n): probes * n, (n, width): width * n}
    return (total + sum(shared.values())) * FLOAT32


def exact_bytes(pairs: Sequence[LoraPair], world_size: int) -> int:
    """Return the most that the exact estimator keeps on a process.

    one process: sum over layers of m * n * 4 bytes
    several:     that sum / world size, and two buckets: one above the average, one under way
    """
    sizes = [m * n for m, n, _ in _shapes(pairs)]
    if world_size == 1:
        return sum(sizes) * FLOAT32
    bucket = max(min(BUCKET_NUMBERS, sum(sizes) // world_size), max(sizes))
    own = min(sum(sizes) // world_size + bucket, sum(sizes))
    return (own + bucket) * FLOAT32


def _shapes(pairs: Sequence[LoraPair]) -> list[tuple[int, int, int]]:
    """List (m, n, r) of each layer."""
    return [(p.lora_B.shape[0], p.lora_A.shape[1], p.rank) for p in pairs]
