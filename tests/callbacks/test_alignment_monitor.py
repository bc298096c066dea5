"""The callback that watches the factors: what it writes, what it takes from elsewhere, what it leaves alone."""

import json
import math

import numpy as np
import pytest
import torch

from app.tracking.alignment_plots import MAPS, write_heat_maps
from tests.support.run_folders import same_weights, table, weights

WATCH = ("--config", "callbacks/alignment.yaml", "--trainer.callbacks.every_n_steps=2")
WATCH += ("--trainer.callbacks.num_samples=16",)
LORA = ("--config", "methods/lora.yaml")
MORE = ("--trainer.max_steps=5", "--output.checkpoint_every_n_steps=1")


@pytest.mark.slow
def test_the_start_lies_in_the_gradients_spans_and_the_end_is_that_of_the_adapter(
    fit, passes, monkeypatch
):
    monkeypatch.setattr("callbacks.alignment_monitor.write_heat_maps", write_heat_maps)
    folder = fit(*MORE, *WATCH)
    assert passes == ["callbacks.initialization"]
    found = table(folder, "alignment.csv")
    assert sorted({int(row["step"]) for row in found}) == [0, 2, 4, 5]
    layers = {row["layer"] for row in found}
    assert len(found) == 4 * len(layers) == 4 * 14
    start = [row for row in found if row["step"] == "0"]
    for row in start:
        assert float(row["angle_A"]) < 0.1
        assert float(row["angle_B"]) < 0.1
        assert float(row["captured"]) == pytest.approx(1, abs=1e-4)
    adapter = weights(folder)
    config = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    scaling = config["lora_alpha"] / config["r"]
    for row in found[-len(layers) :]:
        name = f"base_model.model.{row['layer']}"
        A, B = (adapter[f"{name}.lora_{side}.weight"].double().numpy() for side in "AB")
        values = scaling * np.linalg.svd(B @ A, compute_uv=False)[: len(A)]
        message = [float(row[f"sv_{i + 1}"]) for i in range(len(A))]
        assert message == pytest.approx(values, rel=1e-5, abs=1e-9)
        assert float(row["norm"]) == pytest.approx(np.linalg.norm(values), rel=1e-5)
    maps = sorted(path.stem.removeprefix("alignment_") for path in folder.glob("alignment_*.png"))
    assert maps == sorted(MAPS)


@pytest.mark.slow
def test_plain_lora_is_watched_by_a_pass_of_the_callbacks_own(fit, passes):
    folder = fit(*LORA, *WATCH)
    assert passes == ["callbacks.alignment_monitor"]
    rows = table(folder, "alignment.csv")
    start, later = ([row for row in rows if row["step"] == step] for step in "02")
    assert len(start) == len(later) == 14
    # lora_B = 0 has no span, and lora_A is random.
    assert all(math.isnan(float(row["angle_B"])) and float(row["norm"]) == 0 for row in start)
    assert min(float(row["angle_A"]) for row in start) > 1
    assert all(float(row["norm"]) > 0 for row in later)


@pytest.mark.slow
@pytest.mark.parametrize("method", [(), LORA])
def test_watching_changes_nothing_of_the_training_and_a_resumed_run_has_the_same_table(
    method, fitted, fit, passes, killed_at
):
    """Also if the interrupted run was of an earlier version, which had other names for file and callback."""
    plain, whole = fitted(*MORE, *method), fit(*MORE, *method, *WATCH)
    assert same_weights(plain, whole)
    with killed_at(3):
        fit(*MORE, *method, *WATCH)
    made = len(passes)
    parts = whole.parent / "version_1"
    (parts / "alignment.csv").rename(parts / "inside.csv")
    [checkpoint] = parts.glob("checkpoints/*.ckpt")
    content = torch.load(checkpoint, weights_only=True)
    content["callbacks"]["InsideTraining"] = content["callbacks"].pop("AlignmentMonitor")
    torch.save(content, checkpoint)
    assert fit(*MORE, *method, *WATCH, "--ckpt_path=last") == parts
    assert len(passes) == made
    assert (parts / "alignment.csv").read_text() == (whole / "alignment.csv").read_text()
    assert not (parts / "inside.csv").exists()


def test_scalars_reach_the_table(fit):
    folder = fit(*WATCH)
    logged = [row for row in table(folder) if row.get("alignment/norm")]
    assert [int(row["step"]) for row in logged] == [0, 1, 2]
    rows = table(folder, "alignment.csv")
    norms = [float(row["norm"]) for row in rows if row["step"] == "2"]
    assert float(logged[1]["alignment/norm"]) == pytest.approx(float(torch.tensor(norms).median()))


@pytest.mark.parametrize("method", ["adalora", "full"])
def test_a_model_without_pairs_is_left_alone(method, fit, passes, caplog):
    options = ("--model.adapter.adalora.init_r=6",) if method == "adalora" else ()
    folder = fit(f"--config=methods/{method}.yaml", *options, *WATCH)
    line = f"{method} has no LoRA pairs: no alignment metrics are measured"
    assert caplog.text.count(line) == 1
    assert passes == []
    assert not list(folder.glob("alignment*"))


@pytest.mark.slow
def test_the_reference_has_the_rank_of_the_adapter(fitted, fit):
    """Of one that comes from a folder, which model.adapter says nothing of."""
    adapter = fitted(*LORA) / "adapter"
    own = ("--init=null", f"--model.adapter_path={adapter}", *WATCH)
    tables = [(fit(*own, f"--model.adapter.r={r}") / "alignment.csv").read_text() for r in (4, 2)]
    assert tables[0] == tables[1]


def test_measurements_are_some_steps_apart(error_of, tiny_run):
    wrong = "--trainer.callbacks.every_n_steps=0"
    message = error_of("fit", "--config", tiny_run, *WATCH[:2], wrong)
    assert "AlignmentMonitor.every_n_steps must be at least 1, got 0" in message
