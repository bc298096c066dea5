"""Every method through the whole command: what it trains, what it leaves behind, how it goes on."""

import copy
import re

import pytest
import torch
from lightning.pytorch.strategies import SingleDeviceStrategy
from peft import (
    AutoPeftModelForCausalLM,
    LoraConfig,
    get_peft_model,
    get_peft_model_state_dict,
)
from transformers import AutoModelForCausalLM

from app.models.adapter_config import LoraSettings
from app.models.lora import add_lora, install, lora_pairs
from tests.support.alpha_r_reader import with_adapter
from tests.support.run_folders import same_weights, summary, weights
from tests.support.watched_fit import logits, plain_loop

# Of the tiny Llama (d 16, 2 heads of 8, 1 for keys, inner 32, 2 layers) with r = 4, by hand:
# q, o: 4 (16 + 16); k, v: 4 (16 + 8); gate, up: 4 (16 + 32); down: 4 (32 + 16); twice
LORA = 2 * 4 * (2 * 32 + 2 * 24 + 3 * 48)
MAGNITUDES = 2 * (16 + 16 + 8 + 8 + 32 + 32 + 16)
METHODS = ("lora", "rslora", "lora_plus", "p_lora", "lora_pro", "lora_pro_efficient")
METHODS += ("lora_one", "lora_one_adamw", "pissa", "lora_ga", "olora", "loram", "loram_one")
METHODS += ("reflora", "lora_sb")
TRAINED = dict.fromkeys(METHODS, LORA)
TRAINED |= {"dora": LORA + MAGNITUDES, "dora_one": LORA + MAGNITUDES, "full": 8784}
DROPOUT = "--model.adapter.lora_dropout=0.3"
OFTEN = ("--trainer.max_steps=6", "--output.checkpoint_every_n_steps=1")


def options(method):
    chosen = (f"--config=methods/{method}.yaml", *OFTEN)
    if method in ("lora_ga", "lora_sb"):
        chosen += ("--init.num_samples=16",)
    if method == "reflora":
        chosen += ("--model.optimizer.warmup_steps=2",)
    return chosen if method == "full" else (*chosen, DROPOUT)


@pytest.mark.slow
@pytest.mark.parametrize("method", TRAINED)
def test_what_a_run_leaves_computes_what_was_trained_and_a_resumed_run_leaves_the_same(
    method, fit, command, watched_fit, run_models, killed_at
):
    whole = fit(*options(method))
    record = summary(whole)
    assert record["method"] == method
    assert record["model"]["trainable_parameters"] == TRAINED[method]
    base = AutoModelForCausalLM.from_pretrained(run_models / "llama")
    if method == "full":
        assert not (whole / "adapter").exists()
        model = AutoModelForCausalLM.from_pretrained(whole / "model")
    else:
        model = AutoPeftModelForCausalLM.from_pretrained(whole / "adapter")
    trained = watched_fit["logits"]
    # Weights that LoRA+ has changed by much are rounded by 2e-5, and products by 6e-6, on some processors;
    # what OLoRA takes off the base and adds again by 1.3e-6 on one without AVX-512.
    atol = {"lora_plus": 1e-5, "olora": 4e-6}.get(method, 1e-6)
    if method in METHODS:
        served = with_adapter(copy.deepcopy(base), whole / "adapter")
        assert torch.allclose(logits(served), trained, atol=max(4 * atol, 1e-5))
    assert torch.allclose(logits(model), trained, atol=atol)
    assert not torch.allclose(logits(base), trained, atol=1e-3)
    # The same by the project's own command; the matrix of tests/support has the merged model.
    assert command("test", "--run", whole) == 0
    card = (whole / ("model" if method == "full" else "adapter") / "README.md").read_text()
    assert re.search(rf"^\| test \|.* {summary(whole)['metrics']['test']['loss']:.4f} ", card, re.M)
    with killed_at(4):
        fit(*options(method))
    parts = fit(*options(method), "--ckpt_path=last")
    assert parts.name == "version_1"
    assert same_weights(parts, whole)


