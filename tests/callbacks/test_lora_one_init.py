"""What LoraOneInit installs: the size and the direction of the first step, on tiny models."""

import copy

import pytest
import torch
from torch import nn

from app.models.adapter_config import LoraSettings
from app.models.lora import add_lora, lora_pairs
from callbacks.lora_one_init import LoraOneInit
from tests.support.initialize import initialize
from tests.support.one_step_oracle import make_batches

BUILDERS = ["tiny_llama", "tiny_gpt2", "tiny_t5"]


def initialized(plain, gamma):
    """Run the callback on a copy of the model; return the wrapped copy."""
    model = add_lora(copy.deepcopy(plain), LoraSettings(r=4)).train()
    batches = make_batches(plain.config.is_encoder_decoder, rows=12, size=4)
    assert initialize(LoraOneInit(gamma=gamma), model, batches).model_extra["gamma"] == gamma
    return model


def delta_weights(model):
    """Return PEFT's own update of each weight, in that weight's layout."""
    return {
        pair.name: pair.layer.get_delta_weight("default").detach() for pair in lora_pairs(model)
    }


@pytest.mark.parametrize("gamma", [16.0, 128.0, 1000.0])
def test_the_first_step_has_spectral_norm_scaling_over_gamma(gamma, tiny_llama):
    plain = tiny_llama()
    model = initialized(plain, gamma)
    deltas = delta_weights(model)
    assert len(deltas) == 14
    for pair in lora_pairs(model):
        assert pair.scaling == 8
        top = float(torch.linalg.svdvals(deltas[pair.name].double())[0])
        assert top == pytest.approx(pair.scaling / gamma, rel=1e-4), pair.name


def loss_of(model, batch):
    """Return the token mean, in float64: transformers' own loss rounds to float32."""
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask", "labels")}
    with torch.no_grad():
        logits = model(**inputs, use_cache=False).logits.double()
    labels = batch["labels"]
    if not model.config.is_encoder_decoder:
        logits, labels = logits[:, :-1], labels[:, 1:]
    return float(nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()))


@pytest.mark.parametrize("build", BUILDERS)
def test_every_layers_step_lowers_the_loss_on_the_initialization_set(build, request):
    """Added to the plain model's weights one at a time, and all at once through PEFT's forward."""
    plain = request.getfixturevalue(build)()
    model = initialized(plain, 2e3).double().eval()
    deltas = delta_weights(model)
    [batch] = make_batches(plain.config.is_encoder_decoder, rows=12, size=12)
    plain = plain.double()
    before = loss_of(plain, batch)
    change = {}
    for name, delta in deltas.items():
        weight = plain.get_submodule(name).weight.detach()
        assert delta.shape == weight.shape
        kept = weight.clone()
        weight.add_(delta)
        change[name] = loss_of(plain, batch) - before
        weight.copy_(kept)
    assert max(change.values()) < 0, max(change, key=change.__getitem__)
    # Steps this small add up.
    together = loss_of(model, batch) - before
    assert together == pytest.approx(sum(change.values()), rel=0.1)
