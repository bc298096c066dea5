"""Quantised weights, against the table of NF4, transformers' own loading, and autograd of the values."""

import shutil
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from bitsandbytes import functional
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, BitsAndBytesConfig

from app.commands.plan.memory import tensor_bytes
from app.models.adapter_config import LoraSettings
from app.models.loading import empty_model, load_float32, load_model, model_fingerprint
from app.models.lora import add_lora
from app.models.quantization import (
    check_kernel,
    number_of_weights,
    quantized_layers,
    scales,
)
from app.models.quantized_shapes import empty_codes
from app.models.source import resolve_model
from app.utils.errors import InputError
from benchmarks.init import peft_lora_ga
from tests.support.gradient_streams import best, product, relative
from tests.support.mixtures import build_mixture
from tests.support.one_step_oracle import make_batches, oracle, run

NF4 = np.array(  # QLoRA, arXiv:2305.14314, appendix E
    [
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ]
)
CLASSES = {"llama": AutoModelForCausalLM, "gpt2": AutoModelForCausalLM, "t5": AutoModelForSeq2SeqLM}


def quantized_source(folder, name="nf4"):
    return replace(resolve_model(str(folder)), quantization=name)


def layer(model):
    return model.model.layers[0].mlp.down_proj


def by_hand(W):
    """Return the codes of blocks of 64 numbers, and the largest of each."""
    blocks = W.double().numpy().reshape(-1, 64)
    absmax = np.abs(blocks).max(axis=1, keepdims=True)
    codes = np.abs((blocks / absmax)[..., None] - NF4).argmin(axis=-1)
    return codes.reshape(-1), absmax


def test_four_bits_are_those_of_the_table(wide_models):
    plain = layer(load_model(resolve_model(str(wide_models / "llama")))).weight.data
    codes, absmax = by_hand(plain)
    for dtype in (torch.float32, torch.bfloat16):
        model = load_model(quantized_source(wide_models / "llama"), dtype)
        packed = layer(model).weight.data.flatten().numpy()
        found = np.stack([packed >> 4, packed & 15], 1).reshape(-1)
        assert np.mean(found == codes) > 0.99  # but for numbers in the middle between two
        assert {p.dtype for p in model.parameters()} == {dtype, torch.uint8}
        assert layer(model).compute_dtype == dtype
    values = layer(load_float32(quantized_source(wide_models / "llama"))).weight.detach()
    # The largest number of a block has 8 bits itself.
    expected = (NF4[found.reshape(-1, 64)] * absmax).reshape(plain.shape)
    assert np.abs(values.numpy() - expected).max() < 0.02 * absmax.max()


def test_eight_bits_are_rows_over_their_largest_number(wide_models):
    plain = layer(load_model(resolve_model(str(wide_models / "llama")))).weight.data.double()
    found = layer(load_float32(quantized_source(wide_models / "llama", "int8"))).weight.detach()
    step = plain.abs().amax(dim=1, keepdim=True) / 127
    # Half a step, and what float16 rounds before.
    assert ((found.double() - plain).abs() <= 0.57 * step).all()
    assert (found.double() - plain).abs().max() > 0.4 * step.min()


