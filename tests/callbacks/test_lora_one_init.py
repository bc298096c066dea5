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


def loss_of(model, batch):
    """Return the token mean, in float64: transformers' own loss rounds to float32."""
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask", "labels")}
    with torch.no_grad():
        logits = model(**inputs, use_cache=False).logits.double()
    labels = batch["labels"]
    if not model.config.is_encoder_decoder:
        logits, labels = logits[:, :-1], labels[:, 1:]
    return float(nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()))


@pytest.mark.parametrize("build", ["tiny_llama", "tiny_gpt2", "tiny_t5"])
def test_every_layers_step_has_its_norm_and_lowers_the_loss(build, request):
    """Spectral norm scaling / gamma; added to the plain weights one at a time, and all at once by PEFT."""
    plain, gamma = request.getfixturevalue(build)(), 2e3
    is_encoder_decoder = plain.config.is_encoder_decoder
    model = add_lora(copy.deepcopy(plain), LoraSettings(r=4)).train()
    record = initialize(LoraOneInit(gamma=gamma), model, make_batches(is_encoder_decoder, 12, 4))
    assert record.model_extra["gamma"] == gamma
    [batch] = make_batches(is_encoder_decoder, rows=12, size=12)
    plain, model = plain.double(), model.double().eval()
    before = loss_of(plain, batch)
    change = {}
    for pair in lora_pairs(model):
        delta = pair.layer.get_delta_weight("default").detach()  # in the layout of the weight
        assert pair.scaling == 8
        top = float(torch.linalg.svdvals(delta)[0])
        assert top == pytest.approx(pair.scaling / gamma, rel=1e-4), pair.name
        weight = plain.get_submodule(pair.name).weight.detach()
        assert delta.shape == weight.shape
        kept = weight.clone()
        weight.add_(delta)
        change[pair.name] = loss_of(plain, batch) - before
        weight.copy_(kept)
    assert len(change) >= 8
    assert max(change.values()) < 0, max(change, key=change.__getitem__)
    # Steps this small add up.
    together = loss_of(model, batch) - before
    assert together == pytest.approx(sum(change.values()), rel=0.1)
