"""PiSSA: the factors and the training against PEFT, the subtracted base, the exported adapter."""

import copy
import json

import pytest
import torch
from peft import PeftModel, get_peft_model

from app.initialization.weight_factors import pissa_factors
from app.models.adapter_io import save_adapter
from app.models.lora import base_weight, lora_pairs
from tests.support.alpha_r_reader import with_adapter
from tests.support.one_step_oracle import BUILDERS, make_batches
from tests.support.subtracted import R, initialized, peft_config
from tests.support.watched_fit import logits, plain_loop


def pissa(pair):
    return pissa_factors(base_weight(pair).float(), R, pair.scaling)


@pytest.mark.parametrize("build", ["tiny_llama", "tiny_gpt2"])
def test_pissa_and_ten_steps_of_it_are_pefts(build, request):
    base = request.getfixturevalue(build)()
    ours, _ = initialized(base, pissa)
    theirs = get_peft_model(copy.deepcopy(base), peft_config(build, init_lora_weights="pissa"))
    for mine, other in zip(lora_pairs(ours), lora_pairs(theirs), strict=True):
        assert mine.name == other.name
        product, wanted = (p.lora_B @ p.lora_A for p in (mine, other))
        assert torch.allclose(product, wanted, atol=1e-5 * float(wanted.abs().max()))
        for factor in ("lora_A", "lora_B"):  # the same up to a sign for each triplet
            a, b = getattr(mine, factor).abs(), getattr(other, factor).abs()
            assert torch.allclose(a, b, atol=1e-4)
        assert torch.allclose(base_weight(mine), base_weight(other), atol=1e-6)
    losses = [plain_loop(model, make_batches(False, rows=20, size=2)) for model in (ours, theirs)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.parametrize("build", BUILDERS)
@pytest.mark.parametrize("use_rslora", [False, True])
def test_the_initialization_changes_nothing_and_the_export_fits_the_untouched_base(
    build, use_rslora, request, tmp_path
):
    base = request.getfixturevalue(build)()
    model, factors = initialized(base, pissa, use_rslora)
    before = logits(base)
    assert torch.allclose(logits(model), before, atol=1e-5)
    with torch.no_grad():
        for pair in lora_pairs(model):  # training
            pair.lora_A.add_(0.05 * torch.randn_like(pair.lora_A))
            pair.lora_B.add_(0.05 * torch.randn_like(pair.lora_B))
    trained = logits(model)
    assert not torch.allclose(trained, before, atol=1e-2)
    save_adapter(model, tmp_path, "somewhere", factors)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["r"], config["use_rslora"]) == (2 * R, False)
    assert config["base_model_name_or_path"] == "somewhere"
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    assert torch.allclose(logits(loaded), trained, atol=1e-4)
    assert lora_pairs(loaded)[0].scaling == pytest.approx(lora_pairs(model)[0].scaling)
    assert torch.allclose(logits(with_adapter(base, tmp_path)), trained, atol=1e-4)


@pytest.mark.parametrize("build", BUILDERS)
def test_on_a_bfloat16_base_the_initialization_changes_its_rounding(build, request):
    """Within twice the 5e-3 that the docstrings of both initializations give."""
    base = request.getfixturevalue(build)().bfloat16()
    model, _ = initialized(base, pissa)
    before, after = (logits(m).float() for m in (base, model))
    assert 0 < float((after - before).norm() / before.norm()) < 1e-2
