"""Refuse an adapter whose targets, ranks or patterns do not fit the model, in one line."""

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

from peft.utils.other import get_pattern_key
from torch import nn
from transformers.pytorch_utils import Conv1D

from app.models.adapter_config import LoraSettings
from app.models.experts import fused_parameter
from app.utils.errors import InputError
from app.utils.text import did_you_mean

NamedLayers = Sequence[tuple[str, Any]]
"""PEFT's LoRA layers, by their names in the base model."""

WITHOUT_FUSED = (
    "list model.adapter.target_modules without the routers and fused experts that PEFT's ParamWrapper "
    "adapts (gate, w1, w2, w3, gate_proj, up_proj, down_proj), such as [q_proj, v_proj]"
)


def unfit(reason: str) -> str:
    """Return the message for an adapter that PEFT cannot put on this model."""
    return (
        f"model.adapter does not work on this model (PEFT: {reason.splitlines()[0]}): change that setting, or "
        f"{WITHOUT_FUSED}"
    )


def no_target(model: nn.Module, targets: str | list[str], reason: str) -> str:
    """Return the message for targets that no module of the model fits."""
    kinds = Counter(
        name.rpartition(".")[2]
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D))
    )
    wanted = [targets] if isinstance(targets, str) else targets
    hint = "".join(did_you_mean(name, kinds, 0.4) for name in wanted if name not in kinds)
    listed = ", ".join(f"{kind} ({count})" for kind, count in sorted(kinds.items()))
    return (
        f"model.adapter.target_modules is {targets!r}, which fits no layer of this model{hint} "
        f"Its linear layers end in: {listed}. Set model.adapter.target_modules to some of these or to "
        f"all-linear. (PEFT: {reason.splitlines()[0]})"
    )


def check_targets(layers: NamedLayers, settings: LoraSettings) -> None:
    """Raise InputError for a setting that does not fit the adapted layers, or that PEFT ignored."""
    _check_patterns(layers, settings)
    _check_fused(layers, settings)
    _check_ranks(layers, settings)


def _check_ranks(layers: NamedLayers, settings: LoraSettings) -> None:
    name_of_rank = "r" if settings.adalora is None else "adalora.init_r"
    for name, layer in layers:
        [rank] = layer.r.values()
        shape = (int(layer.out_features or 0), int(layer.in_features or 0))
        if rank > min(shape):
            own = rank in settings.rank_pattern.values()
            # PEFT gives two projections that are fused into one twice the rank.
            times = rank // settings.r if fused_parameter(layer) and not own else 1
            setting = f"model.adapter.{'rank_pattern' if own else name_of_rank}"
            own_rank = "" if settings.adalora else ", give it its own in model.adapter.rank_pattern"
            raise InputError(
                f"{setting} is {rank // times}, but {name} has shape {shape}: set {setting} to at most "
                f"{min(shape) // times}{own_rank}, or leave the layer out of model.adapter.target_modules"
            )


def _check_patterns(layers: NamedLayers, settings: LoraSettings) -> None:
    """Raise InputError for a pattern that no adapted layer fits; PEFT would ignore it."""
    names = [name for name, _ in layers]
    for setting in ("rank_pattern", "alpha_pattern"):
        for pattern in getattr(settings, setting):
            if not any(get_pattern_key([pattern], name) == pattern for name in names):
                raise InputError(
                    f"model.adapter.{setting} names {pattern!r}, which fits no adapted layer: expected the "
                    f"end of a name or a regular expression, such as {names[0]}"
                )


def _check_fused(layers: NamedLayers, settings: LoraSettings) -> None:
    """Raise InputError for settings that PEFT ignores where it adapts a parameter without a layer."""
    fused = [name for name, layer in layers if fused_parameter(layer)]
    for wanted in settings.target_parameters or []:
        if not any(_ends(name, wanted) for name in fused):
            raise InputError(
                f"model.adapter.target_parameters names {wanted!r}, which is no parameter of this model: "
                "expected the end of a name, such as mlp.experts.down_proj"
            )
    excluded = settings.exclude_modules or []
    for name in fused:
        both = (name, name.rpartition(".")[0])
        if isinstance(excluded, str):
            hit = any(re.fullmatch(excluded, n) for n in both)
        else:
            hit = any(_ends(n, ending) for n in both for ending in excluded)
        setting = "exclude_modules" if hit else "layers_to_transform"
        if hit or settings.layers_to_transform is not None:
            raise InputError(
                f"model.adapter.{setting} is {getattr(settings, setting)!r}, but PEFT adapts {name} all the "
                f"same: leave it out, or {WITHOUT_FUSED}"
            )


def _ends(name: str, ending: str) -> bool:
    return f".{name}".endswith(f".{ending}")
