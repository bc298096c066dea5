"""What is built of a base model and its adapter."""

import torch
from safetensors.torch import load_file

from app.models.adapter_config import LoraSettings
from app.models.adapter_io import save_adapter
from app.models.loading import load_model
from app.models.lora import add_lora, lora_pairs
from app.training.model_building import adapt
from app.training.module import LoraModule


def test_a_merged_model_is_rounded_once(tiny_llama, tiny_model_dir, tmp_path):
    """Every weight is within half a unit of bfloat16's last place (8 bits) of W + s B A in float64."""
    adapted = add_lora(tiny_llama(), LoraSettings(r=4))
    with torch.no_grad():
        for pair in lora_pairs(adapted):
            pair.lora_B.normal_(std=0.02)
    save_adapter(adapted, tmp_path / "adapter", str(tiny_model_dir))
    settings = LoraModule(
        str(tiny_model_dir), adapter_path=str(tmp_path / "adapter"), merged="bfloat16"
    )
    merged = adapt(load_model(settings.source, torch.bfloat16), settings, trainable=False)
    base, pairs = load_file(tiny_model_dir / "model.safetensors"), lora_pairs(adapted)
    assert len(pairs) == 14
    for pair in pairs:
        update = pair.scaling * pair.lora_B.double() @ pair.lora_A.double()
        wanted = base[f"{pair.name}.weight"].double() + update
        found = merged.get_parameter(f"{pair.name}.weight")
        assert found.dtype == torch.bfloat16
        half = 2.0 ** (torch.frexp(wanted).exponent - 9)
        assert ((found.double() - wanted).abs() <= 1.001 * half).all(), pair.name
