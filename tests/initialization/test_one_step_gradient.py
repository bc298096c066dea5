import weakref

import pytest
import torch
from torch import nn

from app.initialization.gradient_store import SketchStore
from app.initialization.one_step_gradient import Estimator, one_step_gradients
from app.models.adapter_config import LoraSettings
from app.models.lora import LoraPair, add_lora, base_model, lora_pairs
from app.utils.errors import InputError
from tests.support.mixtures import MIXTURES, TARGETS, build_mixture, gradients_by_pair
from tests.support.one_step_oracle import (
    BUILDERS,
    EXACT,
    assert_same,
    assert_untouched,
    checkpointed,
    make_batches,
    matrix,
    oracle,
    run,
    run_whole,
    snapshot,
)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("build", BUILDERS)
def test_exact_gradient_is_autograds_for_every_layer_and_micro_batch(build, checkpointing, request):
    """The oracle is the plain model on one batch of everything."""
    model = request.getfixturevalue(build)()
    is_encoder_decoder = model.config.is_encoder_decoder
    loss, gradients = oracle(model, make_batches(is_encoder_decoder)[0])
    if checkpointing:
        checkpointed(model)
    wrapped = add_lora(model, LoraSettings(r=4))
    gradients.pop("lm_head")
    names = {pair.name for pair in lora_pairs(wrapped)}
    assert names == set(gradients)
    for size in (1, 4, 6):
        result = run_whole(wrapped, make_batches(is_encoder_decoder, size=size))
        assert_same(result, loss, gradients)
        assert result.tokens == sum(int((b["labels"] != -100).sum()) for b in make_batches(False))
    assert result.seconds > 0
    assert result.peak_bytes[0] > 0


@pytest.mark.parametrize(
    ("kind", "checkpointing"), [*((kind, False) for kind in MIXTURES), ("mixtral", True)]
)
def test_the_gradient_of_each_expert_is_autograds(kind, checkpointing):
    """Whether the experts are fused, fused and transposed, or modules; an expert without tokens has none."""
    model = build_mixture(kind)
    rows = {"rows": 12 if kind == "mixtral" else 4}
    loss, gradients = gradients_by_pair(model, make_batches(kind == "switch", **rows, size=12)[0])
    wrapped = add_lora(model, LoraSettings(r=2, **TARGETS.get(kind, {})))
    if checkpointing:
        checkpointed(model)
    before = snapshot(wrapped)
    experts = [pair.name for pair in lora_pairs(wrapped) if pair.is_expert]
    idle = {name for name in experts if not gradients[name].any()}
    assert len({float(gradients[name].norm()) for name in experts}) > 8
    estimators = [EXACT, Estimator(oversampling=64)] if kind == "mixtral" else [EXACT]
    for estimator in estimators:
        result = run_whole(wrapped, make_batches(kind == "switch", **rows, size=3), estimator)
        assert {name for name in experts if result.estimates[name].norm == 0} == idle
        for name in idle:
            del result.estimates[name]
        assert_same(result, loss, gradients)
    assert_untouched(wrapped, before)


@pytest.mark.parametrize("build", BUILDERS)
def test_the_mean_over_rows_is_that_of_each_row_alone(build, request):
    model = request.getfixturevalue(build)()
    is_encoder_decoder = model.config.is_encoder_decoder
    alone = [oracle(model, batch) for batch in make_batches(is_encoder_decoder, size=1)]
    loss = sum(loss for loss, _ in alone) / len(alone)
    gradients = {
        name: torch.stack([gradients[name] for _, gradients in alone]).mean(dim=0)
        for name in alone[0][1]
    }
    wrapped = add_lora(model, LoraSettings(r=4))
    of_tokens = run_whole(wrapped, make_batches(is_encoder_decoder))
    for size in (1, 4, 6):
        batches = make_batches(is_encoder_decoder, size=size)
        result = run_whole(wrapped, batches, weighting="rows")
        assert_same(result, loss, gradients)
        assert result.tokens == of_tokens.tokens
    assert of_tokens.loss != pytest.approx(loss, rel=1e-5)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("build", ["tiny_gpt2", "tiny_t5"])
def test_training_mode_has_the_masks_of_autograds_dropout_in_each_pass(
    build, checkpointing, request
):
    model = request.getfixturevalue(build)()
    [batch] = make_batches(model.config.is_encoder_decoder)
    loss, _ = oracle(model, batch)
    torch.manual_seed(7)
    with_dropout, gradients = oracle(model, batch, train_mode=True)
    assert with_dropout != pytest.approx(loss, rel=1e-4)
    if checkpointing:
        checkpointed(model)
    wrapped = add_lora(model, LoraSettings(r=4))
    torch.manual_seed(7)
    before = snapshot(wrapped)
    for estimator in (EXACT, Estimator(oversampling=64, passes=3)):
        result = run_whole(wrapped, [batch], estimator, train_mode=True)
        assert_same(result, with_dropout, gradients, 1e-4)
    assert_untouched(wrapped, before)


