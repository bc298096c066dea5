"""Write an adapter so that readers which know lora_alpha / r alone apply it as it was trained."""

import copy
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

from peft import LoraConfig
from peft.utils.other import get_pattern_key

_FACTOR = re.compile(r"base_model\.model\.(.+)\.lora_(?:embedding_)?([ABE])(?:\.weight)?")


def factor_of(key: str) -> tuple[str, str] | None:
    """Return the layer's name and "A", "B" or "E" for the key of a factor in an adapter's file; else None."""
    match = _FACTOR.fullmatch(key)
    return None if match is None else (match[1], match[2])


def layer_names(keys: Iterable[str]) -> list[str]:
    """List the layers that an adapter's file has factors of."""
    return list(dict.fromkeys(factor[0] for key in keys if (factor := factor_of(key))))


def rank_and_alpha(config: LoraConfig, name: str) -> tuple[int, float]:
    """Return r and lora_alpha of the layer of that name, as PEFT reads them from the patterns."""
    ranks, alphas = config.rank_pattern or {}, config.alpha_pattern or {}
    r = ranks.get(get_pattern_key(list(ranks), name), config.r)
    return r, alphas.get(get_pattern_key(list(alphas), name), config.lora_alpha)


def fold_scaling(config: LoraConfig, layers: Iterable[str]) -> LoraConfig:
    """Return an adapter's configuration with each layer's scaling as lora_alpha / r, without rsLoRA.

        lora_alpha / sqrt(r) = (lora_alpha sqrt(r)) / r

    SGLang and llama.cpp ignore `use_rslora`. A layer whose lora_alpha differs from that of the others then,
    since a pattern sets its rank or its lora_alpha, is named in `alpha_pattern`.

    Args:
        config: PEFT's, of LoRA or AdaLoRA; not modified.
        layers: Names of the adapted layers.
    """
    folded: Any = copy.deepcopy(config)
    folded.lora_alpha = _whole(config.lora_alpha)
    if not config.use_rslora:
        return folded
    folded.use_rslora = False
    folded.lora_alpha = _whole(config.lora_alpha * math.sqrt(config.r))
    folded.alpha_pattern = {}
    for name in layers:
        r, alpha = rank_and_alpha(config, name)
        if _whole(alpha * math.sqrt(r)) != folded.lora_alpha:
            folded.alpha_pattern[f"^{name}"] = _whole(alpha * math.sqrt(r))
    return folded


def _whole(number: float) -> int | float:
    """Return a number that is whole up to its rounding as an integer, the type of PEFT's lora_alpha."""
    nearest = round(number)
    return nearest if math.isclose(number, nearest, rel_tol=1e-12) else number


def largest_rank(config: LoraConfig, layers: Iterable[str]) -> int:
    """Return the largest rank of any layer, which servers want to know beforehand."""
    return max([config.r, *(rank_and_alpha(config, name)[0] for name in layers)])


def unserved_settings(adapter: Mapping[str, Any]) -> tuple[str, str] | None:
    """Return what servers of plain LoRA do not apply of an adapter, and the option of `export` for it.

    Args:
        adapter: PEFT's configuration, as a mapping.

    Returns:
        None if they apply all.
    """
    if adapter["peft_type"] == "ADALORA":
        return "AdaLoRA", "--as lora"
    if adapter.get("target_parameters"):
        return "LoRA of fused experts (target_parameters)", "--merge"
    if adapter.get("use_dora"):
        return "DoRA (use_dora)", "--merge"
    names = [name for name in ("rank_pattern", "alpha_pattern") if adapter.get(name)]
    return (" and ".join(names), "--as lora") if names else None
