"""Every optimizer of LoRA pairs runs its step hooks once a step."""

import pytest
import torch
from torch import nn

from app.optim.lora_plus import LoraPlusAdamW
from app.optim.lora_pro import LoraProAdamW
from app.optim.preconditioned_adamw import PreconditionedAdamW


def pair_group():
    params = [nn.Parameter(torch.randn(2, 5)), nn.Parameter(torch.randn(4, 2))]
    for p in params:
        p.grad = torch.randn_like(p)
    return {"params": params, "lora_pairs": True, "scaling": [1.0]}


@pytest.mark.parametrize("optimizer_class", [PreconditionedAdamW, LoraProAdamW, LoraPlusAdamW])
def test_step_hooks_run_once(optimizer_class):
    torch.optim.AdamW(pair_group()["params"])  # torch now runs hooks around AdamW.step as well
    optimizer = optimizer_class([pair_group()])
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("pre"))
    optimizer.register_step_post_hook(lambda *_: calls.append("post"))
    optimizer.step()
    assert calls == ["pre", "post"]
