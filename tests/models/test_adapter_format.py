"""Adapters of every kind: PEFT, a reader of lora_alpha / r and a merged model compute what was trained."""

import copy
import itertools
import json

import pytest
import torch
from peft import PeftModel

from app.initialization.weight_factors import pissa_factors
from app.models.adapter_config import AdaLoraBudget, LoraSettings
from app.models.adapter_format import largest_rank, layer_names, unserved_settings
from app.models.adapter_io import load_adapter, read_adapter, save_adapter, write_adapter
from app.models.lora import add_lora, base_weight, install, lora_pairs, subtract_from_base
from app.models.merging import merge_adapter
from app.models.plain_lora import plain_lora
from app.utils.errors import InputError
from tests.support.alpha_r_reader import with_adapter
from tests.support.watched_fit import logits

LAYERS = {  # attention and feed-forward
    "tiny_llama": ("q_proj", "down_proj", "embed_tokens"),
    "tiny_gpt2": ("c_attn", "mlp.c_proj", "wpe"),
}
KINDS = {
    "lora": LoraSettings(r=4, use_rslora=False),
    "rslora": LoraSettings(r=3),
    "dora": LoraSettings(r=4, use_dora=True),
    "adalora": LoraSettings(r=2, adalora=AdaLoraBudget(init_r=4)),
}


def trained(base, settings):
    """Return an adapted copy of a model with random numbers in all that is trained, some triplets pruned."""
    model = add_lora(copy.deepcopy(base), settings)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.add_((2 if "lora_E" in name else 0.05) * torch.randn_like(parameter))
            if "lora_E" in name:
                parameter[1:] *= torch.rand_like(parameter[1:]) < 0.5
    return model


def subtracted(model):
    """Subtract PiSSA's factors from the base of a model; return them."""
    factors = {}
    for pair in lora_pairs(model):
        factors[pair.name] = pissa_factors(base_weight(pair).float(), pair.rank, pair.scaling)
        subtract_from_base(pair, *factors[pair.name])
    return factors


def check(folder, base, wanted):
    """Check that PEFT and the merged model compute what was trained."""
    assert (logits(base) - wanted).abs().max() > 0.02
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), folder)
    assert torch.allclose(logits(loaded), wanted, atol=1e-5)
    merged, survived = merge_adapter(load_adapter(copy.deepcopy(base), folder, trainable=False))
    assert torch.allclose(logits(merged), wanted, atol=1e-5)
    assert survived.mean == pytest.approx(1)


@pytest.mark.parametrize(
    ("kind", "build"),
    [*itertools.product(KINDS, ("tiny_llama", "tiny_gpt2")), ("rslora", "tiny_t5")],
)
def test_every_kind_of_adapter(kind, build, request, tmp_path):
    base = request.getfixturevalue(build)()
    model = trained(base, KINDS[kind])
    wanted = logits(model)
    save_adapter(model, tmp_path / "adapter", "somewhere")
    check(tmp_path / "adapter", base, wanted)
    config, state = read_adapter(tmp_path / "adapter")
    assert config.use_rslora is False
    told = unserved_settings(config.to_dict())
    if kind == "dora":
        assert told == ("DoRA (use_dora)", "--merge")
        with pytest.raises(InputError, match="norms depend on the base weights: give --merge"):
            plain_lora(config, state)
        return
    assert told == (("AdaLoRA", "--as lora") if kind == "adalora" else None)
    config, state = plain_lora(config, state)
    assert unserved_settings(config.to_dict()) is None
    write_adapter(config, state, tmp_path / "plain")
    check(tmp_path / "plain", base, wanted)
    assert torch.allclose(logits(with_adapter(base, tmp_path / "plain")), wanted, atol=1e-5)


@pytest.mark.parametrize(
    ("build", "use_rslora", "subtracts"),
    [("tiny_llama", True, False), ("tiny_gpt2", False, False), ("tiny_llama", True, True)],
)
def test_each_layer_keeps_its_rank_and_scaling(build, use_rslora, subtracts, request, tmp_path):
    """PEFT's patterns in the adapter as it is written, one rank and one scaling in that for servers."""
    base = request.getfixturevalue(build)()
    first, second, _ = LAYERS[build]
    patterns = {
        "rank_pattern": {first: 2, rf".*\.1\..*\.?{second}": 6},
        "alpha_pattern": {second: 5.0, f"0.*{first}": 1.0},
    }
    model = trained(base, LoraSettings(r=4, use_rslora=use_rslora, **patterns))
    times = 2 if subtracts else 1  # the ranks of the adapter that is written
    factors = subtracted(model) if subtracts else {}
    scalings = {pair.name: (times * pair.rank, pair.scaling) for pair in lora_pairs(model)}
    assert len(set(scalings.values())) > 4
    wanted = logits(model)
    save_adapter(model, tmp_path / "adapter", "somewhere", factors)
    config, state = read_adapter(tmp_path / "adapter")
    assert config.use_rslora is False
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "adapter")
    for pair in lora_pairs(loaded):
        assert (pair.rank, pair.scaling) == (
            scalings[pair.name][0],
            pytest.approx(scalings[pair.name][1]),
        )
    check(tmp_path / "adapter", base, wanted)
    assert largest_rank(config, layer_names(state)) == times * 6
    told = unserved_settings(config.to_dict())
    assert told == ("rank_pattern and alpha_pattern", "--as lora")
    config, state = plain_lora(config, state)
    assert (config.r, config.lora_alpha) == (times * 6, times * 6)
    assert unserved_settings(config.to_dict()) is None
    write_adapter(config, state, tmp_path / "plain")
    check(tmp_path / "plain", base, wanted)
    assert torch.allclose(logits(with_adapter(base, tmp_path / "plain")), wanted, atol=1e-5)


@pytest.mark.parametrize("subtracts", [False, True])
@pytest.mark.parametrize("build", ["tiny_llama", "tiny_gpt2"])
def test_an_embedding_among_the_targets(build, subtracts, request, tmp_path):
    """It has no pair, so that PiSSA and LoRA-GA leave it alone; all layers are written with one rank."""
    base = request.getfixturevalue(build)()
    targets = [LAYERS[build][0], LAYERS[build][2]]
    model = add_lora(copy.deepcopy(base), LoraSettings(r=4, target_modules=targets))
    factors = {}
    if subtracts:
        factors = subtracted(model)
        for pair in lora_pairs(model):
            install(pair, *factors[pair.name])
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    wanted = logits(model)
    save_adapter(model, tmp_path, "somewhere", factors)
    check(tmp_path, base, wanted)
    assert torch.allclose(logits(with_adapter(base, tmp_path)), wanted, atol=1e-5)


def test_an_adapter_of_an_earlier_version_is_read_with_its_scaling(tiny_llama, tmp_path):
    """That wrote rsLoRA."""
    model = trained(tiny_llama(), LoraSettings(r=3, alpha_pattern={"q_proj": 7}))
    wanted = logits(model)
    model.save_pretrained(tmp_path / "earlier", save_embedding_layers=False)
    file = tmp_path / "earlier" / "adapter_config.json"
    assert json.loads(file.read_text())["use_rslora"] is True
    check(tmp_path / "earlier", tiny_llama(), wanted)
    write_adapter(*plain_lora(*read_adapter(tmp_path / "earlier")), tmp_path / "now")
    served = with_adapter(tiny_llama(), tmp_path / "now")
    assert torch.allclose(logits(served), wanted, atol=1e-5)
