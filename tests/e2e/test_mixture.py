"""A mixture of experts through the whole command."""

import re

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.support.mixtures import save_mixture
from tests.support.run_folders import summary
from tests.support.watched_fit import logits


@pytest.fixture
def mixture(tmp_path, run_models):
    return save_mixture("mixtral", tmp_path / "mixtral", run_models / "llama")


@pytest.mark.slow
def test_a_mixture_is_trained_exported_and_read_by_peft(
    mixture, fit, command, watched_fit, tmp_path
):
    run = fit(f"--model.name={mixture}", "--config=methods/lora_one.yaml")
    layers = summary(run)["init"]["layers"]
    assert {f"model.layers.1.mlp.experts.gate_up_proj.{e}" for e in range(4)} <= set(layers)
    trained = watched_fit["logits"]
    assert command("export", "--run", run, "--output", tmp_path / "out") == 0
    base = AutoModelForCausalLM.from_pretrained(mixture)
    assert not torch.allclose(logits(base), trained, atol=1e-3)
    model = peft.PeftModel.from_pretrained(base, str(tmp_path / "out"))
    assert torch.allclose(logits(model), trained, atol=1e-5)
    assert command("export", "--run", run, "--merge", "--output", tmp_path / "merged") == 0
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert torch.allclose(logits(merged), trained, atol=1e-5)
    assert command("test", "--run", run) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--config=methods/dora.yaml"], "ParamWrapper does not work with use_dora=True"),
        (["--config=methods/lora_ga.yaml"], "needs 2 r singular vectors, but .*mlp.gate.weight"),
    ],
)
def test_what_a_mixture_cannot_do_is_said_before_weights_are_loaded(
    options, message, mixture, tiny_run, error_of, monkeypatch
):
    monkeypatch.setattr("app.training.model_building.load_model", None)
    error = error_of("fit", "--config", tiny_run, f"--model.name={mixture}", *options)
    assert "\n" not in error
    assert re.search(message, error)
