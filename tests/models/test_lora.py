import json
import warnings

import peft
import pytest
import torch

from app.models.adapter_config import LoraSettings
from app.models.adapter_io import load_adapter, save_adapter
from app.models.lora import (
    add_lora,
    base_model,
    base_weight,
    install,
    lora_pairs,
    subtract_from_base,
    without_adapters,
)
from app.models.merging import merge_adapter
from app.utils.errors import InputError
from tests.support.alpha_r_reader import with_adapter
from tests.support.one_step_oracle import BUILDERS, make_batches, model_inputs

PER_BLOCK = {"tiny_llama": 7 * 2, "tiny_gpt2": 4 * 2, "tiny_t5": 6 * 2 + 10 * 2}


def logits(model, batch):
    with torch.no_grad():
        return model(**model_inputs(batch)).logits


def trained(model, **settings):
    wrapped = add_lora(model, LoraSettings(r=4, **settings))
    for pair in lora_pairs(wrapped):
        install(pair, 0.3 * torch.randn(pair.lora_A.shape), 0.3 * torch.randn(pair.lora_B.shape))
    return wrapped


@pytest.mark.parametrize("build", BUILDERS)
def test_add_lora_wraps_every_linear_layer_but_the_head(build, request):
    model = request.getfixturevalue(build)()
    batch = make_batches(model.config.is_encoder_decoder)[0]
    before = logits(model, batch)
    assert lora_pairs(model) == []
    assert base_model(model) is model
    wrapped = add_lora(model, LoraSettings(r=4)).eval()
    assert torch.equal(logits(wrapped, batch), before)
    pairs = lora_pairs(wrapped)
    assert len(pairs) == PER_BLOCK[build]
    assert not any("lm_head" in pair.name or pair.name.startswith("base_model") for pair in pairs)
    assert base_model(wrapped) is model
    trainable = {id(p) for p in wrapped.parameters() if p.requires_grad}
    assert trainable == {id(p) for pair in pairs for p in (pair.lora_A, pair.lora_B)}
    for pair in pairs:
        weight = pair.layer.base_layer.weight
        m, n = weight.T.shape if build == "tiny_gpt2" else weight.shape
        assert pair.lora_A.shape == (4, n)
        assert pair.lora_B.shape == (m, 4)
        assert bool((pair.lora_B == 0).all())
    half = request.getfixturevalue(build)().bfloat16()
    for pair in lora_pairs(add_lora(half, LoraSettings(r=4))):
        assert pair.lora_A.dtype == pair.lora_B.dtype == torch.float32


@pytest.mark.parametrize("build", BUILDERS)
def test_without_adapters_is_the_base_model(build, request):
    model = request.getfixturevalue(build)()
    batch = make_batches(model.config.is_encoder_decoder)[0]
    before = logits(model, batch)
    wrapped = trained(model).eval()
    assert not torch.allclose(logits(wrapped, batch), before, atol=1e-3)
    with_adapters = logits(wrapped, batch)
    with without_adapters(wrapped):
        assert torch.equal(logits(wrapped, batch), before)
    assert torch.equal(logits(wrapped, batch), with_adapters)
    with pytest.raises(KeyError), without_adapters(wrapped):
        raise KeyError
    assert torch.equal(logits(wrapped, batch), with_adapters)


@pytest.mark.parametrize("use_rslora", [True, False])
@pytest.mark.parametrize("build", ["tiny_llama", "tiny_gpt2"])
def test_merged_weights_are_the_base_plus_scaled_product(build, use_rslora, request):
    model = request.getfixturevalue(build)()
    batch = make_batches(False)[0]
    wrapped = trained(model, lora_alpha=6, use_rslora=use_rslora).eval()
    scaling = 6 / 2 if use_rslora else 6 / 4
    wanted, before = {}, logits(wrapped, batch)
    for pair in lora_pairs(wrapped):
        delta = scaling * pair.lora_B @ pair.lora_A
        weight = pair.layer.base_layer.weight
        wanted[pair.name] = (weight + (delta.T if build == "tiny_gpt2" else delta)).detach()
    merged, _ = merge_adapter(wrapped)
    modules = dict(merged.named_modules())
    for name, weight in wanted.items():
        assert torch.allclose(modules[name].weight, weight, atol=1e-6)
    assert torch.allclose(logits(merged, batch), before, atol=1e-4)
    assert lora_pairs(merged) == []


