"""How many bytes a run takes on each process: arithmetic on shapes, without weights."""

import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig

from app.commands.plan.fake_pass import PassMemory
from app.distributed.fsdp import blocks
from app.initialization.gradient_estimators import SketchedGradient
from app.initialization.gradient_exchange import BUCKET_NUMBERS
from app.models.lora import LoraPair

FLOAT32 = 4


@dataclass(frozen=True)
class Placement:
    """Where a run's processes put the weights.

    Attributes:
        strategy: The trainer's name of it, for the reader.
        devices: Processes on each node.
        num_nodes: Nodes.
        sharded: Whether frozen weights are spread over all processes; otherwise each holds everything.
        gather_dtype: Type in which sharded weights are gathered; None is their own.
        cpu_offload: Whether the shards live in host memory.
        reshard_after_forward: Whether a block's gathered weights are freed after its forward pass.
    """

    strategy: str
    devices: int = 1
    num_nodes: int = 1
    sharded: bool = False
    gather_dtype: torch.dtype | None = None
    cpu_offload: bool = False
    reshard_after_forward: bool = True

    @property
    def world_size(self) -> int:
        """Number of processes."""
        return self.devices * self.num_nodes


@dataclass(frozen=True)
class RunMemory:
    """Bytes on each process, part by part.

    Attributes:
        frozen: Frozen weights and buffers: the whole, or this process's share.
        gathered: Weights of other processes that are here while a block is computed.
        trained: Trained weights.
        gradients: Their gradients.
        loading: Host memory of the process that reads the weights, before they are sharded.
        exchange: The buffer in which gradients are summed over processes.
        optimizer: The optimizer's states.
        training: The pass over a training batch.
        evaluation: The pass over a validation batch.
        generation: Keys and values of the largest batch of benchmark questions; 0 without benchmarks.
        observation: The pass over an initialisation batch; None without LoRA-One's start.
        sketch: What the sketch estimator keeps of all gradients.
        exact: What the exact estimator keeps of them.
        estimator: Which of the two the run uses.
    """

    frozen: int
    gathered: int
    trained: int
    gradients: int
    loading: int
    exchange: int
    optimizer: int
    training: PassMemory
    evaluation: PassMemory
    generation: int = 0
    observation: PassMemory | None = None
    sketch: int = 0
    exact: int = 0
    estimator: str | None = None

    @property
    def weights(self) -> int:
        """All weights that are here at a time."""
        return self.frozen + self.gathered + self.trained

    def initialisation_peak(self, estimator: str) -> int:
        """Most bytes during LoRA-One's start, which comes before the optimizer has states."""
        assert self.observation is not None
        kept = self.sketch if estimator == "sketch" else self.exact
        return self.weights + self.observation.peak + kept

    @property
    def training_peak(self) -> int:
        """Most bytes during a training step; an optimizer step makes a copy of the gradients."""
        resident = self.weights + self.gradients + self.optimizer
        return resident + max(self.training.peak, self.exchange + self.gradients)

    @property
    def evaluation_peak(self) -> int:
        """Most bytes during validation between training steps."""
        return self.weights + self.optimizer + max(self.evaluation.peak, self.generation)

    @property
    def peak(self) -> int:
        """Most bytes during the whole run."""
        start = 0 if self.estimator is None else self.initialisation_peak(self.estimator)
        return max(start, self.training_peak, self.evaluation_peak)


