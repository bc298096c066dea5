import copy
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig
from peft.tuners.lora import Linear, bnb
from torch import nn
from transformers.pytorch_utils import Conv1D

from app.models.adapter_config import LoraSettings
from app.models.loading import load_model
from app.models.lora import add_lora, base_model, lora_pairs
from app.models.lora_linear import LoraLinear, LoraProduct, use_lora_product
from app.models.loss import summed_loss, supervised_logits
from app.models.source import resolve_model
from tests.support.one_step_oracle import BUILDERS, make_batches

CASES = [
    ("linear", torch.float32, False),
    ("bias", torch.float32, False),
    ("conv1d", torch.float32, False),
    ("bias", torch.bfloat16, False),
    ("bias", torch.float32, True),
    ("conv1d", torch.bfloat16, True),
]


def peft_layer(kind="linear", dtype=torch.float32, name="default", **settings):
    torch.manual_seed(0)
    base = Conv1D(24, 16) if kind == "conv1d" else nn.Linear(16, 24, bias=kind == "bias")
    base.requires_grad_(False).to(dtype)
    config = LoraConfig(fan_in_fan_out=kind == "conv1d", **settings)
    layer = Linear(base, name, config=config, r=4, lora_alpha=6)
    nn.init.normal_(layer.lora_B[name].weight)
    for factor in (layer.lora_A, layer.lora_B):
        factor.float()  # as `get_peft_model` does
    return layer


def with_product(layer):
    layer = copy.deepcopy(layer)
    use_lora_product(layer)
    assert type(layer) is LoraLinear
    return layer


def run(layer, x, autocast=False, seed=1):
    """Return y and the gradients of x, lora_A and lora_B under one fixed gradient of y."""
    torch.manual_seed(seed)
    x = x.detach().clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = layer(x)
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(2))
    trained = [p for p in layer.parameters() if p.requires_grad]
    return [y, *torch.autograd.grad(y, [x, *trained], grad.to(y.dtype))]


def error(found, wanted):
    found, wanted = found.detach(), wanted.detach()
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


@pytest.mark.parametrize(("kind", "dtype", "autocast"), CASES)
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_product_and_gradients_are_those_of_peft(kind, dtype, autocast, p):
    theirs = peft_layer(kind, dtype, lora_dropout=p)
    ours = with_product(theirs)
    x = torch.randn(3, 200, 16, dtype=dtype)
    if kind != "conv1d":  # which takes nothing else
        x = x.mT.contiguous().mT  # not contiguous
    found, wanted = run(ours, x, autocast), run(theirs, x, autocast)
    assert [(t.shape, t.dtype) for t in found] == [(t.shape, t.dtype) for t in wanted]
    if dtype == torch.float32 and not autocast:
        assert all(error(a, b) < 1e-6 for a, b in zip(found, wanted, strict=True))
        return
    # PEFT rounds to 16 bits more often: no further from the exact numbers of the same layer than it.
    exact = copy.deepcopy(theirs).double()
    for a, b, c in zip(found, wanted, run(exact, x.double()), strict=True):
        assert error(a, c) < 1.1 * error(b, c), (error(a, c), error(b, c))
        assert error(b, c) < 0.02  # the same dropout


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("name", ["nf4", "int8"])
def test_on_codes_it_is_that_of_peft(name, p, wide_models):
    source = replace(resolve_model(str(wide_models / "llama")), quantization=name)
    found, x = {}, torch.randn(3, 200, 64)
    for dtype in (torch.float32, torch.bfloat16):
        model = load_model(source, dtype)
        ours = lora_pairs(add_lora(model, LoraSettings(r=4, lora_dropout=p)).train())[1].layer
        for factor in (*ours.lora_A.parameters(), *ours.lora_B.parameters()):
            nn.init.normal_(factor, generator=torch.Generator().manual_seed(3))
        theirs = copy.deepcopy(ours)
        theirs.__class__ = {"nf4": bnb.Linear4bit, "int8": bnb.Linear8bitLt}[name]
        assert isinstance(ours, type(theirs))
        assert type(ours) is not type(theirs)
        for autocast in (False, True):
            results = [run(layer, x.to(dtype), autocast) for layer in (ours, theirs)]
            assert [t.shape for t in results[0]] == [t.shape for t in results[1]]
            found[dtype, autocast] = results
    exact = found[torch.float32, False][1]
    assert all(
        error(a, b) < 1e-6 for a, b in zip(found[torch.float32, False][0], exact, strict=True)
    )
    for results in found.values():
        for a, b, c in zip(*results, exact, strict=True):
            # Both round to 16 bits once, at other places of a binade.
            assert error(a, c) < 1.5 * error(b, c) + 1e-6, (error(a, c), error(b, c))
            assert error(b, c) < 0.02


