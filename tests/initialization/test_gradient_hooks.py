from functools import partial

import pytest
import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from app.initialization.gradient_hooks import frozen, observe
from app.initialization.one_step_gradient import Estimator
from app.models.activation_checkpointing import recomputing
from app.models.adapter_config import LoraSettings
from app.models.lora import add_lora, lora_pairs
from app.utils.errors import InputError
from tests.support.one_step_oracle import (
    EXACT,
    assert_same,
    assert_untouched,
    checkpointed,
    make_batches,
    oracle,
    run,
    run_whole,
    snapshot,
)


@pytest.mark.parametrize("estimator", [EXACT, Estimator(passes=2)])
def test_the_model_is_untouched(tiny_gpt2, estimator):
    """A model in train mode with dropout, odd modes and odd flags; its dropout does not act."""
    model = tiny_gpt2(resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5)
    loss, gradients = oracle(model, make_batches(False)[0])
    wrapped = add_lora(model, LoraSettings(r=4, lora_dropout=0.3)).train()
    model.transformer.h[1].attn.eval()
    model.transformer.ln_f.weight.requires_grad_(True)
    lora_pairs(wrapped)[2].lora_A.requires_grad_(False)
    before = snapshot(wrapped)
    run_pass = run_whole if estimator is EXACT else run
    result = run_pass(wrapped, make_batches(False, size=2), estimator)
    assert_untouched(wrapped, before)
    if estimator is EXACT:
        assert_same(result, loss, gradients)


def test_the_model_is_untouched_after_an_error(tiny_llama):
    wrapped = add_lora(tiny_llama(), LoraSettings(r=4)).train()
    with torch.no_grad():
        wrapped.get_base_model().model.norm.weight[0] = float("nan")
    before = snapshot(wrapped)
    before[0].pop("base_model.model.model.norm.weight")  # a NaN is equal to nothing
    with pytest.raises(
        InputError, match=r"the loss is not finite in micro-batch 0 .*rows \[0, 1\]"
    ):
        run(wrapped, make_batches(False, size=2))
    assert_untouched(wrapped, before)


def test_reentrant_checkpointing_is_an_error_that_says_so(tiny_llama):
    wrapped = add_lora(checkpointed(tiny_llama(), reentrant=True), LoraSettings(r=4))
    # PEFT lets the embeddings' output require a gradient, which mends re-entry: take that away.
    wrapped.get_base_model().get_input_embeddings()._forward_hooks.clear()
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        run(wrapped, make_batches(False))


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("build", ["tiny_llama", "tiny_gpt2", "tiny_t5"])
def test_checkpointed_blocks_recompute_without_dropout(build, reentrant, request):
    """The pass saves memory as training does, though it runs in evaluation mode."""
    dropout = {"tiny_gpt2": {"resid_pdrop": 0.5}, "tiny_t5": {"dropout_rate": 0.5}}.get(build, {})
    model = request.getfixturevalue(build)(**dropout)
    batches = make_batches(model.config.is_encoder_decoder)
    loss, gradients = oracle(model, batches[0])
    wrapped = add_lora(checkpointed(model, reentrant), LoraSettings(r=4)).train()
    calls, reports = [], lora_pairs(wrapped)[0]
    handle = reports.layer.register_forward_hook(lambda *_: calls.append(1))
    run(wrapped, batches)
    handle.remove()
    assert len(calls) == 2
    before = snapshot(wrapped)
    functions = [getattr(m, "_gradient_checkpointing_func", None) for m in wrapped.modules()]
    assert_same(run_whole(wrapped, batches), loss, gradients)
    assert_untouched(wrapped, before)
    after = [getattr(m, "_gradient_checkpointing_func", None) for m in wrapped.modules()]
    assert after == functions


class DroppingBlock(GradientCheckpointingLayer):
    """As OPT's: dropout asks for the block's own mode."""

    def forward(self, x):
        return nn.functional.dropout(x, 0.5, training=self.training)


def test_dropout_of_a_checkpointed_block_itself_does_not_act():
    block = DroppingBlock().train()
    block.gradient_checkpointing = True
    checkpoint = partial(torch.utils.checkpoint.checkpoint, use_reentrant=False)
    block._gradient_checkpointing_func = checkpoint
    x = torch.ones(200, requires_grad=True)
    with frozen(block), recomputing(block):
        output = block(x)
        output.sum().backward()
        assert torch.equal(output, torch.ones(200))
    assert torch.equal(x.grad, torch.ones(200))
    assert block.training
    assert block._gradient_checkpointing_func is checkpoint


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layers_that_read_one_input_share_it_in_memory(dtype, checkpointing, tiny_llama):
    """q, k and v; gate and up: one sequence of readers, one storage, no copy in another type."""
    model = tiny_llama().to(dtype)
    wrapped = add_lora(checkpointed(model) if checkpointing else model, LoraSettings(r=4))
    layers = {pair.name: pair.layer for pair in lora_pairs(wrapped)}
    seen = {}

    def listener(name):
        def listen(x, delta, readers):
            seen[name] = readers, x.untyped_storage().data_ptr(), x.dtype, x

        return listen

    [batch] = make_batches(False)
    with frozen(wrapped), observe(layers, {name: listener(name) for name in layers}):
        loss = wrapped(batch["input_ids"], labels=batch["labels"], use_cache=False).loss
        loss.backward()
    assert len(seen) == 14
    for name, (readers, storage, found, _) in seen.items():
        block, _, kind = name.rpartition(".")
        kinds = next((k for k in (["q", "k", "v"], ["gate", "up"]) if kind[:-5] in k), [kind[:-5]])
        assert readers == [f"{block}.{k}_proj" for k in kinds]
        assert {id(seen[reader][0]) for reader in readers} == {id(readers)}
        assert {seen[reader][1] for reader in readers} == {storage}
        assert found == dtype
    assert len({id(readers) for readers, *_ in seen.values()}) == 8


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(5, 5)

    def forward(self, x):
        return self.layer(torch.tanh(self.layer(x)))


def test_a_layer_used_twice_reports_the_sum():
    model = Twice()
    total = torch.zeros(5, 5)
    x = torch.randn(3, 2, 5)
    with frozen(model), observe({"a": model.layer}, {"a": lambda x, d, _: total.addmm_(d.T, x)}):
        model(x).square().sum().backward()
    model(x).square().sum().backward()
    assert torch.allclose(total, model.layer.weight.grad, rtol=1e-5, atol=1e-6)


def test_observer_is_silent_without_gradients_and_leaves_no_hook():
    layer, seen = nn.Linear(4, 3), []
    with observe({"a": layer}, {"a": lambda *_: seen.append(1)}):
        with torch.no_grad():
            layer(torch.randn(2, 4))
        layer(torch.randn(2, 4)).sum().backward()
    layer(torch.randn(2, 4)).sum().backward()
    assert len(seen) == 1
    assert not layer._forward_hooks
