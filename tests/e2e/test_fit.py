"""Whole runs of tiny models through the command line: fit, resume, validate, test."""

import json

import pytest
import torch
from safetensors.torch import load_file

from app.training.module import LoraModule
from tests.support.run_folders import check_rows, losses, same_weights, summary, weights


@pytest.mark.parametrize("model", ["llama", "t5", "gpt2"])
def test_every_architecture_learns_and_keeps_its_base_bitwise(model, fit, run_models, monkeypatch):
    kept = {}

    def keep(module):
        kept.update({key: value.clone() for key, value in module.base.state_dict().items()})

    monkeypatch.setattr(LoraModule, "on_fit_end", keep, raising=False)
    folder = fit(
        f"--model.name={run_models / model}", "--trainer.max_steps=8", "--model.optimizer.lr=0.02"
    )
    told = summary(folder)
    assert told["metrics"]["final"]["loss"] < told["metrics"]["after_init"]["loss"]
    assert told["metrics"]["after_init"]["loss"] < told["metrics"]["zero_shot"]["loss"]
    values = list(losses(folder).values())
    assert len(values) == 8
    assert values[-1] < values[0]
    config = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    assert config["init_lora_weights"] is True
    assert config["task_type"] == ("SEQ_2_SEQ_LM" if model == "t5" else "CAUSAL_LM")
    assert config["fan_in_fan_out"] is (model == "gpt2")
    unwrapped = {key.replace(".base_layer", ""): value for key, value in kept.items()}
    original = load_file(run_models / model / "model.safetensors")
    assert len(original) > 20
    for name, value in original.items():
        found = unwrapped.get(name, unwrapped.get(f"transformer.{name}"))
        assert torch.equal(found, value), name
    moved = [key for key, value in kept.items() if "lora_B" in key and value.abs().max() > 0.01]
    assert len(moved) == len([key for key in kept if "lora_B" in key]) >= 8


@pytest.mark.slow
def test_the_same_seed_twice_another_seed_and_the_saved_config(fitted, fit, command, tmp_path):
    first, again = fitted(), fit()
    assert losses(first) == losses(again)
    assert len(losses(first)) == 3
    assert summary(first)["metrics"] == summary(again)["metrics"]
    assert same_weights(first, again)
    other = fit("--seed_everything=1")
    assert [again.name, other.name] == ["version_0", "version_1"]
    assert summary(other)["seed"] == 1
    assert losses(other) != losses(first)
    # The configuration that a run leaves behind is the run.
    assert command("fit", "--config", again / "config.yaml") == 0
    assert losses(tmp_path / "runs" / "tiny" / "version_2") == losses(first)


def test_summary(fitted):
    told = summary(fitted())
    assert (told["method"], told["seed"]) == ("lora_one", 0)
    assert told["model"]["parameters"] == 8784
    assert told["model"]["trainable_parameters"] == 2 * 1024
    assert told["model"]["fingerprint"].startswith("sha256:")
    assert told["data"]["name"] == "glue/sst2"
    assert told["data"]["rows"] == {"train": 40, "validation": 20, "test": 20}
    assert list(told["metrics"]) == ["zero_shot", "after_init", "final"]
    for scores in told["metrics"].values():
        assert set(scores) == {"loss", "accuracy", "f1", "mcc", "task_loss"}
    init = told["init"]
    assert (init["estimator"], init["passes"], init["samples"]) == ("sketch", 1, 16)
    assert init["seconds"] > 0
    assert init["peak_bytes"][0] > 2**20
    assert 0 < init["captured_energy"]["min"] <= init["captured_energy"]["mean"] <= 1
    assert len(init["layers"]) == 14
    train = told["train"]
    assert (train["steps"], train["samples"]) == (3, 24)
    assert train["samples_per_second"] == pytest.approx(24 / train["seconds"])


def test_lora_has_no_gradient_pass(fit, passes):
    told = summary(fit("--config", "methods/lora.yaml"))
    assert told["method"] == "lora"
    assert told["init"] == {}
    assert told["metrics"]["after_init"] == told["metrics"]["zero_shot"]
    assert passes == []


@pytest.mark.slow
def test_lora_one_with_plain_adamw(fitted, fit, passes):
    ours = fitted()
    passes.clear()
    plain = fit("--config", "methods/lora_one_adamw.yaml", "--model.optimizer.lr=0.01")
    assert summary(plain)["method"] == "lora_one_adamw"
    assert len(passes) == 1
    before = [summary(folder)["metrics"]["after_init"] for folder in (plain, ours)]
    assert before[0] == before[1]
    assert losses(plain)[0] == losses(ours)[0]
    assert losses(plain)[2] != losses(ours)[2]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora_one", "pissa"])
