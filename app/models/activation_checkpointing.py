"""Recompute activations outside training mode.

The one file of the room that uses a private name of a library. transformers checkpoints a block in training
mode alone, through the block's `_gradient_checkpointing_func`; a public switch of the block that does not
depend on its mode would replace it.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer


@contextmanager
def recomputing(model: nn.Module) -> Iterator[None]:
    """Let blocks whose activation checkpointing is switched on recompute in evaluation mode too.

    Only the checkpoint's own wrapper sees training mode; what the block computes stays in evaluation mode, and
    the model is restored on exit.
    """

    def evaluated(block: nn.Module, checkpoint: Callable[..., Any]) -> Callable[..., Any]:
        def run(forward: Callable[..., Any], *args: Any) -> Any:
            def in_evaluation_mode(*inputs: Any) -> Any:
                block.training = False
                try:
                    return forward(*inputs)
                finally:
                    block.training = True

            return checkpoint(in_evaluation_mode, *args)

        return run

    blocks: list[tuple[Any, Any]] = [
        (module, module._gradient_checkpointing_func)  # transformers has no public name for it
        for module in model.modules()
        if isinstance(module, GradientCheckpointingLayer) and module.gradient_checkpointing
    ]
    for block, checkpoint in blocks:
        block.training = True
        block._gradient_checkpointing_func = evaluated(block, checkpoint)
    try:
        yield
    finally:
        for block, checkpoint in blocks:
            block.training = False
            block._gradient_checkpointing_func = checkpoint
