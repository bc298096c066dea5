"""Adapter folders for readers that know lora_alpha / r alone."""

import copy

import pytest
import torch
from peft import PeftModel

from app.initialization.factors import pissa_factors
from app.models.adapter_config import LoraSettings
from app.models.adapter_io import save_adapter
from app.models.lora import add_lora, base_weight, install, lora_pairs, subtract_from_base
from tests.support.alpha_r_reader import with_adapter
from tests.support.watched_fit import logits


def perturb(model):
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))


@pytest.mark.parametrize("subtracts", [False, True])
def test_an_embedding_among_the_targets(subtracts, tiny_llama, tmp_path):
    """It has no pair, so that PiSSA and LoRA-GA leave it alone; all layers are written with one rank."""
    base = tiny_llama()
    model = add_lora(
        copy.deepcopy(base), LoraSettings(r=4, target_modules=["q_proj", "embed_tokens"])
    )
    factors = {}
    for pair in lora_pairs(model) if subtracts else []:
        factors[pair.name] = pissa_factors(base_weight(pair).float(), 4, pair.scaling)
        subtract_from_base(pair, *factors[pair.name])
        install(pair, *factors[pair.name])
    perturb(model)
    trained = logits(model)
    assert (trained - logits(base)).abs().max() > 0.05
    save_adapter(model, tmp_path, "somewhere", factors)
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    assert torch.allclose(logits(loaded), trained, atol=1e-5)
    assert torch.allclose(logits(with_adapter(base, tmp_path)), trained, atol=1e-5)
