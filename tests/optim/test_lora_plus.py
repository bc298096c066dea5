"""LoRA+ against PEFT's own, and what it does with its groups."""

import copy

import pytest
import torch
from peft.optimizers import create_loraplus_optimizer
from torch import nn
from transformers import get_scheduler

from app.models.adapter_config import LoraSettings
from app.models.lora import add_lora, lora_pairs
from app.optim.lora_plus import LoraPlusAdamW


def pair_group(model):
    return {
        "params": [p for pair in lora_pairs(model) for p in (pair.lora_A, pair.lora_B)],
        "lora_pairs": True,
    }


def train(model, optimizer, steps=10):
    torch.manual_seed(1)
    scheduler = get_scheduler("linear", optimizer, 2, steps)
    for _ in range(steps):
        ids = torch.randint(3, 128, (2, 12))
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    return [p.detach().clone() for p in model.parameters() if p.requires_grad]


def test_ten_steps_are_pefts(tiny_llama):
    ours = add_lora(tiny_llama(), LoraSettings(r=4))
    theirs = copy.deepcopy(ours)
    start = [p.detach().clone() for p in ours.parameters() if p.requires_grad]
    peft = create_loraplus_optimizer(
        theirs, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16, loraplus_weight_decay=0.1
    )
    for group in peft.param_groups:
        assert group["weight_decay"] in (0.0, 0.1)
    trained = train(ours, LoraPlusAdamW([pair_group(ours)], lr=1e-3, lr_ratio=16, weight_decay=0.1))
    wanted = train(theirs, peft)
    for a, b, before in zip(trained, wanted, start, strict=True):
        assert not torch.equal(a, before)
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-8)


def test_the_ratio_stays_under_a_schedule():
    A, B = nn.Parameter(torch.ones(2, 3)), nn.Parameter(torch.ones(4, 2))
    weight, bias = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2))
    groups = [{"params": [A, B], "lora_pairs": True}, {"params": [weight, bias]}]
    optimizer = LoraPlusAdamW(groups, lr=1e-3, lr_ratio=8, weight_decay=0.1)
    firsts = [group["params"][0] for group in optimizer.param_groups]
    assert all(a is b for a, b in zip(firsts, (A, B, weight, bias), strict=True))
    scheduler = get_scheduler("cosine", optimizer, 2, 10)
    for _ in range(6):
        optimizer.step()
        scheduler.step()
        slow, fast, other, vectors = (group["lr"] for group in optimizer.param_groups)
        assert 0 < slow == other
        assert fast == vectors == pytest.approx(8 * slow)
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0.1, 0.1, 0.1, 0.0]


def test_a_ratio_of_zero_is_an_error():
    with pytest.raises(ValueError, match="lr_ratio must be > 0, got 0"):
        LoraPlusAdamW([nn.Parameter(torch.ones(2, 2))], lr_ratio=0)
