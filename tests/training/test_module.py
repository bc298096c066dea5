"""What surrounds the training steps: modes of the modules, the learning rate, when scores are taken."""

import math
from itertools import groupby
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import nn

from app.models.adapter_config import LoraSettings
from app.training.module import LoraModule
from app.training.optimization import make_schedule
from callbacks.score_at import ScoreAt
from tests.support.run_folders import check_rows, summary, values

SCORES = {"loss", "accuracy", "f1", "mcc", "task_loss"}
DROPOUT = "--model.adapter.lora_dropout=0.5"


def modes(module):
    return {name: part.training for name, part in module.named_modules()}


@pytest.mark.slow
@pytest.mark.parametrize("model", ["llama", "gpt2"])
def test_dropout_acts_in_every_training_step(model, fit, run_models, monkeypatch):
    """Before and after the start, the scores and a validation, which all evaluate."""
    steps = []
    original = LoraModule.training_step

    def training_step(module, batch, batch_idx):
        resting = [name for name, training in modes(module.model).items() if not training]
        twice = [module.supervised_logits(batch).logits.detach() for _ in range(2)]
        steps.append((resting, torch.equal(*twice)))
        return original(module, batch, batch_idx)

    monkeypatch.setattr(LoraModule, "training_step", training_step)
    options = ("--trainer.max_steps=4", "--trainer.val_check_interval=2")
    fit(f"--model.name={run_models / model}", DROPOUT, *options)
    assert steps == [([], False)] * 4


def test_scores_are_taken_in_evaluation_mode_and_modes_are_restored(fit, monkeypatch):
    found = []

    def on_train_end(module):
        parts = [part for part in module.modules() if isinstance(part, nn.Dropout)]
        assert any(part.p == 0.5 for part in parts)
        # A mixture of modes: restoring is more than calling train().
        module.base.model.layers[0].eval()
        before = modes(module)
        assert len(set(before.values())) == 2
        for _ in range(2):
            score = ScoreAt("final")
            score.on_fit_end(module.trainer, module)
            found.append(score.scores)
        assert modes(module) == before

    monkeypatch.setattr(LoraModule, "on_train_end", on_train_end, raising=False)
    folder = fit(DROPOUT)
    assert set(found[0]) == SCORES
    assert found[0] == found[1]
    assert summary(folder)["metrics"]["final"] == found[0]


def test_final_scores_are_computed_where_the_model_was_trained(fit, monkeypatch):
    """Lightning has moved it to the CPU by then; there is one device here, so the moves are written down."""
    moves = []
    moved, scored = SingleDeviceStrategy.model_to_device, LoraModule.supervised_logits

    def model_to_device(strategy):
        moves.append("device")
        moved(strategy)

    def supervised_logits(module, batch):
        moves.append("scored")
        return scored(module, batch)

    monkeypatch.setattr(SingleDeviceStrategy, "model_to_device", model_to_device)
    monkeypatch.setattr(LoraModule, "cpu", lambda module: moves.append("cpu"))
    monkeypatch.setattr(LoraModule, "supervised_logits", supervised_logits)
    fit()
    assert [what for what, _ in groupby(moves)] == ["device", "scored", "cpu", "device", "scored"]


def test_device_is_the_strategys_while_frozen_weights_are_elsewhere(tiny_llama):
    module = LoraModule(str(tiny_llama), adapter=LoraSettings(r=2))
    assert module.device == torch.device("cpu")
    elsewhere = torch.device("meta")
    module.trainer = SimpleNamespace(strategy=SimpleNamespace(root_device=elsewhere))
    assert module.device == elsewhere


SHAPES = {
    "linear": lambda k: (10 - k) / 6,
    "cosine": lambda k: (1 + math.cos(math.pi * (k - 4) / 6)) / 2,
    "constant_with_warmup": lambda k: 1.0,
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shape", "warmup", "batches"),
    [("linear", 4, 1), ("linear", 0.4, 1), ("cosine", 4, 2), ("constant_with_warmup", 0.4, 2)],
)
def test_learning_rate_warms_up_and_follows_its_shape(shape, warmup, batches, fit, monkeypatch):
    """Counted in optimizer steps, of which there are 10 of `batches` batches each."""
    rates = []
    original = LoraModule.on_before_optimizer_step

    def on_before_optimizer_step(module, optimizer):
        rates.extend({group["lr"] for group in optimizer.param_groups})
        original(module, optimizer)

    monkeypatch.setattr(LoraModule, "on_before_optimizer_step", on_before_optimizer_step)
    fit(
        *(f"--model.lr_scheduler_type={shape}", f"--model.warmup_steps={warmup}"),
        *("--trainer.max_steps=10", f"--trainer.accumulate_grad_batches={batches}"),
        "--init=null",
    )
    factors = [k / 4 if k < 4 else SHAPES[shape](k) for k in range(10)]
    assert rates == pytest.approx([0.01 * factor for factor in factors], rel=1e-6)


@pytest.mark.slow
def test_final_scores_are_the_last_validations_if_that_saw_the_final_model_and_all_rows(
    fit, monkeypatch
):
    taken = []
    original = LoraModule.supervised_logits

    def supervised_logits(module, batch):
        taken.append(not torch.is_grad_enabled())
        return original(module, batch)

    def scored(*argv):
        taken.clear()
        folder = fit("--trainer.val_check_interval=2", *argv)
        validated = {name: values(folder, f"val/{name}") for name in SCORES}
        assert all(list(steps) == [1, 3] for steps in validated.values())
        last = {name: steps[3][1] for name, steps in validated.items()}
        final = summary(folder)["metrics"]["final"]
        check_rows(folder / "row_scores" / "final.csv", final, rows=20)
        return sum(taken), final, last

    monkeypatch.setattr(LoraModule, "supervised_logits", supervised_logits)
    # Scoring the 20 validation rows takes 3 batches: zero_shot and after_init make 6.
    batches, wanted, validated = scored("--trainer.max_steps=4")
    assert batches == 6 + 3 + 3
    assert wanted == pytest.approx(validated, rel=1e-6)
    for part in ("0.5", "1"):
        limit = f"--trainer.limit_val_batches={part}"
        batches, final, validated = scored("--trainer.max_steps=4", limit)
        assert batches == 6 + 1 + 1 + 3
        assert final == pytest.approx(wanted, rel=1e-6)
        assert final["loss"] != pytest.approx(validated["loss"], rel=1e-6)
    batches, final, validated = scored("--trainer.max_steps=5")
    assert batches == 6 + 3 + 3 + 3
    assert final["loss"] != pytest.approx(validated["loss"], rel=1e-6)


@pytest.mark.parametrize(("steps", "warmup"), [(0, 0.03), (2, 2), (2, 5)])
def test_a_polynomial_without_a_step_behind_the_warm_up(steps, warmup, fit):
    folder = fit(
        *("--model.lr_scheduler_type=polynomial", f"--model.warmup_steps={warmup}"),
        *(f"--trainer.max_steps={steps}", "--init=null"),
    )
    assert summary(folder)["train"]["steps"] == steps


def test_the_polynomial_falls_to_the_end_of_training():
    parameter = torch.nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    schedule = make_schedule("polynomial", optimizer, 2, 6)
    rates = []
    for _ in range(6):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates == pytest.approx([0, 0.5, 1, 0.75, 0.5, 0.25], abs=1e-6)
