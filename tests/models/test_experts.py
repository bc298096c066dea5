import copy

import peft
import pytest
import torch

from app.models.adapter_config import AdaLoraBudget, LoraSettings
from app.models.adapter_format import unserved_settings
from app.models.adapter_io import load_adapter, read_adapter, save_adapter
from app.models.lora import (
    add_lora,
    base_weight,
    install,
    lora_pairs,
    stacked_pairs,
    subtract_from_base,
)
from app.models.merging import merge_adapter
from app.utils.errors import InputError
from tests.support.mixtures import EXPERTS, MIXTURES, TARGETS, build_mixture, weights_by_pair
from tests.support.one_step_oracle import make_batches, model_inputs


def logits(model):
    with torch.no_grad():
        return model(**model_inputs(make_batches(model.config.is_encoder_decoder)[0])).logits


def filled(kind, **settings):
    """Return a model with an adapter of random factors, and the plain model with W + Delta W of each pair."""
    plain = build_mixture(kind)
    settings = {"r": 2, "lora_alpha": 3, **TARGETS.get(kind, {}), **settings}
    model = add_lora(copy.deepcopy(plain), LoraSettings(**settings)).eval()
    weights = weights_by_pair(plain)
    for pair in lora_pairs(model):
        install(pair, 0.3 * torch.randn(pair.lora_A.shape), 0.3 * torch.randn(pair.lora_B.shape))
        weights[pair.name] += pair.scaling * (pair.lora_B @ pair.lora_A).detach()
    return model, plain


@pytest.mark.parametrize("kind", MIXTURES)
def test_the_forward_pass_is_that_of_w_plus_delta_w_of_each_expert(kind, tmp_path):
    """As trained, saved and loaded by ours and by plain PEFT, and merged."""
    model, plain = filled(kind)
    assert any(pair.is_expert for pair in lora_pairs(model))
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    assert trained == {id(p) for pair in stacked_pairs(model) for p in (pair.lora_A, pair.lora_B)}
    wanted = logits(plain)
    assert not torch.allclose(wanted, logits(build_mixture(kind)), atol=1e-2)
    assert torch.allclose(logits(model), wanted, atol=1e-5)
    save_adapter(model, tmp_path, "base")
    told = unserved_settings(read_adapter(tmp_path)[0].to_dict())
    fused = ("LoRA of fused experts (target_parameters)", "--merge")
    assert told == (None if kind == "switch" else fused)
    assert torch.allclose(
        logits(load_adapter(build_mixture(kind), tmp_path, trainable=False)), wanted, atol=1e-5
    )
    by_peft = peft.PeftModel.from_pretrained(build_mixture(kind), str(tmp_path)).eval()
    assert torch.allclose(logits(by_peft), wanted, atol=1e-5)
    merged, _ = merge_adapter(model)
    assert torch.allclose(logits(merged), wanted, atol=1e-5)


@pytest.mark.parametrize("kind", MIXTURES)
def test_what_is_subtracted_from_each_expert_leaves_the_model_as_it_was(kind, tmp_path):
    """Until it is trained; the adapter that is saved belongs to the untouched base."""
    model, _ = filled(kind)
    before, pairs = logits(build_mixture(kind)), lora_pairs(model)
    factors = {p.name: (p.lora_A.detach().clone(), p.lora_B.detach().clone()) for p in pairs[1:]}
    untouched = weights_by_pair(build_mixture(kind))
    install(pairs[0], torch.zeros_like(pairs[0].lora_A), torch.zeros_like(pairs[0].lora_B))
    for pair in pairs[1:]:
        assert torch.equal(base_weight(pair), untouched[pair.name])
        subtract_from_base(pair, *factors[pair.name])
    assert torch.allclose(logits(model), before, atol=1e-5)
    for pair in pairs:
        install(pair, pair.lora_A + 0.1 * torch.randn(pair.lora_A.shape), pair.lora_B)
    save_adapter(model, tmp_path, "base", factors)
    by_peft = peft.PeftModel.from_pretrained(build_mixture(kind), str(tmp_path)).eval()
    assert not torch.allclose(logits(model), before, atol=1e-3)
    # The sum of three products is rounded in another order.
    assert torch.allclose(logits(by_peft), logits(model), atol=5e-5)


def test_names_ranks_and_patterns_of_fused_experts():
    """PEFT gives two projections that are one parameter twice the rank; patterns see the parameter's name."""
    patterns = {"rank_pattern": {"experts.down_proj": 3}, "alpha_pattern": {"gate.weight": 5}}
    model = add_lora(build_mixture("mixtral"), LoraSettings(r=2, lora_alpha=3, **patterns))
    pairs = {pair.name: pair for pair in lora_pairs(model)}
    block = "model.layers.1.mlp"
    names = [f"{block}.experts.{p}.{e}" for p in ("gate_up_proj", "down_proj") for e in range(4)]
    assert {*names, f"{block}.gate.weight"} <= set(pairs)
    assert not pairs[f"{block}.gate.weight"].is_expert
    assert [pairs[name].rank for name in names] == EXPERTS * [4] + EXPERTS * [3]
    assert pairs[f"{block}.gate.weight"].scaling == pytest.approx(5 / 2**0.5)
    assert pairs[names[0]].scaling == pytest.approx(6 / 4**0.5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"use_dora": True}, r"PEFT: lora\.ParamWrapper does not work with use_dora=True"),
        ({"lora_dropout": 0.1}, r"ParamWrapper does not work with lora_dropout != 0.*\[q_proj"),
        ({"exclude_modules": ["gate"]}, r"exclude_modules is \['gate'\], but PEFT adapts .*gate"),
        ({"exclude_modules": ".*experts"}, r"adapts model\.layers\.0\.mlp\.experts"),
        (
            {"target_modules": ["w2"], "layers_to_transform": [0]},
            r"layers_to_transform is \[0\], but PEFT adapts .*down_proj",
        ),
        ({"target_modules": ["w1"]}, "Cannot convert PEFT target.* without also targeting w3"),
        ({"target_parameters": ["up"]}, "target_parameters names 'up', which is no parameter"),
        ({"r": 5}, r"r is 5, but model\.layers\.0\.mlp\.gate\.weight has shape \(4, 16\)"),
        (
            {"r": 9, "target_modules": ["w1", "w3"]},
            r"r is 9, but .*gate_up_proj has shape \(48, 16\): set model\.adapter\.r to at most 8",
        ),
    ],
)
def test_what_peft_cannot_do_or_ignores_with_fused_experts_is_refused(settings, message):
    with pytest.raises(InputError, match=message) as error:
        add_lora(build_mixture("mixtral"), LoraSettings(**{"r": 2, **settings}))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "settings", [{"use_dora": True}, {"lora_dropout": 0.1}, {"adalora": {"init_r": 8}}]
)
def test_target_parameters_exclude_settings_by_themselves(settings):
    settings = {k: AdaLoraBudget(**v) if k == "adalora" else v for k, v in settings.items()}
    with pytest.raises(InputError, match="target_parameters"):
        LoraSettings(target_parameters=["experts.down_proj"], **settings)
