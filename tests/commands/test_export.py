"""A trained adapter taken away: PEFT and plain transformers give the trained model's logits."""

import json
import os
import re
import shutil

import numpy as np
import peft
import pytest
import torch
from huggingface_hub import ModelCard
from lightning.pytorch.strategies import SingleDeviceStrategy
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

from app.training.module import LoraModule
from tests.support.run_folders import summary

CLASSES = {"llama": AutoModelForCausalLM, "gpt2": AutoModelForCausalLM, "t5": AutoModelForSeq2SeqLM}


def logits(model, tokenizer):
    encoded = tokenizer(["a warm film", "dull"], return_tensors="pt", padding=True)
    encoded.pop("token_type_ids", None)
    if model.config.is_encoder_decoder:
        encoded["decoder_input_ids"] = torch.tensor([[0, 5, 6], [0, 7, 8]])
    with torch.no_grad():
        return model.eval()(**encoded).logits


@pytest.fixture
def trained(command, tiny_run, run_models, tmp_path, monkeypatch):
    """Return `trained(kind)`: the run's folder, its base, and the logits of the model in memory."""

    def train(kind, relative=False):
        base = tmp_path / kind
        shutil.copytree(run_models / kind, base)
        kept = []

        def keep(module):
            kept.append(logits(module.model, module.tokenizer))

        monkeypatch.setattr(LoraModule, "on_fit_end", keep, raising=False)
        name = os.path.relpath(base) if relative else base
        options = (f"--model.name={name}", "--model.optimizer.lr=0.3")
        assert command("fit", "--config", tiny_run, *options) == 0
        [in_memory] = kept
        return tmp_path / "runs" / "tiny" / "version_0", base, in_memory

    return train


