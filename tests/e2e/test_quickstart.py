"""The README's first command on the real SmolLM2-135M: shortened in the fast tier, whole in the full one."""

import json

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from app.cli.main import main

PROMPT = "The film is a delight.\nresult: "


def run(tmp_path, *options):
    """Run `python train.py fit --config quickstart.yaml` and return the run's folder and its scores."""
    assert main(["fit", "--config=quickstart.yaml", f"--output.root={tmp_path}", *options]) == 0
    folder = tmp_path / "quickstart" / "version_0"
    return folder, json.loads((folder / "summary.json").read_text())["metrics"]


@pytest.mark.smollm2(fast=True)
def test_a_short_run_learns_and_peft_loads_its_adapter(tmp_path, smollm2_dir, capsys):
    folder, scores = run(
        tmp_path,
        *("--trainer.max_steps=4", "--data.validation_size=16", "--init.num_samples=16"),
        *("--data.batch_size=4", "--output.wandb=disabled", "--init.gamma=128"),
    )
    losses = [scores[moment]["loss"] for moment in ("zero_shot", "after_init", "final")]
    assert losses == sorted(losses, reverse=True)
    assert losses[1] < losses[0] / 2
    assert "step 4/4, train/loss" in capsys.readouterr().out
    factors = load_file(folder / "adapter" / "adapter_model.safetensors")
    assert len(factors) == 2 * 210
    assert all(bool(factor.isfinite().all() and factor.any()) for factor in factors.values())
    base = AutoModelForCausalLM.from_pretrained(smollm2_dir, dtype=torch.float32)
    ids = AutoTokenizer.from_pretrained(smollm2_dir)(PROMPT, return_tensors="pt")
    with torch.no_grad():
        untouched = base(**ids).logits
        adapted = PeftModel.from_pretrained(base, folder / "adapter")(**ids).logits
    assert (adapted - untouched).abs().max() > 0.1


@pytest.mark.slow(seconds=90)
@pytest.mark.smollm2
def test_the_whole_run_gains_eight_points(tmp_path):
    """The figures of the README and RESULTS.md, up to the order of sums."""
    folder, scores = run(tmp_path, "--output.wandb=offline")
    assert scores["zero_shot"]["accuracy"] == pytest.approx(0.7875, abs=0.005)
    assert scores["after_init"]["accuracy"] == pytest.approx(0.8083, abs=0.01)
    assert scores["final"]["accuracy"] == pytest.approx(0.8708, abs=0.01)
    assert scores["final"]["loss"] == pytest.approx(0.143, abs=0.005)
    for name in ("loss.png", "validation.png", "spectrum.png", "captured_energy.png"):
        assert (folder / name).read_bytes().startswith(b"\x89PNG")
