"""The search of gamma: on curves known by construction, on tiny models, in the real command."""

import json
import math
import statistics

import pytest
import torch
from torch import nn

from app.initialization.factors import SVD, spectral_factors, truncated_svd
from app.initialization.gamma_search import (
    PASSES,
    RowLosses,
    difference,
    first_gamma,
    install_best,
    search_gamma,
    task_losses,
)
from app.models.adapter_config import LoraSettings
from app.models.lora import add_lora, base_model, install, lora_pairs
from tests.support import run_folders
from tests.support.one_step_oracle import make_batches, model_inputs, run

CPU = torch.device("cpu")
LABELS = [7, 90, 31]  # first tokens of three label words


def bounds_of(curve, first):
    """Search a curve over log2(gamma); return the gamma found and those tried, as exponents."""
    gamma, tried = search_gamma(lambda gamma: curve(math.log2(gamma)), 2.0**first)
    assert len(tried) == PASSES - 1
    return gamma and math.log2(gamma), [math.log2(gamma) for gamma in tried]


@pytest.mark.parametrize(
    ("bottom", "found", "tried"),
    [
        (5.0, 7, [9, 11, 7]),
        (8.2, 9, [9, 11, 7]),
        (9.9, 9, [9, 11, 7]),
        (10.2, 11, [9, 11, 13]),
        (14.0, 13, [9, 11, 13]),
    ],
)
def test_the_search_goes_to_the_better_side(bottom, found, tried):
    """Of a valley with -1 at its bottom."""
    assert bounds_of(lambda at: (at - bottom) ** 2 / 100 - 1, first=9) == (found, tried)


def test_no_step_is_better_than_one_that_may_lower_nothing():
    assert bounds_of(lambda at: 2.0**-at, first=9) == (None, [9, 11, 13])


def test_losses_that_are_not_finite_are_walked_away_from():
    assert bounds_of(lambda at: math.nan if at < 12 else -1.0, first=9) == (13, [9, 11, 13])
    assert bounds_of(lambda at: math.nan, first=9) == (None, [9, 11, 13])


def test_the_first_gamma_takes_the_loss_away_to_first_order():
    """Of a loss that is linear in the weights, whose gradients are known."""
    g = torch.Generator().manual_seed(0)
    gradients = [torch.randn(12, 9, generator=g), 5 * torch.randn(7, 20, generator=g)]
    steps = [
        (scaling, truncated_svd(G, 3)) for scaling, G in zip((2.0, 0.5), gradients, strict=True)
    ]
    for unit in (None, 4.0):
        gamma = first_gamma(steps, unit, loss=1.7)
        assert math.log2(gamma) == round(math.log2(gamma))
        change = 0.0
        for (scaling, svd), G in zip(steps, gradients, strict=True):
            lora_A, lora_B = spectral_factors(svd, gamma, unit)
            change += scaling * float((G * (lora_B @ lora_A)).sum())
        assert 0.5**0.51 < -change / 1.7 < 2**0.51


def test_the_difference_has_the_error_of_its_mean():
    """Against the statistics module; and a token mean whose rows have different lengths, by hand."""
    a, b = [1.0, 2.5, 0.5, 3.0], [0.5, 2.0, 1.5, 1.0]
    ones = torch.ones(4, dtype=torch.float64)
    rows = [RowLosses(torch.tensor(sums, dtype=torch.float64), ones) for sums in (a, b)]
    change = [x - y for x, y in zip(a, b, strict=True)]
    found = difference(*rows)
    assert found.loss == pytest.approx(statistics.mean(a))
    assert found.excess == pytest.approx(statistics.mean(change))
    assert found.error == pytest.approx(statistics.stdev(change) / 2)
    # A padding row counts nowhere.
    counts = torch.tensor([1.0, 3.0, 0.0], dtype=torch.float64)
    tokens = [
        RowLosses(torch.tensor(sums, dtype=torch.float64), counts)
        for sums in ([4.0, 2.0, 0.0], [1.0, 1.0, 0.0])
    ]
    assert difference(*tokens) == pytest.approx((6 / 4, 4 / 4, math.sqrt(2 * (2**2 + 2**2)) / 4))
    one = RowLosses(torch.ones(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64))
    assert difference(one, one).error == math.inf


def adapted(build, request):
    """Return a tiny model whose adapter does something, and batches of 5, 5 and 2 rows with classes."""
    model = add_lora(request.getfixturevalue(build)(), LoraSettings(r=4, lora_dropout=0.5)).train()
    with torch.no_grad():
        for pair in lora_pairs(model):
            pair.lora_B.normal_(std=0.1)
    batches = make_batches(base_model(model).config.is_encoder_decoder, rows=12, size=5)
    for batch in batches:
        batch["target"] = batch["index"] % len(LABELS)
    return model, batches


def logits_and_labels(model, batch):
    """Return transformers' own logits in float64 and the token that each position should predict."""
    with torch.no_grad():
        logits = model(**model_inputs(batch)).logits.double()
    if base_model(model).config.is_encoder_decoder:
        return logits, batch["labels"]
    return logits[:, :-1], batch["labels"][:, 1:]


