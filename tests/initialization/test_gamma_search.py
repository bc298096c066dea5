"""The search of gamma: on curves known by construction, on tiny models, in the real command."""

import math

import pytest
import torch
from torch import nn

from app.initialization.gamma_search import MAX_TRIALS, mean_loss, search_gamma
from app.models.adapter_config import LoraSettings
from app.models.lora import add_lora, base_model, lora_pairs
from tests.support import run_folders
from tests.support.one_step_oracle import make_batches


def valley(bottom, floor=1.0, untouched=8.0):
    """Return a loss with its least value at gamma = 2^bottom, and `untouched` far to the right."""

    def loss(gamma):
        away = math.log2(gamma) - bottom
        return untouched - (untouched - floor) * math.exp(-(away**2) / 8)

    return loss


@pytest.mark.parametrize("bottom", [2.0, 4.3, 6.0, 7.0, 7.4, 9.9, 13.0])
def test_the_bottom_of_a_valley_is_found_within_half_a_factor_of_two(bottom):
    gammas = []

    def loss_at(gamma):
        gammas.append(gamma)
        return valley(bottom)(gamma)

    gamma, tried = search_gamma(loss_at, 8.0)
    assert abs(math.log2(gamma) - bottom) <= 0.6
    assert gammas == list(tried)
    assert gammas[0] == 128
    assert len(gammas) == len(set(gammas)) <= MAX_TRIALS
    assert tried[gamma] == min(tried.values())


def test_no_start_is_better_than_a_worse_one():
    gamma, tried = search_gamma(lambda gamma: 8.0 + 1 / gamma, 8.0)
    assert gamma is None
    assert len(tried) == MAX_TRIALS
    assert max(tried) > 1e5  # it looked where the step is small


def test_losses_that_are_not_finite_are_walked_away_from():
    gamma, tried = search_gamma(lambda g: math.nan if g < 1000 else valley(11)(g), 8.0)
    assert gamma > 1000
    assert all(math.isinf(loss) for g, loss in tried.items() if g < 1000)
    assert search_gamma(lambda _: math.nan, 8.0)[0] is None


@pytest.mark.parametrize("build", ["tiny_llama", "tiny_gpt2", "tiny_t5"])
def test_the_mean_loss_is_that_of_plain_torch(build, request):
    model = add_lora(request.getfixturevalue(build)(), LoraSettings(r=4, lora_dropout=0.5)).train()
    with torch.no_grad():
        for pair in lora_pairs(model):
            pair.lora_B.normal_(std=0.1)
    base = base_model(model)
    batches = make_batches(base.config.is_encoder_decoder, rows=12, size=5)  # 5, 5 and 2
    mean = mean_loss(model, base, batches, torch.device("cpu"))
    assert all(module.training for module in model.modules())
    assert all(pair.lora_A.requires_grad for pair in lora_pairs(model))
    model.eval()
    total, tokens = 0.0, 0
    for batch in batches:
        inputs = {key: batch[key] for key in ("input_ids", "attention_mask", "labels")}
        with torch.no_grad():
            logits = model(**inputs).logits.double()
        labels = batch["labels"]
        if not base.config.is_encoder_decoder:
            logits, labels = logits[:, :-1], labels[:, 1:]
        flat = logits.flatten(0, 1), labels.flatten()
        total += float(nn.functional.cross_entropy(*flat, reduction="sum"))
        tokens += int((labels != -100).sum())
    assert mean == pytest.approx(total / tokens, rel=1e-6)


@pytest.mark.slow
def test_the_command_starts_from_the_best_gamma(fit, command, tiny_run, caplog):
    caplog.set_level("INFO")
    folder = fit("--init.gamma=auto")
    init = run_folders.summary(folder)["init"]
    tried = {trial["gamma"]: trial["loss"] for trial in init["gamma_search"]}
    assert 2 <= len(tried) <= MAX_TRIALS
    assert init["gamma"] == min(tried, key=tried.__getitem__)
    assert tried[init["gamma"]] < init["loss"]
    assert f"gamma {init['gamma']:g}: loss {init['loss']:.4f} -> " in caplog.text
    # The same gamma, given, is the same run.
    given = fit(f"--init.gamma={init['gamma']}")
    metrics = [run_folders.summary(f)["metrics"] for f in (folder, given)]
    assert metrics[0] == metrics[1]
    assert command("fit", "--config", tiny_run, "--init.gamma=automatic") == 2


@pytest.mark.slow
def test_without_a_better_start_training_begins_at_the_untouched_model(fit, monkeypatch):
    monkeypatch.setattr("callbacks.lora_one_init.mean_loss", lambda *_: 1e9)
    with pytest.warns(UserWarning, match="training starts from the untouched model"):
        folder = fit("--init.gamma=auto")
    summary = run_folders.summary(folder)
    assert summary["init"]["gamma"] is None
    assert summary["metrics"]["after_init"] == summary["metrics"]["zero_shot"]