@pytest.mark.parametrize("kind", CLASSES)
def test_the_model_is_that_of_its_values(kind, wide_models):
    """And of transformers, which quantises as the model card says."""
    source = quantized_source(wide_models / kind)
    model, values = load_model(source), load_float32(source)
    ids = torch.arange(20)[None]
    inputs = {"input_ids": ids, **({"decoder_input_ids": ids} if kind == "t5" else {})}
    found = model(**inputs).logits
    torch.testing.assert_close(values(**inputs).logits, found, rtol=1e-5, atol=1e-6)
    arguments = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    config = BitsAndBytesConfig(**arguments, bnb_4bit_use_double_quant=True)
    theirs = CLASSES[kind].from_pretrained(
        wide_models / kind, quantization_config=config, device_map={"": "cpu"}, dtype="float32"
    )
    assert torch.equal(theirs(**inputs).logits, found)
    plain = load_model(resolve_model(str(wide_models / kind)))
    assert (plain(**inputs).logits - found).abs().max() > 1e-3
    assert {type(m) for m in values.modules()} == {type(m) for m in plain.modules()}
    assert values.state_dict().keys() == plain.state_dict().keys()
    assert not hasattr(values.config, "quantization_config")


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("name", ["nf4", "int8"])
def test_without_content_it_has_the_bytes_of_the_real_one(kind, name, wide_models):
    source = quantized_source(wide_models / kind, name)
    model, empty = load_model(source), empty_model(source)
    for tensors in (lambda m: list(m.parameters()), scales, lambda m: list(m.buffers())):
        expected = [(t.shape, t.dtype) for t in tensors(model)]
        assert [(t.shape, t.dtype) for t in tensors(empty)] == expected
    assert all(p.device.type == "meta" for p in empty.parameters())
    assert tensor_bytes(scales(model)) > 0
    plain = load_model(resolve_model(str(wide_models / kind)))
    total = sum(p.numel() for p in plain.parameters())
    assert number_of_weights(empty) == number_of_weights(model)
    assert number_of_weights(model)[0] == total == number_of_weights(plain)[0]
    assert 0 < number_of_weights(model)[1] < total
    add_lora(empty, LoraSettings(r=2))


@pytest.mark.parametrize("name", ["nf4", "int8"])
def test_the_bytes_of_scales_are_those_of_the_format(name, wide_models):
    model = empty_model(quantized_source(wide_models / "llama", name))
    expected = 0
    for _, quantized in quantized_layers(model):
        m, n = quantized.out_features, quantized.in_features
        blocks = m * n // 64  # a byte each, and a float32 for 256 of these
        nf4 = blocks + 4 * -(-blocks // 256) + 4 * (16 + 256) + 4  # two tables, and the mean
        expected += nf4 if name == "nf4" else 4 * m
    assert sum(t.nbytes for t in scales(model)) == expected > 0


@pytest.mark.parametrize("kind", CLASSES)
def test_the_observed_gradient_is_that_of_autograd_at_the_values(kind, wide_models):
    source = quantized_source(wide_models / kind)
    [batch] = make_batches(kind == "t5")
    loss, gradients = oracle(load_float32(source), batch)
    result = run(add_lora(load_model(source), LoraSettings(r=4)), [batch])
    assert result.loss == pytest.approx(loss, rel=1e-5)
    for name, estimate in result.estimates.items():
        assert relative(product(estimate.svd, 4), best(gradients[name], 4)) < 1e-4


def test_no_evaluation_repacks_the_codes(wide_models, monkeypatch):
    """As bitsandbytes does on a CPU with AVX512-BF16, after which its layers have no gradient."""
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: True)
    source = quantized_source(wide_models / "llama")
    assert not layer(empty_model(source)).support_avx512bf16_for_cpu  # a plan runs it
    model = load_model(source)
    before = layer(model).weight.data.clone()
    with torch.no_grad():
        model.eval()(torch.arange(20)[None])
    assert torch.equal(layer(model).weight.data, before)
    assert not getattr(layer(model).weight.quant_state, "packing_format_for_cpu", False)


@pytest.mark.parametrize("name", ["nf4", "int8"])
def test_a_checkpoint_of_codes_is_taken_as_it_is(name, wide_models, tmp_path):
    source = quantized_source(wide_models / "llama", name)
    model = load_model(source)
    model.save_pretrained(tmp_path / "codes")
    for file in (wide_models / "llama").glob("tokenizer*"):
        (tmp_path / "codes" / file.name).write_bytes(file.read_bytes())
    saved = resolve_model(str(tmp_path / "codes"))
    ids = torch.arange(20)[None]
    assert torch.equal(load_model(saved)(ids).logits, model(ids).logits)
    values = load_float32(source)(ids).logits
    torch.testing.assert_close(load_float32(saved)(ids).logits, values, rtol=1e-5, atol=1e-6)
    load_float32(saved).save_pretrained(tmp_path / "values")
    served = AutoModelForCausalLM.from_pretrained(tmp_path / "values")
    torch.testing.assert_close(served(ids).logits, values, rtol=1e-5, atol=1e-6)
    empty = empty_model(saved)
    assert [p.shape for p in empty.parameters()] == [
        p.shape for p in load_model(saved).parameters()
    ]
    with pytest.raises(InputError, match="are quantised already"):
        load_model(replace(saved, quantization="nf4"))