def test_gradients_are_left_out_where_nothing_asks():
    layer = with_product(peft_layer())
    x = torch.randn(5, 16)
    layer.lora_A["default"].weight.requires_grad_(False)
    layer(x).sum().backward()
    assert x.grad is None
    assert layer.lora_A["default"].weight.grad is None
    assert layer.lora_B["default"].weight.grad is not None
    with torch.no_grad():
        assert layer(x).grad_fn is None


def test_the_meta_device_has_shapes():
    layer = with_product(peft_layer()).to("meta")
    x = torch.empty(2, 5, 16, device="meta", requires_grad=True)
    layer(x).sum().backward()
    assert x.grad.shape == x.shape


def otherwise(change):
    settings = {"dora": {"use_dora": True}, "lora_bias": {"lora_bias": True}}.get(change, {})
    layer = peft_layer("bias", **settings)
    if change == "trained":
        layer.base_layer.weight.requires_grad_()
    elif change == "hook":
        layer.base_layer.register_forward_hook(lambda module, args, y: 2 * y)
    elif change == "backward_hook":
        layer.lora_A["default"].register_full_backward_hook(lambda module, grads, _: grads)
    elif change == "second":
        layer.update_layer("second", 2, 4, config=LoraConfig(init_lora_weights=False))
        layer.set_adapter(["default", "second"])
    elif change == "disabled":
        layer.enable_adapters(False)
    elif change == "merged":
        layer.merge()
    return layer


@pytest.mark.parametrize(
    "change",
    ["dora", "lora_bias", "trained", "hook", "backward_hook", "second", "disabled", "merged"],
)
def test_whatever_is_not_plain_stays_with_peft(change, monkeypatch):
    theirs, x = otherwise(change), torch.randn(3, 16)
    ours = with_product(theirs)
    monkeypatch.setattr(LoraProduct, "apply", None)
    assert torch.equal(ours(x), theirs(x))


@pytest.mark.parametrize("build", BUILDERS)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_model_trains_as_with_layers_of_peft(build, checkpointing, request):
    model = request.getfixturevalue(build)()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    settings = LoraSettings(r=4, rank_pattern={"wi|down_proj|c_fc": 2}, lora_dropout=0.2)
    ours = add_lora(model, settings).train()
    for pair in lora_pairs(ours):
        assert type(pair.layer) is LoraLinear
        nn.init.normal_(pair.lora_B, std=0.1)
    theirs = copy.deepcopy(ours)
    for pair in lora_pairs(theirs):
        pair.layer.__class__ = Linear
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    batch = make_batches(model.config.is_encoder_decoder)[0]
    losses = []
    for wrapped in (ours, theirs):
        torch.manual_seed(0)
        losses.append(summed_loss(supervised_logits(wrapped, base_model(wrapped), batch)))
        losses[-1].backward()
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-6)
    pairs = zip(ours.named_parameters(), theirs.parameters(), strict=True)
    assert all(error(a.grad, b.grad) < 2e-5 for (_, a), b in pairs if a.requires_grad)


def saved_activations(layers, x):
    """Count the bytes that autograd saves of layers with one input, without parameters."""
    saved = {}

    def pack(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = [layer(x) for layer in layers]
    assert len(y) == 3
    frozen = {w.untyped_storage().data_ptr() for layer in layers for w in layer.parameters()}
    return sum(size for pointer, size in saved.items() if pointer not in frozen)


def test_layers_of_four_bits_save_one_input_together(wide_models):
    source = replace(resolve_model(str(wide_models / "llama")), quantization="nf4")
    model = add_lora(load_model(source, torch.bfloat16), LoraSettings(r=4)).train()
    layers = [pair.layer for pair in lora_pairs(model)[:3]]
    x = torch.randn(50, 64, dtype=torch.bfloat16, requires_grad=True)
    assert saved_activations(layers, x) == x.nbytes + 3 * 50 * 4 * 4


@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize(
    ("dtype", "autocast"), [(torch.float32, False), (torch.bfloat16, False), (torch.float32, True)]
)
def test_layers_with_one_input_save_it_once(dtype, autocast, p):
    layers = [with_product(peft_layer(dtype=dtype, lora_dropout=p)) for _ in range(3)]
    x = torch.randn(64, 16, dtype=dtype, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        activations = saved_activations(layers, x)
    h = 64 * 4 * (2 if autocast else 4)
    kept = x.numel() if p else 0  # a byte an entry
    assert activations == x.nbytes + 3 * (h + kept)
