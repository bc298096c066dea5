"""Turn AdaLoRA, or LoRA with ranks and scalings of each layer's own, into LoRA that every reader applies."""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import torch
from peft import AdaLoraConfig, LoraConfig
from torch import Tensor

from app.models.adapter_format import factor_of, rank_and_alpha
from app.utils.errors import InputError

_EPSILON = 1e-5  # that PEFT adds to the rank in AdaLoRA's scaling


def plain_lora(
    config: LoraConfig, state: Mapping[str, Tensor]
) -> tuple[LoraConfig, dict[str, Tensor]]:
    """Return an adapter as LoRA of one rank and one scaling, which needs no patterns.

        LoRA:       lora_B <- s lora_B,                     s = lora_alpha / r of the layer
        AdaLoRA:    lora_B <- s lora_B diag(lora_E),        s = lora_alpha / (init_r + 1e-5)

    without the triplets that AdaLoRA has pruned, and with zeros up to the largest rank r of a layer. The
    scaling of all layers is 1: lora_alpha is r.

    Args:
        config: From `fold_scaling`; not modified.
        state: The adapter's tensors by their keys: lora_A (r, n), lora_B (m, r), AdaLoRA's lora_E (r, 1).

    Returns:
        Configuration and tensors; the same if the adapter is of that kind already.

    Raises:
        InputError: If no LoRA computes what the adapter does, or its layers are parameters with patterns.
    """
    adalora = config if isinstance(config, AdaLoraConfig) else None
    if config.use_dora:
        raise InputError(
            "--as lora is given, but the run's adapter is DoRA's (use_dora), whose norms depend on the base "
            "weights: give --merge, or leave --as out"
        )
    if adalora is None and not config.rank_pattern and not config.alpha_pattern:
        return config, dict(state)
    if config.target_parameters:
        raise InputError(
            "--as lora is given, but the run's adapter has target_parameters whose ranks or scalings differ: "
            "give --merge, or leave --as out"
        )
    layers: dict[str, dict[str, tuple[str, Tensor]]] = defaultdict(dict)
    for key, value in state.items():
        if (factor := factor_of(key)) is not None:
            layers[factor[0]][factor[1]] = (key, value)
    pairs: dict[str, Tensor] = {}
    rank = 1
    for name, factors in layers.items():
        (key_A, A), (key_B, B) = factors["A"], factors["B"]
        if adalora is not None:
            E = factors["E"][1].flatten()
            A, B = A[E != 0], (B * E)[:, E != 0]
            scaling = config.lora_alpha / (adalora.init_r + _EPSILON)
            key_A, key_B = f"{key_A}.weight", f"{key_B}.weight"
        else:
            r, alpha = rank_and_alpha(config, name)
            scaling = alpha / r
        pairs |= {key_A: A, key_B: scaling * B}
        rank = max(rank, len(A))
    return _of_rank(config, rank), {key: _padded(key, value, rank) for key, value in pairs.items()}


def _padded(key: str, value: Tensor, rank: int) -> Tensor:
    """Return lora_A (r, n) or lora_B (m, r) with rows or columns of zeros up to a rank."""
    factor = factor_of(key)
    dim = 0 if factor and factor[1] == "A" else 1
    shape = list(value.shape)
    shape[dim] = rank - shape[dim]
    return torch.cat([value, value.new_zeros(shape)], dim)


def _of_rank(config: LoraConfig, rank: int) -> LoraConfig:
    """Return the configuration of LoRA with a scaling of 1 on the layers that a configuration adapts."""
    own = {field.name for field in fields(LoraConfig) if field.init} - {"peft_type"}
    kept: dict[str, Any] = {name: getattr(config, name) for name in own}
    plain = {"r": rank, "lora_alpha": rank, "rank_pattern": {}, "alpha_pattern": {}}
    return LoraConfig(**{**kept, **plain})
