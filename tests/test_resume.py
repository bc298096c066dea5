"""A run that stops anywhere and goes on is the run that never stopped."""

import csv
import json
import random
import zlib

import pytest
import torch
from safetensors.torch import load_file

import callbacks.lora_one_init
from app.module import LoraModule

LONG = ("--trainer.max_epochs=3", "--trainer.max_steps=-1", "--output.checkpoint_every_n_steps=3")
DROPOUT = ("--model.adapter.lora_dropout=0.3",)


def table(folder):
    with (folder / "metrics.csv").open(newline="") as stream:
        return list(csv.DictReader(stream))


def values(folder, name):
    """Return a metric as {step: value}; every step stands once."""
    rows = [
        (int(row["step"]), row["epoch"], float(row[name])) for row in table(folder) if row.get(name)
    ]
    found = {step: (epoch, value) for step, epoch, value in rows}
    assert len(found) == len(rows), f"a step of {name} stands twice: {rows}"
    return found


def adapter(folder):
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def summary(folder):
    return json.loads((folder / "summary.json").read_text())


class Killed(Exception):
    """What stands for `kill -9`: nothing is saved on the way out."""


@pytest.fixture
def killed(monkeypatch):
    """Return `killed(step)`: training ends, without any warning, when this many steps are made."""

    def at(step):
        original = LoraModule.on_train_batch_start

        def start(module, batch, batch_idx):
            if module.global_step == step:
                raise Killed
            return original(module, batch, batch_idx)

        monkeypatch.setattr(LoraModule, "on_train_batch_start", start)

    return at


@pytest.fixture
def passes(monkeypatch):
    """Return a list that grows with each gradient pass and each scoring of all rows."""
    counted = []
    original = callbacks.lora_one_init.one_step_gradients

    def counting(*args, **kwargs):
        counted.append("gradient")
        return original(*args, **kwargs)

    monkeypatch.setattr(callbacks.lora_one_init, "one_step_gradients", counting)
    return counted


CASES = {
    "plain": LONG,
    "dropout": LONG + DROPOUT,
    "steps": ("--trainer.max_steps=13", *LONG[2:], *DROPOUT),
    # 5 batches an epoch: windows of 2, 2 and 1
    "accumulation": (*LONG, *DROPOUT, "--trainer.accumulate_grad_batches=2"),
    "validation": (*LONG, *DROPOUT, "--trainer.val_check_interval=2"),
    "validation_of_iterations": (
        *("--trainer.max_steps=14", "--output.checkpoint_every_n_steps=3", *DROPOUT),
        *("--trainer.val_check_interval=3", "--trainer.check_val_every_n_epoch=null"),
    ),
    "decay": (*LONG, "--model.lr_scheduler_type=cosine", "--model.warmup_steps=4"),
    "short_epochs": (*LONG, *DROPOUT, "--trainer.limit_train_batches=3", "--trainer.max_epochs=4"),
    "rare_logs": (*LONG, *DROPOUT, "--trainer.log_every_n_steps=3"),
    "workers": (*LONG, *DROPOUT, "--data.num_workers=1"),
}


@pytest.mark.parametrize("case", CASES)
def test_a_run_killed_at_any_step_has_the_losses_of_one_that_was_not(
    case, command, tiny_run, tmp_path, monkeypatch, killed, passes
):
    options = ("fit", "--config", tiny_run, *CASES[case])
    assert command(*options, "--output.name=whole") == 0
    whole = tmp_path / "runs" / "whole" / "version_0"
    steps = len(values(whole, "train/loss")) if case != "rare_logs" else 15
    moments = sorted(random.Random(zlib.crc32(case.encode())).sample(range(4, steps), 2))
    original = LoraModule.on_train_batch_start
    for moment in moments:
        killed(moment)
        with pytest.raises(Killed):
            command(*options, "--output.name=parts", "--ckpt_path=last")
        monkeypatch.setattr(LoraModule, "on_train_batch_start", original)
    assert command(*options, "--output.name=parts", "--ckpt_path=last") == 0
    assert passes == ["gradient"] * 2
    [parts] = (tmp_path / "runs" / "parts").iterdir()
    assert values(parts, "train/loss") == values(whole, "train/loss"), moments
    assert same_adapters(parts, whole)
    if any(row.get("val/loss") for row in table(whole)):
        assert values(parts, "val/loss") == values(whole, "val/loss")
    for moment in ("zero_shot", "after_init", "final"):
        assert values(parts, f"{moment}/loss") == values(whole, f"{moment}/loss")
    assert summary(parts)["metrics"] == summary(whole)["metrics"]
    for name in ("steps", "samples"):
        assert summary(parts)["train"][name] == summary(whole)["train"][name]
    assert [path.name for path in (parts / "checkpoints").iterdir()] == [f"step={steps}.ckpt"]


def same_adapters(left, right):
    left, right = adapter(left), adapter(right)
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)
