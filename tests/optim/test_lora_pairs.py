"""What holds for every optimizer of LoRA pairs."""

import copy
import pickle
from functools import partial

import pytest
import torch
from torch import nn

from app.optim.lora_plus import LoraPlusAdamW
from app.optim.lora_pro import LoraProAdamW
from app.optim.preconditioned_adamw import PreconditionedAdamW
from tests.support.lora_pairs import make_pairs, pair_group, set_grads

OPTIMIZERS = [PreconditionedAdamW, LoraProAdamW, LoraPlusAdamW]


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


@pytest.mark.parametrize("kind", [*OPTIMIZERS, partial(LoraProAdamW, mode="efficient")])
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
