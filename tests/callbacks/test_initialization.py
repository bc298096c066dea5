"""What an initialization from gradients checks, and what it does with a layer that has none."""

import math
import warnings
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from app.initialization.factors import SVD, spectral_factors, truncated_svd
from app.initialization.gradient_estimators import GradientEstimate
from app.initialization.one_step_gradient import Estimator
from app.models.adapter_config import LoraSettings
from app.models.lora import add_lora, lora_pairs
from app.utils.errors import InputError
from callbacks.lora_one_init import LoraOneInit
from tests.support.initialize import initialize
from tests.support.mixtures import build_mixture, gradients_by_pair
from tests.support.one_step_oracle import make_batches


@pytest.mark.parametrize("gamma", [0.0, -128.0, 1e13, math.inf])
def test_gamma_has_a_range(gamma):
    with pytest.raises(InputError, match=r"init\.gamma must lie between"):
        LoraOneInit(gamma=gamma)


def test_a_layer_without_gradient_keeps_the_usual_start(tiny_llama, monkeypatch):
    """One warning names it; every other layer gets its factors."""
    model = add_lora(tiny_llama(), LoraSettings(r=4))
    pairs = lora_pairs(model)
    usual = [(p.lora_A.clone(), p.lora_B.clone()) for p in pairs]
    estimates = {}
    for number, pair in enumerate(pairs):
        G = torch.randn(pair.lora_B.shape[0], pair.lora_A.shape[1]) * (number != 1)
        estimates[pair.name] = GradientEstimate(truncated_svd(G, 5), float(G.norm()), 0.0, 0.0)
    result = SimpleNamespace(
        estimates=estimates,
        passes=1,
        loss=1.0,
        tokens=2,
        seconds=0.0,
        peak_bytes=[0],
        sent_bytes=[0],
    )
    monkeypatch.setattr("callbacks.initialization.one_step_gradients", lambda *_, **__: result)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        record = initialize(LoraOneInit(), model, [])
    messages = [str(w.message) for w in caught if "gradient is zero" in str(w.message)]
    assert len(messages) == 1
    assert "in 1 layers" in messages[0]
    assert pairs[1].name in messages[0]
    assert pairs[0].name not in messages[0]
    assert record.model_extra["layers_without_gradient"] == [pairs[1].name]
    for number, (pair, (lora_A, lora_B)) in enumerate(zip(pairs, usual, strict=True)):
        kept = torch.equal(pair.lora_A, lora_A) and torch.equal(pair.lora_B, lora_B)
        assert kept == (number == 1)
    # Rank 4 of the 5 triplets was installed, with all of the first.
    svd = estimates[pairs[0].name].svd
    wanted = spectral_factors(SVD(svd.U[:, :4], svd.S[:4], svd.V[:, :4]), 128.0)
    assert torch.equal(pairs[0].lora_B, wanted.lora_B)
    assert isinstance(pairs[0].lora_A, nn.Parameter)


def test_an_expert_without_tokens_keeps_the_usual_start():
    """One warning counts them; the record has their names. Every other pair is LoRA-One's."""
    plain = build_mixture("mixtral")
    model = add_lora(build_mixture("mixtral"), LoraSettings(r=2, lora_alpha=3))
    batch = {k: v[:, :4] for k, v in make_batches(False, rows=1)[0].items() if k != "index"}
    batch["labels"] = batch["input_ids"].clone()
    batch["labels"][:, 0] = -100
    loss, gradients = gradients_by_pair(plain, batch)
    pairs = lora_pairs(model)
    usual = [(p.lora_A.clone(), p.lora_B.clone()) for p in pairs]
    idle = [pair.name for pair in pairs if not gradients[pair.name].any()]
    assert 0 < len(idle) < 16
    with pytest.warns(UserWarning, match=f"zero in {len(idle)} layers.*{len(idle)} are experts"):
        record = initialize(LoraOneInit(estimator=Estimator("exact")), model, [batch])
    assert record.model_extra["loss"] == pytest.approx(loss, rel=1e-5)
    assert record.model_extra["layers_without_gradient"] == idle
    for pair, (lora_A, lora_B) in zip(pairs, usual, strict=True):
        if pair.name in idle:
            assert torch.equal(pair.lora_A, lora_A)
            assert torch.equal(pair.lora_B, lora_B)
            continue
        U, S, V = truncated_svd(gradients[pair.name], pair.rank)
        wanted = -(U * (S / S[0])) @ V.T / 128
        assert torch.allclose(pair.lora_B @ pair.lora_A, wanted, atol=1e-6), pair.name


@pytest.mark.parametrize(("tolerance", "passes"), [(0.5, 1), (0.01, 3), (1e-6, 4)])
def test_passes_end_with_the_first_error_below_the_tolerance(tolerance, passes, tiny_llama, caplog):
    """A random model's gradients, whose spectra are flat; where no pass is enough, a warning says so."""
    model = add_lora(tiny_llama(), LoraSettings(r=4))
    batches = make_batches(False, rows=12, size=3)
    with warnings.catch_warnings(record=True) as caught, caplog.at_level("INFO"):
        warnings.simplefilter("always")
        init = LoraOneInit(estimator=Estimator(tolerance=tolerance))
        record = initialize(init, model, batches)
    found = record.model_extra["rank_error"]["mean"]
    assert record.model_extra["passes"] == passes
    assert record.model_extra["tolerance"] == tolerance
    warned = [str(w.message) for w in caught if "init.estimator.tolerance" in str(w.message)]
    assert len(warned) == (found > tolerance) == (tolerance == 1e-6)
    if passes > 1:
        before = Estimator(passes=passes - 1)
        fewer = initialize(
            LoraOneInit(estimator=before), add_lora(tiny_llama(), LoraSettings(r=4)), batches
        )
        assert fewer.model_extra["rank_error"]["mean"] > tolerance
        assert fewer.model_extra["tolerance"] is None