def test_saved_adapter_loads_on_a_fresh_base(tiny_llama, tmp_path):
    """By ours, for training or not, by plain PEFT, and by a reader of lora_alpha / r alone."""
    batch = make_batches(False)[0]
    wrapped = trained(tiny_llama()).eval()
    wanted = logits(wrapped, batch)
    save_adapter(wrapped, tmp_path / "adapter", "someone/base")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "someone/base"
    assert config["init_lora_weights"] is True
    assert config["use_rslora"] is False
    assert config["lora_alpha"] == 32  # 16 / sqrt(4) * 4
    assert isinstance(config["lora_alpha"], int)
    assert torch.allclose(
        logits(with_adapter(tiny_llama(), tmp_path / "adapter"), batch), wanted, atol=1e-5
    )
    for trainable in (True, False):
        loaded = load_adapter(tiny_llama(), tmp_path / "adapter", trainable).eval()
        assert torch.equal(logits(loaded, batch), wanted)
        assert all(pair.lora_A.requires_grad == trainable for pair in lora_pairs(loaded))
    plain = peft.PeftModel.from_pretrained(tiny_llama(), str(tmp_path / "adapter")).eval()
    # PEFT adds the product in another order; each is as far from float64, on some processors 3e-6.
    assert torch.allclose(logits(plain, batch), wanted, atol=1e-5)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        # As on the processes of a sharded run that do not read the weights.
        loaded = load_adapter(tiny_llama().to("meta"), tmp_path / "adapter", trainable=True)
    assert len(lora_pairs(loaded)) == 14
    assert not [w for w in caught if "meta" in str(w.message)]


def test_load_adapter_refuses_what_is_not_one_or_does_not_fit(tiny_llama, tmp_path):
    with pytest.raises(InputError, match=r"adapter_path is .* holds no adapter_config\.json"):
        load_adapter(tiny_llama(), tmp_path, trainable=True)
    save_adapter(trained(tiny_llama()), tmp_path, "base")
    with pytest.raises(InputError, match="does not fit the model"):
        load_adapter(tiny_llama(hidden_size=32), tmp_path, trainable=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("build", ["tiny_llama", "tiny_gpt2"])
def test_the_base_is_rounded_once(build, dtype, request):
    """From float64, so that it is the same wherever it is computed: bit for bit that of numpy."""
    base = request.getfixturevalue(build)().to(dtype)
    model = add_lora(base, LoraSettings(r=4))
    for pair in lora_pairs(model):
        A, B = torch.randn_like(pair.lora_A), torch.randn_like(pair.lora_B)
        W = base_weight(pair).double().numpy()
        subtract_from_base(pair, A, B)
        wanted = W - pair.scaling * B.double().numpy() @ A.double().numpy()
        assert torch.equal(base_weight(pair), torch.from_numpy(wanted).to(dtype)), pair.name


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn])
def test_codes_are_not_subtracted_from(dtype, tiny_llama):
    [pair, *_] = lora_pairs(add_lora(tiny_llama(), LoraSettings(r=4)))
    layer = pair.layer.get_base_layer()
    codes = torch.full(layer.weight.shape, 3.0).to(dtype)
    layer.weight = torch.nn.Parameter(codes.clone(), requires_grad=False)
    told = rf"weight of {pair.name}, but that is quantised \({dtype}\)"
    with pytest.raises(InputError, match=told):
        subtract_from_base(pair, torch.ones_like(pair.lora_A), torch.ones_like(pair.lora_B))
    assert torch.equal(layer.weight.float(), codes.float())
