"""LoRA-GA: the factors and the training against PEFT, and the gradient that the command takes."""

import copy

import pytest
import torch
from peft import LoraGAConfig, get_peft_model
from peft.tuners.lora.loraga import preprocess_loraga

from app.initialization.factors import lora_ga_factors
from app.models.adapter_config import LoraSettings
from app.models.lora import add_lora, base_weight, install, lora_pairs, subtract_from_base
from callbacks.initialization import GradientInit
from tests.support.one_step_oracle import make_batches, run, untouched_gradients
from tests.support.run_folders import summary, weights
from tests.support.subtracted import R, initialized, peft_config
from tests.support.watched_fit import plain_loop

# PEFT's preparation trains: dropout would act.
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}


@pytest.mark.parametrize(("build", "options"), [("tiny_llama", {}), ("tiny_gpt2", NO_DROPOUT)])
def test_lora_ga_is_pefts_but_for_the_scales_of_its_columns(build, options, request):
    """PEFT multiplies lora_B by the singular values and leaves lora_A unscaled; the vectors are the same.

    With its columns at the paper's length PEFT's own model trains as ours does, step by step.
    """
    base = request.getfixturevalue(build)(**options)
    [batch] = make_batches(False, rows=12, size=12)
    ga = LoraGAConfig(direction="ArB2r", scale="stable", stable_gamma=64)
    config = peft_config(build, init_lora_weights="lora_ga", lora_ga_config=ga)
    # PEFT's preparation does not know "all-linear".
    observed = copy.deepcopy(base)
    wrapped = lora_pairs(add_lora(copy.deepcopy(base), LoraSettings(r=R)))
    config.target_modules = {pair.name for pair in wrapped}
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask", "labels")}
    preprocess_loraga(observed, config, lambda: observed(**inputs).loss.backward())
    theirs = get_peft_model(observed, config)

    model = add_lora(copy.deepcopy(base), LoraSettings(r=R))
    found = run(model, [batch], rank=2 * R)

    def lora_ga(pair):
        return lora_ga_factors(found.estimates[pair.name].svd, R, 64.0)

    ours, factors = initialized(base, lora_ga)
    others = {pair.name: pair for pair in lora_pairs(theirs)}
    assert others.keys() == factors.keys()
    for mine in lora_pairs(ours):
        A, B = factors[mine.name]
        other = others[mine.name]
        scale = B.shape[0] ** 0.25 / 8
        S = found.estimates[mine.name].svd.S[R : 2 * R]
        # The sign of each singular vector is free.
        signs = [
            torch.sign((p * q).sum(d)) for p, q, d in ((A, other.lora_A, 1), (B, other.lora_B, 0))
        ]
        their_A, their_B = signs[0][:, None] * other.lora_A, signs[1] * other.lora_B
        # PEFT takes a weight's first side for its outputs, which it is not in a Conv1D.
        first = other.layer.get_base_layer().weight.shape[0]
        lengths = first**0.25 / 8 * S
        assert torch.allclose(scale * their_A, A, atol=1e-3 * scale)
        assert torch.allclose(their_B, B / scale * lengths, atol=1e-3 * float(lengths[0]))
        with torch.no_grad():
            subtract_from_base(other, -other.lora_A, other.lora_B)  # takes PEFT's offset back
        subtract_from_base(other, A, B)
        install(other, A, B)
        assert torch.allclose(base_weight(other), base_weight(mine), atol=1e-5)
    losses = [plain_loop(model, make_batches(False, rows=20, size=2)) for model in (ours, theirs)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_the_command_initializes_with_the_gradient_of_the_untouched_model(
    fit, run_models, monkeypatch
):
    """The factors that the run subtracted, against autograd's gradient of the whole model in float64."""
    kept = []
    original = GradientInit.batches

    def keep(init, trainer):
        kept.append(list(original(init, trainer)))
        return kept[-1]

    monkeypatch.setattr(GradientInit, "batches", keep)
    folder = fit(
        *("--config=methods/lora_ga.yaml", "--init.num_samples=16", "--init.estimator.kind=exact"),
        "--init.stable_gamma=25",
    )
    record = summary(folder)
    before, after = (record["metrics"][name]["loss"] for name in ("zero_shot", "after_init"))
    assert after == pytest.approx(before, rel=1e-5)
    batches = kept[-1]
    assert sum(len(batch["input_ids"]) for batch in batches) == 16
    gradients = untouched_gradients(run_models / "llama", batches)
    state = weights(folder)
    assert len(record["init"]["layers"]) == 14
    for name in record["init"]["layers"]:
        prefix = f"base_model.model.{name}"
        A, B = (state[f"{prefix}.lora_{side}.weight"].double() for side in "AB")
        start_A, start_B = A[R:], -B[:, R:]
        U, _, Vh = torch.linalg.svd(gradients[name], full_matrices=False)
        # Spans at the paper's length: where singular values are close, vectors turn among themselves.
        length = start_B.shape[0] ** 0.25 / 25**0.5
        for start, vectors in ((start_A.T, Vh[:R].T), (start_B, U[:, R : 2 * R])):
            found, wanted = start @ start.T / length**2, vectors @ vectors.T
            assert torch.allclose(found, wanted, atol=1e-2), name


def test_lora_ga_needs_two_r_singular_vectors(error_of, tiny_run):
    lora_ga = ("fit", "--config", tiny_run, "--config=methods/lora_ga.yaml")
    message = error_of(*lora_ga, "--init.num_samples=16", "--model.adapter.r=5")
    assert "set model.adapter.r to at most 4" in message