@pytest.mark.slow
@pytest.mark.parametrize("kind", CLASSES)
def test_elsewhere_the_model_is_the_trained_one(kind, trained, command, capsys):
    run, base, in_memory = trained(kind)
    tokenizer = AutoTokenizer.from_pretrained(run / "adapter")
    untouched = CLASSES[kind].from_pretrained(base)
    assert (logits(untouched, tokenizer) - in_memory).abs().max() > 0.05
    with_adapter = peft.PeftModel.from_pretrained(untouched, run / "adapter")
    torch.testing.assert_close(logits(with_adapter, tokenizer), in_memory, rtol=1e-5, atol=1e-5)

    assert command("export", "--run", run, "--merge") == 0
    assert f"wrote {run / 'merged'}" in capsys.readouterr().out
    with safe_open(run / "merged" / "model.safetensors", "pt") as file:
        assert not [name for name in file.keys() if "lora" in name or "base_layer" in name]  # noqa: SIM118
    card = ModelCard.load(run / "merged" / "README.md")
    assert card.data.library_name == "transformers"
    assert str(base.parent) not in str(card)
    merged, report = CLASSES[kind].from_pretrained(run / "merged", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    again = AutoTokenizer.from_pretrained(run / "merged")
    torch.testing.assert_close(logits(merged, again), in_memory, rtol=1e-5, atol=2e-5)
    assert not list(run.glob("*.part"))


def survived(base, run, merged):
    """Compute the share of each layer's update in the weights of a merged model, from the files."""
    weights = {}
    for shard in base.glob("*.safetensors"):
        weights |= load_file(shard)
    config = json.loads((run / "adapter" / "adapter_config.json").read_text())
    adapter = load_file(run / "adapter" / "adapter_model.safetensors")
    found, shares = load_file(merged / "model.safetensors"), {}
    for key in (key for key in adapter if "lora_A" in key):
        name = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        A, B = (adapter[key.replace("lora_A", f"lora_{f}")].double().numpy() for f in "AB")
        update = config["lora_alpha"] / config["r"] * B @ A
        change = (found[f"{name}.weight"].double() - weights[f"{name}.weight"].double()).numpy()
        shares[name] = (change * update).sum() / (update * update).sum()
    return shares


@pytest.mark.slow
def test_a_merged_model_says_what_is_left_of_the_update_and_can_be_tested(
    fit, command, error_of, capsys, run_models, tmp_path, monkeypatch
):
    base, kept = tmp_path / "base", []
    model = AutoModelForCausalLM.from_pretrained(run_models / "llama", dtype=torch.bfloat16)
    model.save_pretrained(base, max_shard_size="10KB")
    tokenizer = AutoTokenizer.from_pretrained(run_models / "llama")
    tokenizer.save_pretrained(base)
    assert len(list(base.glob("*.safetensors"))) > 1
    small = ("--config=methods/lora.yaml", "--model.optimizer.init_args.lr=3e-6")
    run = fit(*small, f"--model.name={base}", "--model.dtype=bfloat16")
    for dtype in ("bfloat16", "float32"):
        capsys.readouterr()
        chosen = () if dtype == "bfloat16" else ("--dtype", dtype)
        assert (
            command("export", "--run", run, "--merge", *chosen, "--output", tmp_path / dtype) == 0
        )
        out, error = capsys.readouterr()
        shares = survived(base, run, tmp_path / dtype)
        mean, least, worst = re.search(
            rf"survives in {dtype}: (.*)% on average, (.*)% at least \((.*)\)", out
        ).groups()
        assert float(mean) == pytest.approx(100 * np.mean(list(shares.values())), rel=0.01)
        assert float(least) == pytest.approx(100 * shares[worst], rel=0.01)
        assert shares[worst] == pytest.approx(min(shares.values()), abs=1e-3)
        assert ("give --dtype float32" in error) == (dtype == "bfloat16") == (float(mean) < 95)

    written = (run / "summary.json").read_bytes()
    monkeypatch.setattr(
        LoraModule,
        "on_test_end",
        lambda module: kept.append(logits(module.model, tokenizer)),
        raising=False,
    )
    assert command("test", "--run", run, "--merged", "bfloat16") == 0
    served = AutoModelForCausalLM.from_pretrained(tmp_path / "bfloat16", dtype=torch.bfloat16)
    assert torch.equal(kept[0], logits(served, tokenizer))
    # The record keeps the scores of what was trained.
    assert (run / "summary.json").read_bytes() == written
    told = error_of("fit", "--run", run, "--init=null", "--merged=bfloat16")
    assert "a merged model has no adapter to train" in told
    monkeypatch.setattr("app.training.module.Fsdp2Strategy", SingleDeviceStrategy)
    told = error_of("test", "--run", run, "--merged=bfloat16")
    assert "shards the weights that the adapter is merged into" in told


def test_the_adapter_alone(trained, command, capsys, tmp_path, monkeypatch):
    """It names its base such that PEFT finds it from anywhere, where the run named it by a relative path."""
    monkeypatch.chdir(tmp_path)
    run, base, in_memory = trained("llama", relative=True)
    assert command("export", "--run", run, "--output", tmp_path / "away") == 0
    assert "servers need a max_lora_rank of 4 or more" in capsys.readouterr().out
    shutil.rmtree(run)
    card = ModelCard.load(tmp_path / "away" / "README.md")
    assert card.data.library_name == "peft"
    assert str(tmp_path) not in str(card)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    config = json.loads((tmp_path / "away" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(base)
    assert config["init_lora_weights"] is True
    model = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "away")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "away")
    torch.testing.assert_close(logits(model, tokenizer), in_memory, rtol=1e-5, atol=1e-5)


def test_wrong_runs_and_folders(trained, error_of, tmp_path):
    run, base, _ = trained("llama")
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "precious").touch()
    for merge in ([], ["--merge"]):
        told = error_of("export", "--run", run, *merge, "--output", tmp_path / "there")
        assert "there', which exists: remove it or name another" in told
    assert [path.name for path in (tmp_path / "there").iterdir()] == ["precious"]

    plain = (base / "config.json").read_text()
    codes = {"quant_method": "gptq", "bits": 4}
    (base / "config.json").write_text(
        json.dumps({**json.loads(plain), "quantization_config": codes})
    )
    told = error_of("export", "--run", run, "--merge")
    assert "are quantised (quantization_config gptq)" in told
    (base / "config.json").write_text(plain)

    weights = load_file(base / "model.safetensors")
    weights["model.norm.weight"][0] += 1
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    expected = summary(run)["model"]["fingerprint"]
    told = error_of("export", "--run", run, "--merge")
    assert f"but the run was trained on {expected}" in told
    assert not (run / "merged").exists()

    (run / "summary.json").unlink()
    told = error_of("export", "--run", run)
    assert "lacks summary.json: expected the folder of a finished run" in told


@pytest.mark.slow
def test_an_adapter_of_another_model(trained, command, error_of, tiny_run, run_models):
    run, _, _ = trained("llama")
    options = (f"--model.adapter_path={run / 'adapter'}", "--init=null")
    other = f"--model.name={run_models / 't5'}"
    assert "does not fit the model" in error_of("fit", "--config", tiny_run, *options, other)
    told = error_of("fit", "--run", run)
    assert "LoraOneInit, which would overwrite the adapter in" in told
    # On its own model it is trained further.
    assert command("fit", "--config", tiny_run, *options) == 0
    first, second = (summary(folder)["metrics"] for folder in (run, run.with_name("version_1")))
    assert second["zero_shot"]["loss"] == pytest.approx(first["final"]["loss"], abs=1e-5)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("--run=x", "--dtype=float32"), "--dtype is given without --merge"),
        (("--run=x", "--merge", "--as=lora"), "--as and --merge are both given"),
        ((), "required: --run; see python train.py export --help"),
        (("--run=x", "--mrge"), "--mrge; see python train.py export --help"),
    ],
)
def test_wrong_usage_is_one_line(argv, message, error_of):
    told = error_of("export", *argv)
    assert message in told
    assert "\n" not in told
