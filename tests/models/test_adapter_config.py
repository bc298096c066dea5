"""The adapter's settings are PEFT's: against PEFT's own model, by the real command."""

import json
import typing
from dataclasses import fields

import pytest
import torch
from peft import (
    AdaLoraConfig,
    AutoPeftModelForCausalLM,
    LoraConfig,
    get_peft_model_state_dict,
)
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from app.models.adapter_config import AdaLoraBudget, LoraSettings, unsupported_settings
from app.models.lora import add_lora, lora_pairs
from app.utils.errors import InputError
from tests.support.watched_fit import logits, train_pefts_own

SETTINGS = {
    "target_modules": ["q_proj", "k_proj", "v_proj", "down_proj"],
    "exclude_modules": ["v_proj"],
    "layers_to_transform": [1],
    "layers_pattern": "layers",
    "rank_pattern": {"k_proj": 2, r"model\.layers\.\d\.mlp\.down_proj": 3},
    "alpha_pattern": {"down_proj": 5.0, "q_proj": 7.0},
}
LAYERS = {"self_attn.q_proj": (4, 7.0), "self_attn.k_proj": (2, 16.0), "mlp.down_proj": (3, 5.0)}
"""Rank and lora_alpha of the layers that these settings leave."""
OPTIONS = {
    name: f"--model.adapter.{name}={value if isinstance(value, str) else json.dumps(value)}"
    for name, value in SETTINGS.items()
}
PLAIN = "--model.adapter.use_rslora=false"
EXACT_PLAIN = ["--init.estimator.kind=exact", PLAIN]
VARIED = [OPTIONS["rank_pattern"], OPTIONS["alpha_pattern"]]


@pytest.mark.parametrize("use_rslora", [True, False])
def test_ten_steps_of_every_setting_are_pefts(use_rslora, fit, watched_fit, run_models):
    folder = fit(
        "--config=methods/lora.yaml",
        *OPTIONS.values(),
        f"--model.adapter.use_rslora={use_rslora}",
        "--model.optimizer.init_args.lr=1e-3",
        "--model.lr_scheduler_type=constant",
        "--model.warmup_steps=0",
        "--trainer.max_steps=10",
    )
    assert watched_fit["pairs"] == {
        f"model.layers.1.{name}": (r, alpha / (r**0.5 if use_rslora else r))
        for name, (r, alpha) in LAYERS.items()
    }
    config = LoraConfig(r=4, lora_alpha=16, use_rslora=use_rslora, **SETTINGS)
    base = AutoModelForCausalLM.from_pretrained(run_models / "llama")
    model = train_pefts_own(watched_fit, base, config)
    written = load_file(folder / "adapter" / "adapter_model.safetensors")
    for name, wanted in get_peft_model_state_dict(model).items():
        assert torch.allclose(written[name], wanted, rtol=1e-4, atol=1e-5), name


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("lora_one", ["--trainer.callbacks=AlignmentMonitor"]),
        pytest.param("lora_one", EXACT_PLAIN, marks=pytest.mark.slow),
        ("lora_ga", ["--init.num_samples=16"]),
        pytest.param("lora_ga", ["--init.num_samples=16", PLAIN], marks=pytest.mark.slow),
        pytest.param("pissa", [], marks=pytest.mark.slow),
        pytest.param("dora_one", [], marks=pytest.mark.slow),
        pytest.param("lora_pro", [], marks=pytest.mark.slow),
        pytest.param("lora_plus", [], marks=pytest.mark.slow),
    ],
)
def test_each_layer_has_its_own_rank_and_scaling_in_every_method(
    method, options, fit, command, watched_fit, tmp_path
):
    """What PEFT loads, what `test` and `export` make of it, is what was trained."""
    folder = fit(f"--config=methods/{method}.yaml", *VARIED, *options)
    ranks = {name.split(".")[-1]: rank for name, (rank, _) in watched_fit["pairs"].items()}
    assert (ranks["k_proj"], ranks["down_proj"], ranks["v_proj"]) == (2, 3, 4)
    loaded = AutoPeftModelForCausalLM.from_pretrained(folder / "adapter")
    assert torch.allclose(logits(loaded), watched_fit["logits"], atol=1e-5)
    assert command("test", "--run", folder) == 0
    assert command("export", "--run", folder, "--merge", "--output", tmp_path / "merged") == 0
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert torch.allclose(logits(merged), watched_fit["logits"], atol=1e-5)


def test_the_start_of_lora_one_is_of_each_layers_rank(fit, watched_fit):
    """lora_B lora_A has the spectrum S / S_1 / gamma of the leading r triplets, in every layer."""
    fit("--config=methods/lora_one.yaml", *VARIED, "--init.gamma=64")
    for name, (rank, _) in watched_fit["pairs"].items():
        prefix = f"base_model.model.{name}.lora_"
        A, B = (watched_fit["first"][f"{prefix}{f}.default.weight"] for f in "AB")
        spectrum = torch.linalg.svdvals(B.double() @ A.double())
        assert spectrum[0] == pytest.approx(1 / 64, rel=1e-4)
        assert spectrum[rank - 1] > 1e-6 * spectrum[0]
        assert len(spectrum) == rank or spectrum[rank] < 1e-6 * spectrum[0]


