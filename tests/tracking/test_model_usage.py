"""What a model card says: the code loads the base that was trained on."""

from dataclasses import replace

import pytest
import torch

from app.models.loading import load_model
from app.models.quantization import quantized_layers
from app.models.source import resolve_model
from app.tracking.model_usage import BaseName, loading_code


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_quantised_base_has_the_codes_that_were_trained_on(quantization, dtype, wide_models):
    folder = str(wide_models / "llama")
    base = BaseName("llama", "llama", quantization=quantization)
    code = loading_code(base, whole=False, encodes=False, dtype=dtype).partition("\nmodel =")[0]
    scope = {}
    exec(code.replace("BASE", folder), scope)
    source = replace(resolve_model(folder), quantization=quantization)
    trained = load_model(source, getattr(torch, dtype))
    layers = [dict(quantized_layers(model)) for model in (scope["base"], trained)]
    assert layers[0].keys() == layers[1].keys() > set()
    for name, layer in layers[0].items():
        assert torch.equal(layer.weight.data, layers[1][name].weight.data), name
        computed = (getattr(each[name], "compute_dtype", None) for each in layers)
        assert len(set(computed)) == 1