@pytest.mark.parametrize("build", ["tiny_llama", "tiny_gpt2", "tiny_t5"])
def test_without_classes_the_task_loss_is_the_training_loss(build, request):
    model, batches = adapted(build, request)
    losses = task_losses(model, base_model(model), batches, [], CPU)
    assert all(module.training for module in model.modules())
    assert all(pair.lora_A.requires_grad for pair in lora_pairs(model))
    model.eval()
    total, tokens = 0.0, 0
    for batch in batches:
        logits, labels = logits_and_labels(model, batch)
        flat = logits.flatten(0, 1), labels.flatten()
        total += float(nn.functional.cross_entropy(*flat, reduction="sum"))
        tokens += int((labels != -100).sum())
    assert float(losses.sums.sum() / losses.counts.sum()) == pytest.approx(total / tokens, rel=1e-6)
    answers = [int((row != -100).sum()) for batch in batches for row in batch["labels"]]
    assert losses.counts.tolist() == answers
    by_row = task_losses(model, base_model(model), batches, [], CPU, weighting="rows")
    assert torch.equal(by_row.sums, losses.sums / losses.counts)
    assert by_row.counts.tolist() == [1.0] * 12


@pytest.mark.parametrize("build", ["tiny_llama", "tiny_gpt2", "tiny_t5"])
def test_with_classes_it_is_the_cross_entropy_among_the_label_words(build, request):
    """Where each answer begins, and of its rows alone: padding rows have no answer."""
    model, batches = adapted(build, request)
    for batch, row in zip(batches, (4, 0, 1), strict=True):
        batch["target"][row] = -1
        batch["labels"][row] = -100
    found = task_losses(model, base_model(model), batches, LABELS, CPU)
    model.eval()
    losses = []
    for batch in batches:
        logits, labels = logits_and_labels(model, batch)
        for row, target in enumerate(batch["target"].tolist()):
            if target >= 0:
                begin = int((labels[row] != -100).nonzero()[0])
                z = logits[row, begin, LABELS]
                losses.append(float(z.logsumexp(0) - z[target]))
    assert len(losses) == 9
    assert found.sums.tolist() == pytest.approx(losses, rel=1e-5)
    assert found.counts.tolist() == [1.0] * 9


@pytest.mark.parametrize("helps", [True, False])
def test_a_step_that_lowers_the_loss_is_installed_and_no_other(helps, tiny_llama):
    """Which of the steps is the real losses' choice; of losses that rise, PEFT's factors come back."""
    model = add_lora(tiny_llama(), LoraSettings(r=4))
    base, pairs = base_model(model), lora_pairs(model)
    batches = make_batches(False, rows=12, size=12)
    usual = [(pair.lora_A.clone(), pair.lora_B.clone()) for pair in pairs]
    gradients = run(model, batches).estimates

    def install_step(gamma):
        for pair in pairs:
            svd = SVD(*(part[..., :4] for part in gradients[pair.name].svd))
            A, B = spectral_factors(svd, gamma)
            install(pair, A, B if helps else -B)

    def losses():
        return task_losses(model, base, batches, [], CPU)

    untouched = losses()
    search = install_best(pairs, install_step, losses, first=16.0)
    assert search.untouched == pytest.approx(float(untouched.sums.sum() / untouched.counts.sum()))
    assert len(search.trials) == PASSES - 1
    installed = [(pair.lora_A.clone(), pair.lora_B.clone()) for pair in pairs]
    for gamma, trial in search.trials.items():
        install_step(gamma)
        assert difference(losses(), untouched) == trial
    if helps:

        def bound(gamma):
            return search.trials[gamma].excess + search.trials[gamma].error

        assert search.gamma == min(search.trials, key=bound)
        install_step(search.gamma)
        wanted = [(pair.lora_A, pair.lora_B) for pair in pairs]
    else:
        assert all(trial.excess > 0 for trial in search.trials.values())
        assert search.gamma is None
        wanted = usual
    for factors, others in zip(installed, wanted, strict=True):
        assert all(map(torch.equal, factors, others))


@pytest.mark.slow
def test_the_command_starts_from_the_best_gamma(fit, command, tiny_run, tmp_path, caplog):
    caplog.set_level("INFO")
    rows = [{"instruction": f"Add {i}.", "output": "one more"} for i in range(60)]
    file = tmp_path / "rows.json"
    file.write_text(json.dumps(rows))
    sizes = ("--data.validation_size=8", "--data.batch_size=8", "--init.num_samples=40")
    task = ("--data=InstructionDataModule", f"--data.path={file}", *sizes)
    folder = fit(*task, "--init.gamma=auto")
    init = run_folders.summary(folder)["init"]
    search = init["gamma_search"]
    tried = {trial["gamma"]: trial for trial in search["trials"]}
    assert len(tried) == PASSES - 1
    assert (search["measure"], search["rows"]) == ("loss", 8)
    assert 0 < search["seconds"] < init["seconds"]
    bounds = {gamma: trial["excess"] + trial["error"] for gamma, trial in tried.items()}
    assert init["gamma"] == min(bounds, key=bounds.__getitem__)
    assert f"gamma {init['gamma']:g}: loss {search['untouched']:.4f} -> " in caplog.text
    # The same gamma, given, is the same run.
    given = fit(*task, f"--init.gamma={init['gamma']}")
    metrics = [run_folders.summary(f)["metrics"] for f in (folder, given)]
    assert metrics[0] == metrics[1]
    assert metrics[0]["after_init"]["loss"] < metrics[0]["zero_shot"]["loss"]
    assert command("fit", "--config", tiny_run, "--init.gamma=automatic") == 2


@pytest.mark.slow
def test_without_a_better_start_training_begins_at_the_untouched_model(fit, monkeypatch):
    worse = (RowLosses(torch.ones(4), torch.ones(4)) for _ in range(PASSES))
    monkeypatch.setattr("callbacks.lora_one_init.task_losses", lambda *_: next(worse))
    with pytest.warns(UserWarning, match="training starts from the untouched model"):
        folder = fit("--init.gamma=auto")
    summary = run_folders.summary(folder)
    assert summary["init"]["gamma"] is None
    assert summary["metrics"]["after_init"] == summary["metrics"]["zero_shot"]
