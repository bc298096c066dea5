"""Hooks on a layer's input and output gradient in a backward pass, without touching its weight.

For a linear layer the weight gradient is a sum over tokens, G = sum_t delta_t x_t^T, where x_t is the
layer's input and delta_t the loss gradient at its output. Whoever sees (x, delta) can therefore build
G, or any sketch of it, whether the weight is frozen, sharded or quantised. A weight that is no linear layer's,
such as the fused experts of a mixture, has its own gradient observed, G itself.
"""

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

Listener = Callable[[Tensor, Tensor, Sequence[str]], None]
"""Called with x (tokens, n), delta (tokens, m) and the names of x's readers, once per use of a layer.

The layers that read one x, such as q, k and v, get one sequence, the object itself.
"""
WeightListener = Callable[[Tensor], None]
"""Called with the gradient of a weight, of the weight's shape, once for each forward pass of its module."""


class _Tap(torch.autograd.Function):
    """Identity in the forward pass; hands (x, delta) to the listener in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        output: Tensor,
        x: Tensor,
        anchor: Tensor,
        listener: Listener,
        readers: Sequence[str],
    ) -> Tensor:
        ctx.save_for_backward(x)
        ctx.listener, ctx.readers = listener, readers
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None, None, None]:
        (x,) = ctx.saved_tensors
        (delta,) = grad_outputs
        ctx.listener(x.reshape(-1, x.shape[-1]), delta.reshape(-1, delta.shape[-1]), ctx.readers)
        return delta, None, None, None, None


@contextmanager
def observe(layers: Mapping[str, nn.Module], listeners: Mapping[str, Listener]) -> Iterator[None]:
    """Call `listeners[name](x, delta, readers)` whenever the backward pass goes through `layers[name]`.

    The layer's output enters the autograd graph here even when nothing before it requires a gradient
    (the first block of a frozen model), so no layer is missed and no embedding has to be unfrozen. Works
    under activation checkpointing without re-entry: the recomputed forward installs the tap again.

    Args:
        layers: Modules that map x (..., n) to (..., m), by name. Not modified.
        listeners: One callable for each name.
    """
    # A tap's output requires a gradient only if one of its tensor inputs does: this one always does.
    anchor = torch.zeros((), requires_grad=True)
    last: weakref.ref[Tensor] | None = None  # the input that was read last
    readers: list[str] = []  # of it

    def hook(name: str) -> Callable[..., Tensor]:
        def tap(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
            nonlocal last, readers
            if not torch.is_grad_enabled():
                return output
            if last is None or last() is not args[0]:
                last, readers = weakref.ref(args[0]), []
            readers.append(name)
            return _Tap.apply(output, args[0].detach(), anchor, listeners[name], readers)

        return tap

    handles = [layer.register_forward_hook(hook(name)) for name, layer in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _WeightTap(torch.autograd.Function):
    """Identity in the forward pass; hands the weight's gradient to the listener in the backward pass."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, anchor: Tensor, listener: WeightListener) -> Tensor:
        ctx.listener = listener
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[None, None, None]:
        ctx.listener(*grad_outputs)
        return None, None, None


@contextmanager
def observe_weights(
    weights: Mapping[str, tuple[nn.Module, str]], listeners: Mapping[str, WeightListener]
) -> Iterator[None]:
    """Call `listeners[name](G)` with a weight's gradient whenever the backward pass goes through its module.

    During a forward pass of the module a tap stands in the weight's place: so the weight is one tensor in the
    graph however often it is read, and its gradient lives until the listener has had it. Works under activation
    checkpointing without re-entry.

    Args:
        weights: Modules and the names of their parameters, by name. Not modified.
        listeners: One callable for each name.
    """
    anchor = torch.zeros((), requires_grad=True)
    handles = []

    def hook(module: nn.Module, parameter: str, listener: WeightListener) -> None:
        held: list[Tensor | None] = []

        def tap(*_: Any) -> None:
            if torch.is_grad_enabled():
                weight = module._parameters[parameter]
                held.append(weight)
                # Not by setattr, which takes nothing but a Parameter here.
                module._parameters[parameter] = _WeightTap.apply(weight, anchor, listener)

        def restore(*_: Any) -> None:
            if held:
                module._parameters[parameter] = held.pop()  # type: ignore[assignment]

        handles.append(module.register_forward_pre_hook(tap))
        handles.append(module.register_forward_hook(restore, always_call=True))

    for name, (module, parameter) in weights.items():
        hook(module, parameter, listeners[name])
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def frozen(model: nn.Module, train_mode: bool = False) -> Iterator[None]:
    """Hold the model in one mode, no parameter requiring a gradient, then restore modes and flags exactly."""
    modes = [(module, module.training) for module in model.modules()]
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    model.train(train_mode)
    for parameter, _ in flags:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        for module, mode in modes:
            module.training = mode