def test_trained_adapters_do_not_enter_the_gradient(tiny_llama):
    model = tiny_llama()
    loss, gradients = oracle(model, make_batches(False)[0])
    wrapped = add_lora(model, LoraSettings(r=4))
    for pair in lora_pairs(wrapped):
        nn.init.normal_(pair.lora_B)
    assert_same(run_whole(wrapped, make_batches(False)), loss, gradients)


def test_no_estimate_of_a_pass_takes_memory_in_the_next(tiny_llama, monkeypatch):
    made, alive, estimates = [], [], SketchStore.estimates

    def remember(*args):
        found = estimates(*args)
        made.extend(map(weakref.ref, found.values()))
        return found

    def progress(batches, label):
        for batch in batches:
            alive.append(sum(estimate() is not None for estimate in made))
            yield batch

    monkeypatch.setattr(SketchStore, "estimates", remember)
    wrapped = add_lora(tiny_llama(), LoraSettings(r=4))
    batches, adaptive = make_batches(False), Estimator(tolerance=1e-12)
    one_step_gradients(
        wrapped, base_model(wrapped), lora_pairs(wrapped), batches, 4, adaptive, progress=progress
    )
    assert len(made) == 4 * 14
    assert alive == [0] * 4 * len(batches)


def test_a_gradient_that_is_not_finite_names_layer_batch_and_rows(tiny_llama):
    wrapped = add_lora(tiny_llama(), LoraSettings(r=4))
    down = wrapped.get_base_model().model.layers[1].mlp.down_proj
    calls = []

    def poison(gradient):
        calls.append(1)
        return gradient * float("inf") if len(calls) == 2 else gradient

    down.register_forward_pre_hook(lambda _, args: args[0].register_hook(poison) and None)
    for estimator in (EXACT, Estimator()):
        calls.clear()
        wanted = r"gradient at model\.layers\.1\.mlp\.up_proj .*micro-batch 1 .*rows \[2, 3\]"
        with pytest.raises(InputError, match=wanted):
            run(wrapped, make_batches(False, size=2), estimator)


def test_a_layer_without_gradient_is_an_error_that_names_it(tiny_llama):
    wrapped = add_lora(tiny_llama(), LoraSettings(r=4))
    pairs = lora_pairs(wrapped)
    other = LoraPair("unused", nn.Linear(16, 16), pairs[0].lora_A, pairs[0].lora_B, 1.0)
    batches = make_batches(False)
    with pytest.raises(RuntimeError, match=r"did not reach 1 of 15 layers, first unused"):
        one_step_gradients(wrapped, base_model(wrapped), [*pairs, other], batches, 4, EXACT)


def autocast():
    return torch.autocast("cpu", torch.bfloat16)


@pytest.mark.parametrize("build", BUILDERS)
def test_bfloat16_autocast_sums_in_float32(build, request):
    """Only the model's own products are rounded: a sketch of full width loses nothing more."""
    wrapped = add_lora(request.getfixturevalue(build)(), LoraSettings(r=4))
    batches = make_batches(wrapped.config.is_encoder_decoder, size=2)
    plain = run_whole(wrapped, batches)
    exact = run_whole(wrapped, batches, forward_context=autocast)
    sketch = run(wrapped, batches, Estimator(oversampling=64), forward_context=autocast)
    assert exact.loss == pytest.approx(plain.loss, rel=0.02)
    for name, estimate in exact.estimates.items():
        G = matrix(estimate)
        assert G.dtype == torch.float32
        assert bool(G.isfinite().all())
        assert (
            0 < float((G - matrix(plain.estimates[name])).norm()) < 0.4 * plain.estimates[name].norm
        )
        assert float((matrix(sketch.estimates[name]) - G).norm()) < 1e-4 * float(G.norm()), name


def test_bfloat16_model(tiny_llama):
    model = tiny_llama()
    loss, gradients = oracle(model, make_batches(False)[0])
    wrapped = add_lora(model.bfloat16(), LoraSettings(r=4))
    for estimator in (EXACT, Estimator(oversampling=64)):
        result = run_whole(wrapped, make_batches(False, size=2), estimator)
        assert result.loss == pytest.approx(loss, rel=0.02)
        for name, estimate in result.estimates.items():
            assert estimate.svd.S.dtype == torch.float32
            assert float((matrix(estimate) - gradients[name]).norm()) < 0.4 * gradients[name].norm()


