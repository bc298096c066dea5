"""The callback that watches the factors: what it writes, what it takes from elsewhere, what it leaves alone."""

import csv
import json
import math
from collections import defaultdict

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import callbacks.alignment_monitor
import callbacks.initialization
from app.training.module import LoraModule
from callbacks.alignment_monitor import MEASURES

WATCH = ("--config", "callbacks/alignment.yaml", "--trainer.callbacks.every_n_steps=2")
WATCH += ("--trainer.callbacks.num_samples=16",)
LORA = ("--config", "methods/lora.yaml")
MORE = ("--trainer.max_steps=5", "--output.checkpoint_every_n_steps=1")


def rows(folder):
    with (folder / "alignment.csv").open(newline="") as stream:
        return list(csv.DictReader(stream))


@pytest.fixture
def passes(monkeypatch):
    """Return a list that grows with each gradient pass: who made it."""
    made = []
    for module in (callbacks.initialization, callbacks.alignment_monitor):

        def counting(*args, original=module.one_step_gradients, who=module.__name__, **kwargs):
            made.append(who)
            return original(*args, **kwargs)

        monkeypatch.setattr(module, "one_step_gradients", counting)
    return made


def test_the_start_lies_in_the_gradients_spans_and_the_end_is_that_of_the_adapter(fit, passes):
    folder = fit(*MORE, *WATCH)
    assert passes == ["callbacks.initialization"]
    found = rows(folder)
    assert sorted({int(row["step"]) for row in found}) == [0, 2, 4, 5]
    layers = {row["layer"] for row in found}
    assert len(found) == 4 * len(layers) == 4 * 14
    start = [row for row in found if row["step"] == "0"]
    for row in start:
        assert float(row["angle_A"]) < 0.1
        assert float(row["angle_B"]) < 0.1
        assert float(row["captured"]) == pytest.approx(1, abs=1e-4)
    adapter = load_file(folder / "adapter" / "adapter_model.safetensors")
    config = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    scaling = config["lora_alpha"] / math.sqrt(config["r"])
    for row in found[-len(layers) :]:
        name = f"base_model.model.{row['layer']}"
        A, B = (adapter[f"{name}.lora_{side}.weight"].double().numpy() for side in "AB")
        values = scaling * np.linalg.svd(B @ A, compute_uv=False)[: len(A)]
        told = [float(row[f"sv_{i + 1}"]) for i in range(len(A))]
        assert told == pytest.approx(values, rel=1e-5, abs=1e-9)
        assert float(row["norm"]) == pytest.approx(np.linalg.norm(values), rel=1e-5)
    maps = sorted(path.stem.removeprefix("alignment_") for path in folder.glob("alignment_*.png"))
    assert maps == sorted(MEASURES)


def test_plain_lora_is_watched_by_a_pass_of_the_callbacks_own(fit, passes):
    folder = fit(*LORA, *WATCH)
    assert passes == ["callbacks.alignment_monitor"]
    found = defaultdict(list)
    for row in rows(folder):
        found[int(row["step"])].append(row)
    # lora_B = 0 has no span, and lora_A is random.
    assert all(math.isnan(float(row["angle_B"])) and float(row["norm"]) == 0 for row in found[0])
    assert min(float(row["angle_A"]) for row in found[0]) > 1
    assert all(float(row["norm"]) > 0 for row in found[2])


def test_watching_changes_nothing_of_the_training(fit):
    for method in ((), LORA):
        plain, watched = (
            load_file(fit(*MORE, *method, *options) / "adapter" / "adapter_model.safetensors")
            for options in ((), WATCH)
        )
        assert all(torch.equal(plain[name], watched[name]) for name in plain)


@pytest.mark.parametrize("method", [(), LORA])
def test_a_resumed_run_has_the_table_of_one_that_was_not(method, fit, passes, monkeypatch):
    whole = fit(*MORE, *method, *WATCH)

    class Killed(Exception):
        pass

    with monkeypatch.context() as patched:
        original = LoraModule.on_train_batch_start

        def start(module, batch, batch_idx):
            if module.global_step == 3:
                raise Killed
            return original(module, batch, batch_idx)

        patched.setattr(LoraModule, "on_train_batch_start", start)
        with pytest.raises(Killed):
            fit(*MORE, *method, *WATCH)
    parts = fit(*MORE, *method, *WATCH, "--ckpt_path=last")
    assert len(passes) == 2
    assert (parts / "alignment.csv").read_text() == (whole / "alignment.csv").read_text()


def test_scalars_reach_the_table_and_histograms_wandb(fit):
    folder = fit(*WATCH, "--output.wandb=offline")
    with (folder / "metrics.csv").open(newline="") as stream:
        found = [row for row in csv.DictReader(stream) if row.get("alignment/norm")]
    assert [int(row["step"]) for row in found] == [0, 1, 2]
    told = [float(row["norm"]) for row in rows(folder) if row["step"] == "2"]
    assert float(found[1]["alignment/norm"]) == pytest.approx(float(torch.tensor(told).median()))


@pytest.mark.parametrize("method", ["adalora", "full"])
def test_a_model_without_pairs_is_left_alone(method, fit, passes, caplog):
    options = ("--model.adapter.adalora.init_r=6",) if method == "adalora" else ()
    folder = fit(f"--config=methods/{method}.yaml", *options, *WATCH)
    line = f"{method} has no LoRA pairs: no alignment metrics are measured"
    assert caplog.text.count(line) == 1
    assert passes == []
    assert not list(folder.glob("alignment*"))


def test_the_reference_has_the_rank_of_the_adapter(fit):
    """Of one that comes from a folder, which model.adapter says nothing of."""
    adapter = fit(*LORA) / "adapter"
    own = ("--init=null", f"--model.adapter_path={adapter}", *WATCH)
    tables = [(fit(*own, f"--model.adapter.r={r}") / "alignment.csv").read_text() for r in (4, 2)]
    assert tables[0] == tables[1]


def test_measurements_are_some_steps_apart(command, tiny_run, capfd):
    wrong = "--trainer.callbacks.every_n_steps=0"
    assert command("fit", "--config", tiny_run, *WATCH[:2], wrong) == 2
    assert "AlignmentMonitor.every_n_steps must be at least 1, got 0" in capfd.readouterr().err