def test_plan_counts_each_layers_rank(command, tiny_run, capsys):
    options = ["--config=methods/lora_one.yaml", *VARIED]
    assert command("plan", "--config", tiny_run, *options, "--memory_gib=1") == 0
    printed = capsys.readouterr().out
    # q, o: 4 (16 + 16); k: 2 (16 + 8); v: 4 (16 + 8); gate, up: 4 (16 + 32); down: 3 (32 + 16); twice
    wanted = 2 * (2 * 4 * 32 + 2 * 24 + 4 * 24 + 2 * 4 * 48 + 3 * 48)
    assert f"{wanted:,}" in printed
    assert "rank 2/3/4 in 14 layers" in printed


def test_the_fields_are_pefts_own():
    """Names and types; whatever else PEFT has is refused by its name."""
    for ours, theirs in ((LoraSettings, LoraConfig), (AdaLoraBudget, AdaLoraConfig)):
        types, wanted = typing.get_type_hints(ours), typing.get_type_hints(theirs)
        names = [f.name for f in fields(ours) if f.name != "adalora"]
        assert set(names) <= {f.name for f in fields(theirs)}
        for name in names:
            own = typing.get_args(types[name]) or (types[name],)
            assert set(map(typing.get_origin, own)) - {None} <= {list, dict}, name
            if isinstance(wanted[name], type) and name != "lora_alpha":  # PEFT's says int
                assert types[name] is wanted[name], name
    assert {"init_lora_weights", "modules_to_save", "layer_replication", "loftq_config"} <= set(
        unsupported_settings()
    )


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("init_lora_weights=pissa", "PEFT's init_lora_weights is not supported: set init"),
        ("modules_to_save=[lm_head]", "PEFT's modules_to_save is not supported: train every"),
        ("loftq_config.loftq_bits=4", "PEFT's loftq_config is not supported: leave it out"),
        ("layer_replication=[[0,1]]", "PEFT's layer_replication is not supported: leave it out"),
        ("adalora.total_step=9", "PEFT's total_step is not supported: it is the length of"),
        ("rank_pattern={k_prj: 2}", "rank_pattern names 'k_prj', which fits no adapted layer"),
        ("alpha_pattern={k_prj: 2}", "alpha_pattern names 'k_prj', which fits no adapted layer"),
        ("rank_pattern={k_proj: 0}", "rank_pattern must hold ranks >= 1, got {'k_proj': 0}"),
        ("alpha_pattern={k_proj: 0}", "alpha_pattern must hold numbers > 0"),
        ("rank_pattern={k_proj: 9}", "rank_pattern is 9, but model.layers.0.self_attn.k_proj"),
        ("layers_to_transform=[1]", "`layers_to_transform` cannot be used when `target_modules`"),
    ],
)
def test_what_cannot_be_had_is_refused_by_its_name(
    setting, message, error_of, tiny_run, monkeypatch
):
    if "fits" not in message and "but model" not in message:  # said before any weights are loaded
        monkeypatch.setattr("app.training.model_building.load_model", None)
    error = error_of("fit", "--config", tiny_run, f"--model.adapter.{setting}")
    assert message in error
    assert error.startswith("model.adapter") or "model.adapter." in error
    assert "\n" not in error


def test_wrong_settings(tiny_llama):
    for setting in ({"rank_pattern": {"q_proj": 2}}, {"alpha_pattern": {"q_proj": 2}}):
        with pytest.raises(InputError, match="and adalora, which exclude each other"):
            LoraSettings(adalora=AdaLoraBudget(), **setting)
    with pytest.raises(InputError, match=r"adapter\.r must be at least 1, got 0"):
        LoraSettings(r=0)
    for dropout in (-0.1, 1.0):
        with pytest.raises(InputError, match=r"lora_dropout must lie in \[0, 1\)"):
            LoraSettings(lora_dropout=dropout)
    with pytest.raises(InputError, match=r"r is 9, but .*k_proj has shape \(8, 16\): .*at most 8"):
        add_lora(tiny_llama(), LoraSettings(r=9))
    with pytest.raises(InputError, match=r"did you mean q_proj.*q_proj \(2\)"):
        add_lora(tiny_llama(), LoraSettings(target_modules=["q_prj"]))


def test_a_target_pattern_selects(tiny_llama):
    pattern = r".*layers\.1\..*(q|v)_proj"
    pairs = lora_pairs(add_lora(tiny_llama(), LoraSettings(r=4, target_modules=pattern)))
    names = [pair.name for pair in pairs]
    assert names == ["model.layers.1.self_attn.q_proj", "model.layers.1.self_attn.v_proj"]