PLAIN = (
    "--model.optimizer.init_args.lr=1e-3",
    "--model.lr_scheduler_type=constant",
    "--model.warmup_steps=0",
    "--trainer.max_steps=10",
)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("lora", {}),
        ("rslora", {"use_rslora": True}),
        ("dora", {"use_rslora": True, "use_dora": True}),
        ("dora_one", {"use_rslora": True, "use_dora": True}),
        ("lora_one_adamw", {"use_rslora": True}),
        ("full", {}),
    ],
)
def test_ten_steps_are_pefts_or_plain_torchs(method, options, fit, watched_fit, run_models):
    """The same model with the same start, in a plain loop over the same batches."""
    folder = fit(f"--config=methods/{method}.yaml", *PLAIN)
    model = AutoModelForCausalLM.from_pretrained(run_models / "llama")
    atol = 1e-6
    if method != "full":
        atol = 1e-5
        config = LoraConfig(r=4, lora_alpha=16, target_modules="all-linear", **options)
        model = get_peft_model(model, config)
        own = {name: p for name, p in model.named_parameters() if p.requires_grad}
        assert own.keys() == watched_fit["first"].keys()
        with torch.no_grad():
            for name, start in watched_fit["first"].items():
                own[name].copy_(start)
    assert len(watched_fit["losses"]) == 10
    expected = plain_loop(model, watched_fit["batches"])
    assert watched_fit["losses"] == pytest.approx(expected, rel=1e-5)
    wanted = model.state_dict() if method == "full" else get_peft_model_state_dict(model)
    found = weights(folder)
    assert len(found) >= 20
    assert method == "full" or found.keys() == wanted.keys()
    for name, value in found.items():
        assert torch.allclose(value, wanted[name], rtol=1e-4, atol=atol), name


@pytest.mark.parametrize("build", ["tiny_llama", "tiny_gpt2", "tiny_t5"])
def test_doras_magnitudes_belong_to_the_installed_factors(build, request):
    """DoRA computes what LoRA with the same factors does; the magnitudes are torch's norms."""
    base = request.getfixturevalue(build)()
    models = [
        add_lora(copy.deepcopy(base), LoraSettings(r=4, use_dora=dora)) for dora in (False, True)
    ]
    generator = torch.Generator().manual_seed(0)
    for pairs in zip(*(lora_pairs(model) for model in models), strict=True):
        A, B = (
            torch.randn(p.shape, generator=generator) for p in (pairs[0].lora_A, pairs[0].lora_B)
        )
        for pair in pairs:
            install(pair, A, B)
        layer = pairs[1].layer
        weight = layer.get_base_layer().weight.detach()
        weight = weight.T if build == "tiny_gpt2" else weight
        norms = (weight + pairs[1].scaling * B @ A).norm(dim=1)
        assert torch.allclose(layer.lora_magnitude_vector["default"].weight, norms, rtol=1e-5)
    plain, dora = (logits(model) for model in models)
    assert torch.allclose(plain, dora, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "optimizer",
    [
        "app.optim.preconditioned_adamw.PreconditionedAdamW",
        "app.optim.lora_plus.LoraPlusAdamW",
        "app.optim.lora_pro.LoraProAdamW",
        "app.optim.reflora.RefLoraAdamW",
        "app.optim.lora_sb.LoraSbAdamW",
    ],
)
def test_an_optimizer_of_pairs_wants_pairs(optimizer, error_of, tiny_run, monkeypatch):
    """Else it would be plain AdamW under another name."""
    # Told before any weights are loaded.
    monkeypatch.setattr("app.training.model_building.load_model", None)
    for method in ("full", "adalora"):
        options = (f"--config=methods/{method}.yaml", f"--model.optimizer={optimizer}")
        told = error_of("fit", "--config", tiny_run, *options)
        name = optimizer.rpartition(".")[2]
        assert told.startswith(f"model.optimizer is {name}, which works on LoRA pairs")
        assert "set model.optimizer to torch.optim.AdamW" in told


@pytest.mark.slow
def test_an_adapter_from_a_folder_is_asked_what_it_is(fit, error_of, tiny_run, monkeypatch):
    """Whether it has pairs, and DoRA's norms of whole weights, whatever model.adapter says beside it."""
    adalora = fit("--config=methods/adalora.yaml", "--model.adapter.adalora.init_r=6") / "adapter"
    resumed = ("fit", "--config", tiny_run, "--init=null", "--model.adapter_path")
    assert "PreconditionedAdamW, which works on LoRA pairs" in error_of(*resumed, adalora)
    dora = fit("--config=methods/dora.yaml") / "adapter"
    monkeypatch.setattr("app.training.module.Fsdp2Strategy", SingleDeviceStrategy)
    told = error_of(*resumed, dora)
    assert "the adapter has use_dora, which does not work with the sharded" in told
