"""FSDP2 as a Lightning strategy: frozen base weights sharded, LoRA factors whole on every process."""

from collections.abc import Iterator
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import ModelParallelStrategy, Strategy
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor
from typing_extensions import override


class Fsdp2Strategy(ModelParallelStrategy):
    """Shard every transformer block of the frozen base over all processes (`fully_shard`).

    The LoRA factors stay whole and in float32 on every process: they are a thousandth of the model, and
    so the optimizer, its preconditioner, clipping and checkpoints are those of a single process. Their
    gradients are summed once an optimizer step, in one buffer.

    Args:
        param_dtype: Type in which weights are gathered and computed with; null is `model.dtype`.
        cpu_offload: Keep each process's shard in host memory between uses.
        reshard_after_forward: Free a block's gathered weights between its forward and its backward pass;
            false gathers once a step and holds the whole model meanwhile.
        process_group_backend: torch.distributed backend; null chooses nccl on CUDA (and gloo beside it where
            `cpu_offload` keeps weights in host memory) and gloo on CPU.
        timeout: Longest wait for another process.
    """

    def __init__(
        self,
        param_dtype: Literal["float32", "bfloat16", "float16"] | None = None,
        cpu_offload: bool = False,
        reshard_after_forward: bool = True,
        process_group_backend: str | None = None,
        timeout: timedelta = timedelta(minutes=30),
    ) -> None:
        if process_group_backend is None and cpu_offload and torch.cuda.is_available():
            process_group_backend = "cpu:gloo,cuda:nccl"
        super().__init__(process_group_backend=process_group_backend, timeout=timeout)
        self.param_dtype = param_dtype
        self.cpu_offload = cpu_offload
        self.reshard_after_forward = reshard_after_forward

    def shard(self, model: nn.Module) -> None:
        """Replace every frozen parameter of a model by this process's shard, in place.

        The first process has the weights and broadcasts them, one at a time; the others hold no more than
        their shards and one weight, and their `model` is on the meta device before.
        """
        weights = model.state_dict() if self.global_rank == 0 else {}
        trainable = {p for p in model.parameters() if p.requires_grad}
        dtype = None if self.param_dtype is None else getattr(torch, self.param_dtype)
        offload: OffloadPolicy = OffloadPolicy()
        if self.cpu_offload:
            offload = CPUOffloadPolicy(pin_memory=self.root_device.type == "cuda")
        options: dict[str, Any] = {
            "mesh": init_device_mesh(self.root_device.type, (self.world_size,)),
            "mp_policy": MixedPrecisionPolicy(param_dtype=dtype),
            "offload_policy": offload,
            "reshard_after_forward": self.reshard_after_forward,
            "ignored_params": trainable,
        }
        for block in blocks(model):
            fully_shard(block, **options)
        fully_shard(model, **options)
        device = torch.device("cpu") if self.cpu_offload else self.root_device
        if self.global_rank == 0:
            model.to(device)
        else:
            model.to_empty(device=device)
        set_model_state_dict(
            model,
            weights,
            options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, strict=False),
        )
        # Tables that the model computes when it is built are in no state_dict.
        for buffer in model.buffers():
            dist.broadcast(buffer, src=0)

    @override
    def model_to_device(self) -> None:
        """Move what is not sharded, and the shards too unless they stay in host memory."""
        if not self.cpu_offload:
            super().model_to_device()
            return
        assert self.model is not None
        for tensor in (*self.model.parameters(), *self.model.buffers()):
            if not isinstance(tensor, DTensor):
                tensor.data = tensor.data.to(self.root_device)

    @property
    @override
    def restore_checkpoint_after_setup(self) -> bool:
        return False

    @property
    @override
    def lightning_restore_optimizer(self) -> bool:
        return True

    @override
    def lightning_module_state_dict(self) -> dict[str, Tensor]:
        """Return the trainable weights: whole tensors, without a gather."""
        assert self.lightning_module is not None
        named = self.lightning_module.named_parameters()
        return {name: p.detach() for name, p in named if p.requires_grad}

    # What is saved is whole on every process, so saving and loading are those of one process. They are public
    # methods of Lightning's base class, which ModelParallelStrategy overrides for sharded checkpoints.
    load_model_state_dict = Strategy.load_model_state_dict
    optimizer_state = Strategy.optimizer_state
    load_optimizer_state_dict = Strategy.load_optimizer_state_dict
    save_checkpoint = Strategy.save_checkpoint
    load_checkpoint = Strategy.load_checkpoint


def blocks(model: nn.Module) -> Iterator[nn.Module]:
    """Yield the transformer blocks of any architecture: the members of the outermost module lists."""
    for child in model.children():
        if isinstance(child, nn.ModuleList):
            yield from child
        else:
            yield from blocks(child)
