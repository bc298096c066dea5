"""Run the untouched model with hooks on the layers of LoRA pairs."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn

from app.initialization.gradient_hooks import (
    Listener,
    WeightListener,
    frozen,
    observe,
    observe_weights,
)
from app.models.activation_checkpointing import recomputing
from app.models.experts import FusedParameter, fused_parameter
from app.models.lora import LoraPair, without_adapters


@contextmanager
def observed(
    model: nn.Module,
    pairs: Sequence[LoraPair],
    listener: Callable[[str], Listener] | None,
    train_mode: bool = False,
) -> Iterator[None]:
    """Run the untouched model, frozen, with `listener(pair.name)` on each pair; None hears nothing.

    Args:
        model: The PEFT model.
        pairs: Layers to observe.
        listener: Makes a pair's listener.
        train_mode: Run in training mode, in which dropout acts.
    """
    linear, linear_listeners = {}, {}
    weights, weight_listeners = {}, {}
    for layer, group in itertools.groupby(pairs, key=lambda pair: pair.layer):
        experts = list(group)
        name = experts[0].name
        listeners = [listener(pair.name) if listener else _ignore for pair in experts]
        if (parameter := fused_parameter(layer)) is None:
            linear[name], linear_listeners[name] = layer, listeners[0]
        else:
            weights[name] = parameter
            spread = _spread(parameter, experts, listeners) if listener else _ignore
            weight_listeners[name] = spread
    with (
        frozen(model, train_mode),
        nullcontext() if train_mode else recomputing(model),
        without_adapters(model),
        observe(linear, linear_listeners),
        observe_weights(weights, weight_listeners),
    ):
        yield


def _ignore(*_: object) -> None:
    pass


def _spread(
    parameter: FusedParameter, pairs: Sequence[LoraPair], listeners: Sequence[Listener]
) -> WeightListener:
    """Hand each expert's part G of a fused parameter's gradient to its listener.

    As the (x, delta) of min(m, n) tokens: G = I G = G I. An expert without tokens hears nothing.
    """

    def listen(gradient: Tensor) -> None:
        matrices = parameter.matrices(gradient)
        reached = matrices.flatten(1).any(dim=1).tolist()
        eye = torch.eye(min(matrices.shape[1:]), dtype=gradient.dtype, device=gradient.device)
        for pair, hear in zip(pairs, listeners, strict=True):
            G = matrices[pair.expert or 0]
            if reached[pair.expert or 0]:
                hear(*((G, eye) if len(G) <= G.shape[1] else (eye, G.T)), [pair.name])

    return listen
