"""What is left of an update in merged weights, against numpy."""

import copy

import numpy as np
import pytest
import torch

from app.models.adapter_config import LoraSettings
from app.models.lora import add_lora, base_weight, install, lora_pairs
from app.models.merging import merge_adapter, round_trained, survived_share
from app.utils.errors import InputError


def to_bfloat16(values):
    """Round to the nearest bfloat16, to the even one of two, by the bits of float32."""
    bits = values.astype(np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).view(np.float32)


def share(W, update, written):
    change = written.astype(np.float64) - W
    return float((change * update).sum() / (update * update).sum())


@pytest.mark.parametrize(
    ("size", "expected"), [(1e-5, (0.3, 0.9)), (1e-6, (0.0, 0.2)), (0.1, (0.99, 1.01))]
)
@pytest.mark.parametrize("build", ["tiny_llama", "tiny_gpt2"])
def test_the_share_of_each_update_that_bfloat16_keeps(build, size, expected, request):
    """Entries below half a unit in the last place of a bfloat16 weight are lost, whatever adds them."""
    base = request.getfixturevalue(build)().bfloat16().float()
    model = add_lora(base, LoraSettings(r=4))
    wanted, weights = {}, {}
    for pair in lora_pairs(model):
        A, B = torch.randn_like(pair.lora_A), size / 8 * torch.randn_like(pair.lora_B)
        install(pair, A, B)
        W = base_weight(pair).double().numpy()
        update = pair.scaling * B.double().numpy() @ A.double().numpy()
        weights[pair.name] = to_bfloat16(W + update)
        wanted[pair.name] = share(W, update, weights[pair.name])
    merged, survived = merge_adapter(model, torch.bfloat16)
    assert survived.shares == pytest.approx(wanted, rel=0.01, abs=1e-3)
    assert expected[0] <= survived.mean <= expected[1]
    assert survived.mean == pytest.approx(np.mean(list(wanted.values())), rel=0.01, abs=1e-3)
    assert survived.worst == min(wanted, key=wanted.get)
    for name, weight in weights.items():
        found = merged.get_submodule(name).weight
        assert found.dtype == torch.bfloat16
        found = found.T if build == "tiny_gpt2" else found
        assert np.mean(found.float().numpy() == weight) > 0.999  # float32 sums, then one rounding
    buffers = {name: buffer.dtype for name, buffer in merged.named_buffers()}
    assert torch.bfloat16 not in buffers.values()


def test_a_model_whose_every_weight_was_trained(tiny_llama):
    base = tiny_llama().bfloat16().float()
    trained = copy.deepcopy(base)
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter.add_(2e-5 * torch.randn_like(parameter))
        trained.model.norm.weight.copy_(base.model.norm.weight)
    before = {
        name: p.detach().double().numpy() for name, p in base.named_parameters() if p.ndim == 2
    }
    after = {name: p.detach().double().numpy() for name, p in trained.named_parameters()}
    rounded, survived = round_trained(trained, base, torch.bfloat16)
    assert "model.norm" not in survived.shares
    for name, W in before.items():
        wanted = share(W, after[name] - W, to_bfloat16(after[name]))
        assert survived.shares[name.removesuffix(".weight")] == pytest.approx(wanted, rel=0.01)
        assert np.array_equal(
            rounded.get_parameter(name).detach().float().numpy(), to_bfloat16(after[name])
        )
    assert survived.mean < 0.7


def test_all_of_an_update_can_be_kept():
    W = torch.linspace(0.1, 1, 10)
    assert survived_share(W, W + 1e-3, (W + 1e-3).bfloat16()) < 0.9
    assert survived_share(W, W + 1e-3, W + 1e-3) == 1


def test_a_factor_that_is_not_finite(tiny_llama):
    model = add_lora(tiny_llama(), LoraSettings(r=4))
    [pair, *_] = lora_pairs(model)
    install(pair, pair.lora_A, torch.full_like(pair.lora_B, float("nan")))
    with pytest.raises(InputError, match=rf"{pair.name} cannot be merged: NaNs detected"):
        merge_adapter(model)
