"""Steps of the base weights against a textbook loop in float64, and that they are taken back."""

import copy

import pytest
import torch

from app.initialization.gradient_hooks import frozen
from app.initialization.weight_step import stepped, whole_gradients
from app.models.adapter_config import LoraSettings
from app.models.lora import add_lora, base_model, base_weight, lora_pairs, without_adapters
from app.models.loss import summed_loss, supervised_logits
from tests.support.mixtures import build_mixture
from tests.support.one_step_oracle import (
    BUILDERS,
    EXACT,
    assert_untouched,
    make_batches,
    model_inputs,
    run,
    snapshot,
)

RANK = 3


def textbook(model, names, batch, eta, rank):
    """Return transformers' loss at W - eta G_r, from autograd and torch's SVD, all in float64."""
    plain = copy.deepcopy(model).double().eval().requires_grad_(True)
    plain(**model_inputs(batch), use_cache=False).loss.backward()
    with torch.no_grad():
        for name in names:
            weight = plain.get_submodule(name).weight
            G = weight.grad
            if rank is not None:
                U, S, Vh = torch.linalg.svd(G, full_matrices=False)
                G = U[:, :rank] * S[:rank] @ Vh[:rank]
            weight -= eta * G
        return float(plain(**model_inputs(batch), use_cache=False).loss)


def loss_of(model, batch):
    """Return the token mean of the base model's loss."""
    with torch.no_grad(), frozen(model), without_adapters(model):
        output = supervised_logits(model, base_model(model), batch)
    return float(summed_loss(output)) / output.labels.numel()


@pytest.mark.parametrize("build", BUILDERS)
def test_the_loss_at_a_step_is_that_of_the_textbook_and_the_weights_come_back(build, request):
    plain = request.getfixturevalue(build)()
    encodes = plain.config.is_encoder_decoder
    [batch] = make_batches(encodes)
    wrapped = add_lora(copy.deepcopy(plain), LoraSettings(r=4))
    pairs = lora_pairs(wrapped)
    for pair in pairs:  # an adapter that would show
        torch.nn.init.normal_(pair.lora_B)
    before = snapshot(wrapped)
    gradients = whole_gradients(run(wrapped, make_batches(encodes, size=2), EXACT, RANK))
    untouched = loss_of(wrapped, batch)
    losses = set()
    for eta in (1e-2, 0.3, 3.0):
        for rank in (None, 1, RANK):
            wanted = textbook(plain, [pair.name for pair in pairs], batch, eta, rank)
            with stepped(pairs, lambda name, eta=eta, rank=rank: gradients[name].step(eta, rank)):
                assert loss_of(wrapped, batch) == pytest.approx(wanted, rel=2e-5)
            losses.add(round(wanted, 5))
            assert loss_of(wrapped, batch) == untouched
    assert len(losses) == 9  # none of the steps is another one
    assert_untouched(wrapped, before)


def test_the_weights_come_back_from_an_error_between_two_layers(tiny_llama):
    model = add_lora(tiny_llama().bfloat16(), LoraSettings(r=4))
    pairs, before = lora_pairs(model), snapshot(model)

    def step(name):
        if name == pairs[5].name:
            raise KeyError(name)
        return torch.ones(())

    with pytest.raises(KeyError), stepped(pairs, step):
        pass
    assert_untouched(model, before)


def test_a_step_is_rounded_to_the_type_of_the_weight_once(tiny_llama):
    """Against the difference in float64."""
    model = add_lora(tiny_llama().bfloat16(), LoraSettings(r=4))
    pair = lora_pairs(model)[0]
    W = base_weight(pair).clone()
    step = torch.randn(W.shape, generator=torch.Generator().manual_seed(0)) * 1e-2
    with stepped([pair], lambda _: step):
        moved = base_weight(pair).clone()
    assert torch.equal(moved, (W.double() - step.double()).bfloat16())
    assert not torch.equal(moved, W)


@pytest.mark.parametrize("kind", ["mixtral", "switch"])
def test_each_expert_moves_along_its_own_gradient(kind):
    model = build_mixture(kind)
    batches = make_batches(kind == "switch", rows=4, size=4)
    wrapped = add_lora(model, LoraSettings(r=2))
    pairs, before = lora_pairs(wrapped), snapshot(wrapped)
    weights = {pair.name: base_weight(pair).clone() for pair in pairs}
    gradients = whole_gradients(run(wrapped, batches, EXACT, 2))
    with stepped(pairs, lambda name: gradients[name].step(0.5, None)):
        for pair in pairs:
            expected = weights[pair.name] - 0.5 * gradients[pair.name].G
            assert torch.equal(base_weight(pair), expected), pair.name
    assert_untouched(wrapped, before)


@pytest.mark.parametrize("weighting", ["tokens", "rows"])
def test_the_whole_gradient_is_of_the_mean_that_the_estimates_are_of(weighting, tiny_llama):
    model = add_lora(tiny_llama(), LoraSettings(r=4))
    result = run(model, make_batches(False, size=2), EXACT, RANK, weighting=weighting)
    for name, gradient in whole_gradients(result).items():
        assert float(gradient.G.norm()) == pytest.approx(result.estimates[name].norm, rel=1e-5)
        top = torch.linalg.svdvals(gradient.G.double())[:RANK]
        torch.testing.assert_close(gradient.svd.S.double(), top, rtol=1e-5, atol=0)
