"""How the optimizer of a model is made."""

import warnings
from functools import partial

import pytest

from app.models.adapter_config import LoraSettings
from app.models.lora import add_lora
from app.optim.reflora import RefLoraAdamW
from app.training.optimization import make_optimizer


def test_a_warm_up_of_the_whole_training_is_warned_of(tiny_llama):
    model = add_lora(tiny_llama(), LoraSettings(r=2))
    with pytest.warns(UserWarning, match="warmup_steps is 100, but training has 100 steps"):
        make_optimizer(RefLoraAdamW, model, 100)
    with warnings.catch_warnings(action="error"):
        made = make_optimizer(partial(RefLoraAdamW, warmup_steps=99), model, 100)
    assert [group["lora_pairs"] for group in made.param_groups] == [True]
