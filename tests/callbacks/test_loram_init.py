"""LoramInit through the command: the size of the factors, the untouched function, what is refused."""

import math

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.support.run_folders import summary

SCALING = 16 / 4**0.5  # of the tiny run's adapter: lora_alpha 16, r 4, rsLoRA


def products(watched_fit):
    """Return lora_B @ lora_A before the first step, by layer."""
    first = {name: factor.double() for name, factor in watched_fit["first"].items()}
    return {
        name.removeprefix("base_model.model.").removesuffix(".lora_A.default.weight"): first[
            name.replace("lora_A", "lora_B")
        ]
        @ A
        for name, A in first.items()
        if "lora_A" in name
    }


def test_the_product_has_its_share_of_the_weights_mean_square(fit, watched_fit, run_models):
    folder = fit("--config=methods/loram.yaml", "--trainer.max_steps=1")
    weights = AutoModelForCausalLM.from_pretrained(run_models / "llama").state_dict()
    made = products(watched_fit)
    assert len(made) == 14
    for name, product in made.items():
        W = weights[f"{name}.weight"].double()
        share = float((SCALING * product).square().sum() / W.square().sum())
        assert share == pytest.approx(math.log(4) / math.log(min(W.shape)), rel=1e-4)
    scores = summary(folder)["metrics"]
    assert scores["after_init"]["loss"] == pytest.approx(scores["zero_shot"]["loss"], rel=1e-4)


def test_its_size_is_that_of_lora_one_with_a_gamma(fit, watched_fit):
    options = ("--init.gamma=16", "--trainer.max_steps=1")
    fit("--config=methods/loram_one.yaml", *options)
    ours = {name: torch.linalg.svdvals(p) for name, p in products(watched_fit).items()}
    watched_fit["batches"].clear()
    fit("--config=methods/lora_one_adamw.yaml", *options)
    for name, product in products(watched_fit).items():
        top = torch.linalg.svdvals(product)[0]
        assert float(top) == pytest.approx(1 / 16, rel=1e-4)
        assert ours[name][:4].numpy() == pytest.approx([float(top)] * 4, rel=1e-4)


def test_rank_one_and_sizes_out_of_range_are_refused(error_of, tiny_run, monkeypatch):
    monkeypatch.setattr("app.training.model_building.load_model", None)  # told before the weights
    run = ("fit", "--config", tiny_run, "--config=methods/loram.yaml")
    told = error_of(*run, "--model.adapter.rank_pattern={k_proj: 1}")
    assert "init is LoramInit, whose factors are 0 at rank 1, which" in told
    assert "k_proj has: set model.adapter.r to at least 2, or give the size as init.gamma" in told
    assert "init.gamma must lie between 1e-06 and 1e+12, got 0" in error_of(*run, "--init.gamma=0")


def test_the_gamma_of_a_run_of_lora_one_does_not_reach_the_overlay(parsed):
    given = parsed("--config", "quickstart.yaml").init.init_args.gamma
    inits = [
        parsed("--config", "quickstart.yaml", "--config", f"methods/{name}.yaml").init.init_args
        for name in ("loram", "loram_one")
    ]
    assert given is not None
    assert [init.gamma for init in inits] == [None, 128]
