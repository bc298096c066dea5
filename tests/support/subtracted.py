"""Models whose factors are subtracted from their base, ours and PEFT's."""

import copy

from peft import LoraConfig

from app.models.adapter_config import LoraSettings
from app.models.lora import add_lora, install, lora_pairs, subtract_from_base

R = 4


def initialized(base, factors, use_rslora=True):
    """Return a wrapped copy with `factors(pair)` in it and subtracted from its base, and the factors."""
    model = add_lora(copy.deepcopy(base), LoraSettings(r=R, use_rslora=use_rslora))
    installed = {}
    for pair in lora_pairs(model):
        installed[pair.name] = factors(pair)
        subtract_from_base(pair, *installed[pair.name])
        install(pair, *installed[pair.name])
    return model, installed


def peft_config(build, **options):
    """Return PEFT's settings of the same adapter."""
    return LoraConfig(
        r=R,
        lora_alpha=16,
        use_rslora=True,
        target_modules="all-linear",
        fan_in_fan_out=build == "tiny_gpt2",
        **options,
    )
