"""Runs on a quantised base: trained, resumed, scored, exported, and what is refused before weights are."""

import json
import shutil
from importlib.metadata import PackageNotFoundError

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from app.models.adapter_config import LoraSettings
from app.models.lora import add_lora
from app.training.module import LoraModule

NF4 = "--config=models/nf4.yaml"
IDS = torch.arange(20)[None]


@pytest.fixture
def wide(tiny_run, wide_models):
    """Return options for a model whose rows are whole blocks, in four bits."""

    return f"--model.name={wide_models / 'llama'}", NF4


def adapter(folder):
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def losses(folder):
    return json.loads((folder / "summary.json").read_text())["metrics"]


@pytest.mark.slow
def test_elsewhere_the_model_is_the_trained_one(fit, wide, wide_models, command, monkeypatch):
    """With plain PEFT on a base of four bits, loaded as the model card says, and merged into its values."""
    # Where it can, bitsandbytes rounds evaluation to bfloat16 in a model that others have loaded.
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: False)
    kept = []
    monkeypatch.setattr(
        LoraModule,
        "on_fit_end",
        lambda module: kept.append(module.model.eval()(IDS).logits.detach()),
        raising=False,
    )
    run = fit(*wide, "--model.optimizer.lr=0.3")
    card = (run / "adapter" / "README.md").read_text()
    assert "quantised to nf4 by bitsandbytes" in card
    scope = {}
    code = card.partition("```python\n")[2].partition("```")[0]
    base = str(wide_models / "llama")
    exec(
        code.replace("BASE", base).replace("FOLDER", str(run / "adapter")), scope
    )  # as a user would
    assert isinstance(scope["base"].config.quantization_config, BitsAndBytesConfig)
    torch.testing.assert_close(scope["model"](IDS).logits, kept[0], rtol=1e-5, atol=1e-5)
    plain = AutoModelForCausalLM.from_pretrained(base)
    away = peft.PeftModel.from_pretrained(plain, run / "adapter")(IDS).logits
    assert 1e-4 < (away - kept[0]).abs().max() < 1

    assert command("export", "--run", run, "--merge") == 0
    merged = AutoModelForCausalLM.from_pretrained(run / "merged")
    assert not hasattr(merged.config, "quantization_config")
    torch.testing.assert_close(merged(IDS).logits, kept[0], rtol=1e-5, atol=1e-5)
    assert "merge into the values of nf4" in (run / "merged" / "README.md").read_text()
    assert command("test", "--run", run) == 0
    beside = losses(run)["test"]["loss"]
    logged = {}
    monkeypatch.setattr(
        LoraModule,
        "on_test_end",
        lambda m: logged.update(m.trainer.callback_metrics),
        raising=False,
    )
    assert command("test", "--run", run, "--merged", "float32") == 0
    assert float(logged["test/loss"]) == pytest.approx(beside, rel=1e-5)


@pytest.mark.slow
def test_a_resumed_run_is_the_run_that_was_not_interrupted(fit, wide, error_of, tiny_run):
    whole = fit(*wide, "--trainer.max_steps=4")
    part = fit(*wide, "--trainer.max_steps=2", "--model.lr_scheduler_type=constant")
    last = f"--ckpt_path={part / 'checkpoints' / 'resume-step=2.ckpt'}"
    options = ("--config", tiny_run, *wide, "--trainer.max_steps=4")
    told = error_of("fit", *options, "--model.quantization=null", last)
    assert "model.quantization nf4 (now null)" in told
    told = error_of("fit", *options, "--config=models/int8.yaml", last)
    assert "model.quantization nf4 (now int8)" in told
    fit(*wide, "--trainer.max_steps=4", last)
    mine, theirs = adapter(part), adapter(whole)
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


def copied(model, folder, config):
    """Copy a model and say that it is quantised; return the options that take it as it is."""
    shutil.copytree(model, folder)
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization_config": config}))
    return f"--model.name={folder}", "--model.quantization=null"


def missing(package):
    raise PackageNotFoundError(package)


REFUSED = {
    "pissa": "init is PissaInit, which subtracts its factors from the base weights",
    "lora_ga": "init is LoraGaInit, which subtracts its factors from the base weights",
    "olora": "init is OloraInit, which subtracts its factors from the base weights",
    "loram": "init is LoramInit, which subtracts its factors from the base weights",
    "full": "model.adapter is null, which trains every weight",
}


@pytest.mark.parametrize("method", REFUSED)
def test_methods_that_change_the_weights(method, error_of, tiny_run, wide, monkeypatch):
    monkeypatch.setattr("app.training.model_building.load_model", None)
    told = error_of("fit", "--config", tiny_run, *wide, f"--config=methods/{method}.yaml")
    assert REFUSED[method] in told
    assert "are quantised (model.quantization nf4)" in told
    assert "--config methods/lora_one.yaml" in told


def test_what_is_missing_or_there_already(
    error_of, tiny_run, wide, wide_models, tmp_path, monkeypatch
):
    monkeypatch.setattr("app.training.model_building.load_model", None)
    fit = ("fit", "--config", tiny_run, *wide)
    codes = copied(wide_models / "llama", tmp_path / "four", {"load_in_4bit": True})
    for options, setting in (((), "model.quantization nf4"), (codes, "quantization_config bits")):
        for version, found in ((lambda _: "0.46.1", "0.46.1"), (missing, "not installed")):
            with monkeypatch.context() as patched:
                patched.setattr("importlib.metadata.version", version)
                told = error_of(*fit, *options)
            assert f"{setting}" in told
            assert f"needs bitsandbytes 0.50 or later, which is {found}: pip install -r" in told
    told = error_of(*fit, "--config=strategies/fsdp.yaml", "--trainer.devices=1")
    assert "but this strategy shards them" in told
    assert "strategies/ddp.yaml" in told
    told = error_of(*fit, "--config=models/int8.yaml", "--config=methods/dora.yaml")
    assert "use_dora does not work on weights of 8 bits" in told
    base = AutoModelForCausalLM.from_pretrained(wide_models / "llama")
    add_lora(base, LoraSettings(use_dora=True)).save_pretrained(tmp_path / "dora")
    saved = (f"--model.adapter_path={tmp_path / 'dora'}", "--model.adapter=null", "--init=null")
    told = error_of(*fit, "--config=models/int8.yaml", *saved)
    assert told.startswith("model.adapter.use_dora does not work on weights of 8 bits")
    name, plain = copied(
        wide_models / "llama", tmp_path / "gptq", {"quant_method": "gptq", "bits": 4}
    )
    told = error_of(*fit, name)
    assert "are quantised already (quantization_config gptq)" in told
    told = error_of(*fit, name, plain)
    assert "quantization_config gptq" in told
    assert "does not work on this machine (ImportError" in told
