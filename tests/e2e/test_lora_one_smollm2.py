"""LoRA-One's start on the real SmolLM2-135M and real prompts: is the default accurate, does it help."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from app.initialization.gradient_store import ExactStore
from app.initialization.one_step_gradient import Estimator, make_store
from app.models.adapter_config import LoraSettings
from app.models.loading import load_model, load_tokenizer
from app.models.lora import add_lora, base_model, lora_pairs
from app.models.loss import summed_loss, supervised_logits
from app.models.source import resolve_model
from callbacks.lora_one_init import LoraOneInit
from data_modules.movie_reviews import MovieReviewsDataModule
from tests.support.gradient_streams import best, product, relative
from tests.support.initialize import initialize
from tests.support.one_step_oracle import run

pytestmark = pytest.mark.smollm2
RANK = 8


@pytest.fixture(scope="module")
def observed(smollm2_dir):
    """Return the wrapped model, 64 real prompts, G of every layer, and both estimators' results.

    All stores see the same pass, which takes a minute: the exact one, and sketches of two seeds.
    """
    source = resolve_model(str(smollm2_dir))
    data = MovieReviewsDataModule()
    data.attach(load_tokenizer(source), False)
    batches = data.gradient_batches(64, 8)
    model = add_lora(load_model(source), LoraSettings(r=RANK)).train()
    gradients, sketches, found = {}, [], []

    def sharing(pairs, ranks, estimator, device):
        sketches.extend(make_store(pairs, ranks, Estimator(seed=seed), device) for seed in (0, 1))
        return make_store(pairs, ranks, estimator, device)

    def update(store, name, x, delta, readers):
        for sketch in sketches:
            sketch.update(name, x, delta, readers)
        return store.sums[name].update(x, delta)

    estimates = ExactStore.estimates

    def end_batch(store):
        for sketch in sketches:
            sketch.end_batch()

    def keeping(store, ranks, scale):
        gradients.update({name: scale * kept.total for name, kept in store.sums.items()})
        for sketch in sketches:
            sketch.end_pass()
            found.append(sketch.estimates(ranks, scale))
        return estimates(store, ranks, scale)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("app.initialization.one_step_gradient.make_store", sharing)
        patch.setattr(ExactStore, "update", update)
        patch.setattr(ExactStore, "end_batch", end_batch)
        patch.setattr(ExactStore, "estimates", keeping)
        exact = run(model, batches, rank=RANK)
    sketched = [replace(exact, estimates=each) for each in found]
    results = {"gradients": gradients, "exact": exact, "sketched": sketched, "sketch": sketched[0]}
    return SimpleNamespace(model=model, batches=batches, **results)


def test_default_estimator_is_within_one_percent_of_the_exact_start(observed):
    exact, sketch = observed.exact.estimates, observed.sketch.estimates
    errors = {
        name: relative(product(sketch[name].svd, RANK), product(estimate.svd, RANK))
        for name, estimate in exact.items()
    }
    mean, worst = sum(errors.values()) / len(errors), max(errors, key=errors.__getitem__)
    print(f"\nrelative error: mean {mean:.3%}, worst {errors[worst]:.3%} ({worst})")
    assert len(errors) == 210
    assert mean < 0.01
    assert errors[worst] < 0.05


def test_exact_start_equals_the_float64_svd(observed):
    for pair in lora_pairs(observed.model)[::70]:
        G = observed.gradients[pair.name].double()
        estimate = observed.exact.estimates[pair.name]
        assert relative(product(estimate.svd, RANK), best(G, RANK)) < 1e-4
        S = torch.linalg.svdvals(G)
        left = float(S[RANK:].norm() / S.norm())
        assert (1 - estimate.captured_energy) ** 0.5 == pytest.approx(left, rel=1e-3)


@pytest.mark.parametrize("seed", [0, 1])
def test_printed_error_estimates_are_within_a_factor_of_two(observed, seed):
    """What the run prints (mean and worst layer); and 19 of 20 layers each for itself."""
    estimated, true = [], []
    for name, estimate in observed.sketched[seed].estimates.items():
        G, found = observed.gradients[name].double(), product(estimate.svd, RANK)
        true.append(relative(found, product(observed.exact.estimates[name].svd, RANK)))
        estimated.append(estimate.rank_error)
        cut = relative(found, G)
        assert 0.5 < (1 - estimate.captured_energy) ** 0.5 / cut < 2
        assert estimate.norm == pytest.approx(float(G.norm()), rel=0.02)
    ratios = sorted(e / t for e, t in zip(estimated, true, strict=True))
    print(
        f"\nestimated error of the rank-8 matrix: mean {sum(estimated) / len(estimated):.3%}, "
        f"worst {max(estimated):.3%}; true: mean {sum(true) / len(true):.3%}, worst {max(true):.3%}; "
        f"estimated / true in a layer: {ratios[0]:.2f} to {ratios[-1]:.2f}, 5th to 95th percentile "
        f"{ratios[10]:.2f} to {ratios[-11]:.2f}"
    )
    assert 0.5 < sum(estimated) / sum(true) < 2
    assert 0.5 < max(estimated) / max(true) < 2
    assert sum(0.5 < ratio < 2 for ratio in ratios) >= 0.95 * len(ratios)


def loss_of(observed):
    """Return the token mean over a quarter of the prompts."""
    total, tokens = 0.0, 0
    with torch.no_grad():
        for batch in observed.batches[:2]:
            found = supervised_logits(observed.model, base_model(observed.model), batch)
            total += float(summed_loss(found))
            tokens += found.labels.numel()
    return total / tokens


def test_a_small_initial_step_lowers_the_loss(observed, monkeypatch):
    """On prompts of the initialization set."""
    monkeypatch.setattr(
        "callbacks.initialization.one_step_gradients", lambda *_, **__: observed.sketch
    )
    losses = {"before": loss_of(observed)}
    for gamma in (1024.0, 256.0):
        init = initialize(LoraOneInit(gamma=gamma), observed.model, observed.batches)
        losses[gamma] = loss_of(observed)
        for pair in lora_pairs(observed.model)[::70]:
            delta = pair.scaling * (pair.lora_B @ pair.lora_A).detach().double()
            top = float(torch.linalg.svdvals(delta)[0])
            assert top == pytest.approx(pair.scaling / gamma, rel=1e-4)
    print(f"\nloss on the initialization set by gamma: {losses}")
    assert losses[1024.0] < losses["before"]
    assert losses[256.0] < losses[1024.0]
    assert init.model_extra["loss"] == observed.sketch.loss
