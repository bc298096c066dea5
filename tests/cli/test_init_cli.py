"""`python train.py init`: what other tools train is what `fit` trains."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from peft import PeftModel
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    Trainer,
    TrainingArguments,
)

from app.training.module import LoraModule
from tests.support.run_folders import losses

AUTO = {"llama": AutoModelForCausalLM, "t5": AutoModelForSeq2SeqLM}


@pytest.fixture
def first_batch(monkeypatch):
    """Return a list that gets the batches that a `fit` trains on."""
    batches, step = [], LoraModule.training_step

    def watched(module, batch, batch_idx):
        batches.append(batch)
        return step(module, batch, batch_idx)

    monkeypatch.setattr(LoraModule, "training_step", watched)
    return batches


def first_loss_of_transformers(model, batch, folder):
    """Return the first loss that transformers' Trainer logs."""
    names = ["input_ids", "attention_mask", "labels"]
    names += ["decoder_input_ids"] if "decoder_input_ids" in batch else []
    size = len(batch["labels"])
    trainer = Trainer(
        model,
        TrainingArguments(
            str(folder),
            max_steps=1,
            per_device_train_batch_size=size,
            logging_steps=1,
            report_to=[],
            use_cpu=True,
        ),
        train_dataset=[{name: batch[name][i] for name in names} for i in range(size)],
    )
    trainer.train()
    return trainer.state.log_history[0]["loss"]


@pytest.mark.parametrize(
    ("kind", "method"),
    [
        ("llama", "lora_one"),
        pytest.param("llama", "p_lora", marks=pytest.mark.slow),  # lora_A is random
        pytest.param("llama", "dora_one", marks=pytest.mark.slow),
        pytest.param("t5", "lora_one", marks=pytest.mark.slow),
    ],
)
def test_transformers_trains_on_from_the_first_loss_of_fit(
    kind,
    method,
    fit,
    command,
    tiny_run,
    run_models,
    tiny_t5,
    first_batch,
    tmp_path,
    capsys,
):
    base = run_models / kind
    if kind == "t5":  # without dropout, which each tool draws by itself
        base = Path(shutil.copytree(base, tmp_path / kind))
        tiny_t5(dropout_rate=0.0).save_pretrained(base)
    options = (
        *(f"--config=methods/{method}.yaml", f"--model.name={base}"),
        *("--data.train_size=8", "--trainer.max_steps=1", "--model.optimizer.lr=0.0"),
        "--init.num_samples=8" if "one" in method else "--init=null",
    )
    run = fit(*options, "--trainer.limit_val_batches=0")
    target = tmp_path / "init"
    # What belongs to training is left out, a callback of the user's that would fail too.
    training = (
        *("--trainer.callbacks=DeviceStatsMonitor", "--trainer.min_steps=3"),
        "--trainer.max_epochs=0",
        *("--trainer.val_check_interval=99", "--trainer.limit_train_batches=0.01"),
        *("--trainer.limit_val_batches=0.01", "--trainer.accumulate_grad_batches=0"),
        *("--trainer.log_every_n_steps=-1", "--trainer.gradient_clip_algorithm=none"),
    )
    assert command("init", "--config", tiny_run, *options, *training, "--output", target) == 0
    printed = capsys.readouterr().out
    assert not list((tmp_path / "runs" / "tiny").glob("*1")), "init makes no run folder"
    assert f"wrote {target}: {method}, initialized and not trained; rank 4, scaling" in printed
    made = load_file(target / "adapter_model.safetensors")
    kept = load_file(run / "adapter" / "adapter_model.safetensors")
    assert made.keys() == kept.keys()
    for name, value in made.items():
        torch.testing.assert_close(value, kept[name], rtol=0, atol=0)
    card = ModelCard.load(target / "README.md")
    assert "initialized, not trained" in card.text
    assert str(tmp_path) not in str(card)

    untouched = AUTO[kind].from_pretrained(base, dtype=torch.float32)
    model = PeftModel.from_pretrained(untouched, target, is_trainable=True)
    config = json.loads((target / "adapter_config.json").read_text())
    [scaling] = {m.scaling["default"] for m in model.modules() if hasattr(m, "lora_A")}
    assert scaling == config["lora_alpha"] / config["r"]
    theirs = first_loss_of_transformers(model, first_batch[0], tmp_path / "trainer")
    assert theirs == pytest.approx(losses(run)[0], abs=1e-4)


def test_what_other_tools_cannot_train_is_refused_before_the_data_are_read(
    error_of, tiny_run, tmp_path, monkeypatch
):
    monkeypatch.setattr("data_modules.glue.GlueDataModule.load", lambda *_: pytest.fail("reads"))
    told = error_of("init", "--config", tiny_run, "--config", "methods/pissa.yaml")
    assert "init is PissaInit, which changes the base weights, too" in told
    told = error_of("init", "--config", tiny_run, "--output", tmp_path)
    assert told == f"--output is {str(tmp_path)!r}, which exists: remove it or name another folder"
    told = error_of("init", "--config", tiny_run, "--output", tiny_run / "below" / "a_file")
    assert f"but {tiny_run} is no folder that can be written" in told
    told = error_of("init", "--config", tiny_run, "--ckpt_path", "last")  # there is none
    assert told == "ckpt_path is set, but init writes an untrained adapter: leave it out"
    assert not (tmp_path / "runs").exists()