def tensor_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Sum numel * itemsize."""
    return sum(t.numel() * t.element_size() for t in tensors)


def frozen_bytes(model: nn.Module, placement: Placement) -> int:
    """Return the bytes of frozen weights and buffers on the device of one process.

        whole: m * n * itemsize        shard: ceil(m / world size) * n * itemsize

    Args:
        model: The model, also on the meta device; tied weights count once.
        placement: How the weights are spread; a share in host memory is none on the device.
    """
    buffers = tensor_bytes(model.buffers())
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


def exchange_bytes(gradients: int, placement: Placement) -> int:
    """Return the buffer in which gradients meet: as large as they are, with several processes."""
    return gradients if placement.world_size > 1 else 0


def optimizer_bytes(make_optimizer: Any, groups: Iterable[Mapping[str, Any]]) -> int:
    """Return the bytes of an optimizer's states after its first step.

    The optimizer is run once on small parameters whose sides all differ; what it keeps of them tells what it
    keeps of large ones (AdamW two of each parameter's shape, LoRA-Pro two of the weight's).

    Args:
        make_optimizer: From parameters or groups to an optimizer.
        groups: Of the parameters it will train, also on the meta device; a group with `lora_pairs` lists
            lora_A (r, n) and lora_B (m, r) in turn.
    """
    total = 0
    for group in groups:
        params = list(group["params"])
        width = 2 if group.get("lora_pairs") else 1
        for start in range(0, len(params), width):
            total += _state_bytes(make_optimizer, params[start : start + width])
    return total


def _state_bytes(make_optimizer: Any, params: Sequence[nn.Parameter]) -> int:
    """Return the bytes of what an optimizer keeps of one parameter, or of one pair."""
    small: list[tuple[int, ...]]
    if len(params) == 2:
        (r, n), m = params[0].shape, params[1].shape[0]
        small, large = [(2, 3), (5, 2)], {2: r, 3: n, 5: m}
    else:
        names = range(2, 2 + len(params[0].shape))
        small, large = [tuple(names)], dict(zip(names, params[0].shape, strict=True))
    return sum(
        itemsize * math.prod(large[side] for side in shape)
        for itemsize, shape in _kept(make_optimizer, tuple(small), params[0].dtype)
    )


@functools.cache
def _kept(
    make_optimizer: Any, shapes: tuple[tuple[int, ...], ...], dtype: torch.dtype
) -> list[tuple[int, tuple[int, ...]]]:
    """Return item size and shape of all states after a step on parameters of these shapes."""
    sample = [nn.Parameter(torch.ones(shape, dtype=dtype)) for shape in shapes]
    for p in sample:
        p.grad = torch.ones_like(p)
    group = {"params": sample, "lora_pairs": len(sample) == 2, "scaling": [1.0]}
    optimizer = make_optimizer([group] if len(sample) == 2 else sample)
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
    heads = config.num_attention_heads
    size = getattr(config, "head_dim", None) or getattr(config, "d_kv", None)
    size = size or config.hidden_size // heads
    kept = getattr(config, "num_key_value_heads", None) or heads
    return 2 * config.num_hidden_layers * rows * tokens * kept * size * itemsize


def sketch_bytes(pairs: Sequence[LoraPair], oversampling: int) -> int:
    """Return what the sketch keeps on each process.

        sum over layers of (m + n) * (min(r + oversampling, m, n) + 2 * probes) * 4 bytes

    Args:
        pairs: The adapted layers, also on the meta device.
        oversampling: Columns of the sketch beyond the rank.
    """
    total = 0
    for m, n, r in _shapes(pairs):
        width = min(r + oversampling, m, n)
        total += (m + n) * (width + 2 * SketchedGradient.PROBES)
    return total * FLOAT32


def exact_bytes(pairs: Sequence[LoraPair], world_size: int) -> int:
    """Return the most that the exact estimator keeps on a process.

        one process: sum over layers of m * n * 4 bytes
        several:     that sum / world size, and two buckets: one above the average, one under way

    Args:
        pairs: The adapted layers, also on the meta device.
        world_size: Number of processes.
    """
    sizes = [m * n for m, n, _ in _shapes(pairs)]
    if world_size == 1:
        return sum(sizes) * FLOAT32
    bucket = max(min(BUCKET_NUMBERS, sum(sizes) // world_size), max(sizes))
    own = min(sum(sizes) // world_size + bucket, sum(sizes))
    return (own + bucket) * FLOAT32


def _shapes(pairs: Sequence[LoraPair]) -> list[tuple[int, int, int]]:
    """List (m, n, r) of each layer."""
    return [(p.lora_B.shape[0], p.lora_A.shape[1], p.lora_A.shape[0]) for p in pairs]
