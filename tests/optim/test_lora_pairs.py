"""What holds for every optimizer of LoRA pairs."""

import copy
import pickle
from functools import partial

import pytest
import torch
from torch import nn

from app.models.adapter_config import LoraSettings
from app.models.lora import add_lora, install, lora_pairs
from app.optim.lora_plus import LoraPlusAdamW
from app.optim.lora_pro import LoraProAdamW
from app.optim.lora_sb import LoraSbAdamW
from app.optim.preconditioned_adamw import PreconditionedAdamW
from app.optim.reflora import RefLoraAdamW
from app.training.optimization import parameter_groups
from tests.support.lora_pairs import TextbookAdamW, make_pairs, pair_group, set_grads
from tests.support.mixtures import TARGETS, build_mixture
from tests.support.one_step_oracle import make_batches, model_inputs

OPTIMIZERS = [PreconditionedAdamW, LoraProAdamW, LoraPlusAdamW, RefLoraAdamW, LoraSbAdamW]


@pytest.mark.parametrize("optimizer_class", OPTIMIZERS)
def test_step_hooks_run_once(optimizer_class):
    torch.optim.AdamW(make_pairs())  # torch now runs hooks around AdamW.step as well
    optimizer = optimizer_class([pair_group(make_pairs(), scaling=[1.0] * 4)])
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("pre"))
    optimizer.register_step_post_hook(lambda *_: calls.append("post"))
    optimizer.step()
    assert calls == ["pre", "post"]


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ([(4, 20)], "1 parameters"),
        ([(4, 20), (12, 4), (4, 20), (12, 8)], r"pair 1.*\(4, 20\).*\(12, 8\)"),
        ([(12, 4), (4, 20)], r"pair 0: expected lora_A.*\(12, 4\).*\(4, 20\)"),
        ([(4, 20), (12,)], r"pair 0.*\(12,\)"),
    ],
)
@pytest.mark.parametrize("optimizer_class", OPTIMIZERS)
def test_groups_that_are_not_pairs_are_an_error(optimizer_class, shapes, message):
    params = [nn.Parameter(torch.zeros(shape)) for shape in shapes]
    with pytest.raises(ValueError, match=message):
        optimizer_class([pair_group(params)])
    optimizer = optimizer_class(make_pairs())
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group(pair_group(params))
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize(
    "kind",
    [
        *OPTIMIZERS,
        partial(LoraProAdamW, mode="efficient"),
        partial(RefLoraAdamW, warmup_steps=2),
    ],
)
def test_a_state_dict_goes_on_bit_for_bit(kind):
    """It brings the settings of each group, and the moments of pairs and of other parameters."""

    def build(params, lr, **own):
        pairs = pair_group(params[:-1], scaling=[1.0] * 4, **own)
        return kind([pairs, {"params": params[-1:]}], lr=lr)

    def train(params, optimizer, seeds):
        for seed in seeds:
            set_grads(params, seed)
            optimizer.step()

    params = [*make_pairs(), nn.Parameter(torch.randn(5))]
    optimizer = build(params, 0.01, damping=0.05, weight_decay=0.1)
    train(params, optimizer, range(3))
    twins = copy.deepcopy(params)
    resumed = build(twins, 1.0)
    resumed.load_state_dict(pickle.loads(pickle.dumps(optimizer.state_dict())))
    for ours, theirs in zip(resumed.param_groups, optimizer.param_groups, strict=True):
        assert {**ours, "params": None} == {**theirs, "params": None}
    for pair in ((params, optimizer), (twins, resumed)):
        train(*pair, range(3, 6))
    assert all(torch.equal(p, q) for p, q in zip(params, twins, strict=True))


EXPERTS = {
    "preconditioned": partial(PreconditionedAdamW, damping=1e-3),
    "full": partial(LoraProAdamW, mode="full", damping=1e-3),
    "efficient": partial(LoraProAdamW, mode="efficient", damping=1e-3),
    "reflora": partial(RefLoraAdamW, warmup_steps=1),
    "lora_sb": LoraSbAdamW,
}


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
@pytest.mark.parametrize("method", EXPERTS)
def test_a_step_of_stacked_experts_is_that_of_each_expert_in_float64(kind, method):
    """Over three steps, each from a saved state."""
    model = add_lora(build_mixture(kind), LoraSettings(r=2, **TARGETS.get(kind, {})))
    [batch] = make_batches(False)
    pairs = lora_pairs(model)
    for pair in pairs:
        install(pair, 0.3 * torch.randn(pair.lora_A.shape), 0.3 * torch.randn(pair.lora_B.shape))
    options = {"lr": 0.01, "betas": (0.8, 0.9), "weight_decay": 0.1}
    make = partial(EXPERTS[method], **options)
    optimizer = make(parameter_groups(model))
    alone = [
        nn.Parameter(factor.detach().double().clone())
        for pair in pairs
        for factor in (pair.lora_A, pair.lora_B)
    ]
    if method == "preconditioned":
        oracle = TextbookAdamW(
            alone, 0.01, 1e-3, betas=options["betas"], weight_decay=options["weight_decay"]
        )
    else:
        scaling = [pair.scaling for pair in pairs]
        # Which is itself tested against a loop in numpy.
        oracle = make([pair_group(alone, scaling=scaling)])
    for _ in range(3):
        optimizer.zero_grad()
        model(**model_inputs(batch)).loss.backward()
        grads = [g for pair in pairs for g in gradients_of(model, pair)]
        optimizer.step()
        state, optimizer = optimizer.state_dict(), make(parameter_groups(model))
        optimizer.load_state_dict(state)
        if method == "preconditioned":
            oracle.step(grads)
            continue
        for p, grad in zip(alone, grads, strict=True):
            p.grad = grad
        oracle.step()
    wanted = oracle.p if method == "preconditioned" else [p.detach() for p in alone]
    ours = [factor for pair in lora_pairs(model) for factor in (pair.lora_A, pair.lora_B)]
    for name, got, want in zip([p.name for p in pairs for _ in "AB"], ours, wanted, strict=True):
        assert torch.allclose(got.detach().double(), want, atol=1e-5), name


def gradients_of(model, pair):
    """Return the gradients of an expert's lora_A and lora_B, by PEFT's layout, written out once more."""
    if pair.experts == 1:
        return [pair.lora_A.grad.double(), pair.lora_B.grad.double()]
    whole_A, whole_B = (getattr(pair.layer, f)["default"].weight.grad for f in ("lora_A", "lora_B"))
    A = whole_A.reshape(pair.experts, -1, whole_A.shape[-1])[pair.expert]
    B = whole_B.reshape(whole_B.shape[0], -1, pair.experts)[:, :, pair.expert]
    return [A.double(), B.double()]