def test_validate_and_test_reproduce_the_final_scores(method, fit, command, tiny_run, logged):
    """Of a run folder and of a checkpoint, whose base is changed again if the run changed it."""
    # The published set validates, so that the test meets the same rows.
    options = ("--data.validation_size=null", "--model.optimizer.lr=0.02")
    options += (f"--config=methods/{method}.yaml",)
    folder = fit(*options)
    final = summary(folder)["metrics"]["final"]
    [checkpoint] = (folder / "checkpoints").iterdir()
    for prefix, *argv in (
        ("val", "validate", "--run", folder),
        ("test", "test", "--run", folder),
        ("val", "validate", "--config", tiny_run, *options, "--ckpt_path", checkpoint),
    ):
        logged.clear()
        assert command(*argv) == 0
        assert set(logged) == {f"{prefix}/{name}" for name in final}
        assert logged[f"{prefix}/accuracy"] == final["accuracy"]
        assert logged[f"{prefix}/loss"] == pytest.approx(final["loss"], abs=1e-5)
        assert logged[f"{prefix}/mcc"] == pytest.approx(final["mcc"], abs=1e-6)
    for moment in ("final", "test"):
        scores = summary(folder)["metrics"][moment]
        check_rows(folder / "row_scores" / f"{moment}.csv", scores, rows=20)
    assert final != summary(folder)["metrics"]["zero_shot"]


@pytest.mark.parametrize("clip", [0.0, 1e-3])
def test_accumulated_batches_of_different_sizes_make_one_token_mean(clip, fitted, fit):
    """Twelve rows as 5 + 5 + 2 and as one batch: the same loss, and the same step of plain SGD."""
    clipped = f"--trainer.gradient_clip_val={clip}"
    options = (
        "--trainer.max_steps=1",
        "--data.train_size=12",
        "--init.num_samples=8",
        "--model.optimizer=torch.optim.SGD",
        "--model.optimizer.lr=1.0",
    )
    whole = fit("--data.batch_size=12", *options, clipped)
    parts = fit("--data.batch_size=5", "--trainer.accumulate_grad_batches=3", *options, clipped)
    train = summary(parts)["train"]
    assert (train["steps"], train["samples"]) == (1, 12)
    assert losses(parts) == pytest.approx(losses(whole), rel=1e-6)
    start = weights(fitted("--data.batch_size=12", *options, "--model.optimizer.lr=0.0"))
    one, other = weights(whole), weights(parts)
    for name, value in start.items():
        moved, wanted = other[name] - value, one[name] - value
        assert float(wanted.norm()) > 0
        assert float((moved - wanted).norm() / wanted.norm()) < 1e-3


@pytest.mark.slow
def test_clipping_reaches_the_optimizer(fit):
    # With an epsilon of 1 a step is as long as the gradient: clipped to nothing, it moves nothing.
    options = ("--data.batch_size=40", "--model.optimizer.eps=1", "--model.optimizer.damping=1")
    free = losses(fit(*options))
    clipped = losses(fit(*options, "--trainer.gradient_clip_val=1e-9"))
    assert free[0] == clipped[0]
    assert free[2] < free[0] - 1e-4
    assert clipped[2] == pytest.approx(clipped[0], abs=1e-6)


@pytest.mark.slow
def test_recomputing_activations_changes_nothing(fitted, fit):
    plain = losses(fitted())
    recomputed = losses(fit("--model.gradient_checkpointing=true"))
    assert list(recomputed.values()) == pytest.approx(list(plain.values()), abs=1e-5)


@pytest.mark.parametrize(
    "options",
    [["--trainer.precision=bf16-mixed"], ["--model.dtype=bfloat16"]],
    ids=["mixed", "model"],
)
def test_half_precision(options, fit):
    told = summary(fit(*options))
    assert told["metrics"]["final"]["loss"] < told["metrics"]["zero_shot"]["loss"]
    assert told["init"]["captured_energy"]["min"] > 0.5


def test_a_dry_run_writes_nothing(command, tiny_run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = sorted(path.name for path in tmp_path.iterdir())
    asks_for_a_logger = "--trainer.callbacks=LearningRateMonitor"
    dry_run = ("fit", "--config", tiny_run, "--trainer.fast_dev_run=true", asks_for_a_logger)
    assert command(*dry_run) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    bad = "--init.num_samples=41"
    assert command(*dry_run, bad) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == before