def test_a_layer_whose_input_would_become_codes(wide_models, tmp_path):
    """Switch casts it to the weight's type; T5 does, too, but keeps these layers in float32."""
    shutil.copytree(wide_models / "t5", tmp_path / "switch")
    build_mixture("switch", d_model=64, d_kv=32, d_ff=128).save_pretrained(tmp_path / "switch")
    source = quantized_source(tmp_path / "switch")
    message = "SwitchTransformersDenseActDense of transformers casts the input of encoder.block.0"
    with pytest.raises(InputError, match=message):
        load_model(source)
    load_model(replace(source, quantization="int8"))
    for kind in CLASSES:
        empty_model(quantized_source(wide_models / kind))


def test_peft_lora_ga_says_that_it_needs_float_weights(wide_models):
    """LoRA-One starts on the same model above."""
    model = load_model(quantized_source(wide_models / "llama"))
    with pytest.raises(ValueError, match="LoRA-GA does not support quantized models"):
        peft_lora_ga(model, 4)(make_batches(False))


@pytest.mark.smollm2
def test_the_observed_gradient_on_smollm2_is_that_of_autograd_at_the_values(smollm2_name):
    source = replace(resolve_model(smollm2_name), quantization="nf4")
    [batch] = make_batches(False, rows=2)
    targets = ["layers.0.self_attn.q_proj", "layers.15.mlp.down_proj", "layers.29.mlp.up_proj"]
    model = add_lora(load_model(source), LoraSettings(r=8, target_modules=targets))
    result = run(model, [batch], rank=8)
    loss, gradients = oracle(load_float32(source), batch)
    assert result.loss == pytest.approx(loss, rel=1e-5)
    assert len(result.estimates) == 3
    for name, estimate in result.estimates.items():
        assert relative(product(estimate.svd, 8), best(gradients[name].double(), 8)) < 1e-4


def test_codes_of_another_library_need_no_bitsandbytes(tiny_llama, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)  # an import raises
    check_kernel(tiny_llama(), "tiny", torch.device("cpu"))
    empty_codes(tiny_llama().to("meta"))


def test_the_fingerprint_names_it(wide_models):
    plain = resolve_model(str(wide_models / "llama"))
    assert (
        model_fingerprint(replace(plain, quantization="nf4")) == f"{model_fingerprint(plain)}+nf4"
    )


def test_dora_on_eight_bits(wide_models):
    with pytest.raises(InputError, match="use_dora does not work on weights of 8 bits"):
        add_lora(
            empty_model(quantized_source(wide_models / "llama", "int8")),
            LoraSettings(use_dora=True),
        )


def test_rows_that_a_kernel_gives_the_scales_of_others(run_models, tmp_path):
    """bitsandbytes 0.50.2 on a CPU with AVX-512: rows shorter than a block."""
    weights = torch.arange(16).repeat_interleave(64).view(32, 32) + 1.0
    codes, state = functional.quantize_4bit(weights, quant_type="nf4", blocksize=64)
    if torch.allclose(functional.dequantize_4bit(codes, state), weights):
        load_model(quantized_source(run_models / "llama"))
        return
    shutil.copytree(run_models / "llama", tmp_path / "broken")
    (tmp_path / "broken" / "model.safetensors").write_text("read too early")
    with pytest.raises(InputError, match="has rows of 16 numbers: bitsandbytes"):
        load_model(quantized_source(tmp_path / "broken"))
