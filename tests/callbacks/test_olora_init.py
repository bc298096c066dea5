"""OLoRA: the factors and the training against PEFT."""

import copy

import pytest
import torch
from peft import get_peft_model

from app.initialization.weight_factors import olora_factors
from app.models.lora import base_weight, lora_pairs
from tests.support.one_step_oracle import make_batches
from tests.support.subtracted import R, initialized, peft_config
from tests.support.watched_fit import logits, plain_loop


@pytest.mark.parametrize("build", ["tiny_llama", "tiny_t5"])
def test_olora_and_ten_steps_of_it_are_pefts(build, request):
    base = request.getfixturevalue(build)()
    ours, _ = initialized(base, lambda pair: olora_factors(base_weight(pair).float(), R))
    theirs = get_peft_model(copy.deepcopy(base), peft_config(build, init_lora_weights="olora"))
    for mine, other in zip(lora_pairs(ours), lora_pairs(theirs), strict=True):
        assert mine.name == other.name
        assert torch.allclose(mine.lora_A, other.lora_A, atol=1e-6)
        assert torch.allclose(mine.lora_B, other.lora_B, atol=1e-6)
        assert torch.allclose(base_weight(mine), base_weight(other), atol=1e-5)
    assert torch.allclose(logits(ours), logits(base), atol=1e-4)
    batches = make_batches(build == "tiny_t5", rows=20, size=2)
    losses = [plain_loop(model, batches) for model in (ours, theirs)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_a_transposed_weight_is_decomposed_as_any_other(tiny_gpt2):
    """PEFT takes GPT-2's (n, m) for (m, n): its factors fit square weights alone."""
    model, factors = initialized(
        tiny_gpt2(), lambda pair: olora_factors(base_weight(pair).float(), R)
    )
    assert torch.allclose(logits(model), logits(tiny_gpt2()), atol=1e-4)
    for pair in lora_pairs(model):
        A, B = factors[pair.name]
        assert torch.allclose(B.T @ B, torch.eye(R), atol=1e-5)
        restored = base_weight(pair) + pair.scaling * B @ A
        assert torch.allclose(B.T @ restored, A, atol=1e-4)