def test_a_layers_sketch_depends_on_its_name_and_the_seed_alone(tiny_llama):
    batches = make_batches(False, size=2)
    all_layers = run(add_lora(tiny_llama(), LoraSettings(r=2)), batches, Estimator(), rank=2)
    some = add_lora(tiny_llama(), LoraSettings(r=2, target_modules=["v_proj", "down_proj"]))
    few = run(some, batches, Estimator(oversampling=2), rank=2)
    again = run(
        add_lora(tiny_llama(), LoraSettings(r=2)), batches, Estimator(oversampling=2), rank=2
    )
    other = run(some, batches, Estimator(oversampling=2, seed=1), rank=2)
    assert len(few.estimates) == 4
    assert len(all_layers.estimates) == 14
    for name, estimate in few.estimates.items():
        assert torch.equal(matrix(estimate), matrix(again.estimates[name]))
        assert not torch.equal(matrix(estimate), matrix(other.estimates[name]))


def test_progress_sees_every_pass(tiny_llama):
    labels = []

    def progress(batches, label):
        labels.append((len(batches), label))
        return batches

    wrapped = add_lora(tiny_llama(), LoraSettings(r=2))
    run(wrapped, make_batches(False, size=2), Estimator(passes=3), rank=2, progress=progress)
    assert labels == [(3, f"one-step gradient, pass {i}/3") for i in (1, 2, 3)]
    labels.clear()
    adaptive = Estimator(tolerance=1e-6)
    run(wrapped, make_batches(False, size=2), adaptive, rank=2, progress=progress)
    assert labels == [(3, f"one-step gradient, pass {i} of at most 4") for i in (1, 2, 3, 4)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"passes": 0}, r"passes must lie in 1\.\.4 or be auto, got 0"),
        ({"passes": 5}, r"passes must lie in 1\.\.4 or be auto, got 5"),
        ({"kind": "exact", "passes": 2}, "leave passes at auto"),
        *(
            ({"tolerance": value}, r"init\.estimator\.tolerance must lie between 0 and 1, got")
            for value in (0.0, -0.1, 1.0, float("nan"), float("inf"))
        ),
        ({"oversampling": -1}, "oversampling must be >= 0"),
    ],
)
def test_wrong_estimators(options, message):
    with pytest.raises(InputError, match=message):
        Estimator(**options)


@pytest.mark.parametrize(
    ("size", "passes", "mean", "worst", "left"),
    [
        (1, 1, 0.1, 0.3, 0.04),
        (4, 1, 0.1, 0.3, 0.04),
        (12, 1, 0.01, 0.06, 0.002),
        (3, 3, 0.02, 0.06, 0.003),
        (3, 4, 0.004, 0.016, 0.0003),
    ],
)
@pytest.mark.parametrize("build", BUILDERS)
def test_a_sketch_is_near_the_exact_gradient_however_the_set_is_cut(
    build, size, passes, mean, worst, left, request
):
    """A sketch is not invariant to the cut; these are the relative errors that it may make.

    The bounds are about twice the most that was seen: in one pass the mean over layers 5.3 %, the worst
    layer 13.4 % (in one micro-batch 0.6 % and 4.3 %). They are wide because a random model's spectra are
    flat, so that its leading triplets are hardly defined: what they leave of G exceeds the least possible
    by 2.2 % (0.09 %).
    tests/e2e/test_lora_one_smollm2.py has the narrow bounds of a pretrained model.
    """
    rank = 4
    wrapped = add_lora(request.getfixturevalue(build)(), LoraSettings(r=rank))
    is_encoder_decoder = wrapped.config.is_encoder_decoder
    G = run_whole(wrapped, make_batches(is_encoder_decoder, rows=12, size=12)).estimates
    batches = make_batches(is_encoder_decoder, rows=12, size=size)
    sketch = run(wrapped, batches, Estimator(passes=passes), rank=rank)
    assert sketch.estimates.keys() == G.keys()
    errors, excess = {}, {}
    for name, estimate in sketch.estimates.items():
        whole, wanted, sketched = matrix(G[name]), matrix(G[name], rank), matrix(estimate, rank)
        errors[name] = float((sketched - wanted).norm() / wanted.norm())
        excess[name] = float((whole - sketched).norm() / (whole - wanted).norm()) - 1
    assert sum(errors.values()) / len(errors) < mean
    assert max(errors.values()) < worst, max(errors, key=errors.__getitem__)
    assert max(excess.values()) < left, max(excess, key=excess.__getitem__)
