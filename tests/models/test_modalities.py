"""Models of several modalities, trained on text: every adapted or trained weight is reached."""

from types import SimpleNamespace

import peft
import pytest
import torch
from torch import nn
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MllamaConfig,
    MllamaForCausalLM,
)

from app.models.adapter_config import LoraSettings
from app.models.adapter_io import save_adapter
from app.models.lora import add_lora, lora_pairs
from app.models.loss import summed_loss, supervised_logits
from app.models.modalities import modules_beside_text
from app.training.model_building import adapt
from tests.support.one_step_oracle import make_batches

HEADS = {"num_hidden_layers": 2, "num_attention_heads": 4}
TEXT = {"hidden_size": 32, "intermediate_size": 64, "num_key_value_heads": 2, "vocab_size": 128}
TEXT |= {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 1, **HEADS}
IMAGE = {"hidden_size": 32, "intermediate_size": 64, "image_size": 32, "patch_size": 8, **HEADS}
TOWER = ["model.vision_tower", "model.multi_modal_projector"]


def gemma3():
    text = {"head_dim": 8, **TEXT}
    vision = {"model_type": "siglip_vision_model", **IMAGE}
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    return Gemma3ForConditionalGeneration(config)


def llava():
    vision = {"model_type": "clip_vision_model", **IMAGE}
    config = LlavaConfig(text_config=LlamaConfig(**TEXT), vision_config=vision)
    return LlavaForConditionalGeneration(config)


def mllama():
    rope = {"rope_type": "default", "rope_theta": 1e4}
    text = {"cross_attention_layers": [1], "rope_parameters": rope, **TEXT}
    return MllamaForCausalLM(MllamaConfig(text_config=text).get_text_config())


BUILD = {"gemma3": gemma3, "llava": llava, "mllama": mllama}


def reached(model):
    """Return the linear layers but the head that a text runs through."""
    names = set()
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and module is not model.get_output_embeddings():
            module.register_forward_hook(lambda *_, name=name: names.add(name))
    with torch.no_grad():
        model(torch.arange(4, 12)[None])
    return names


def without_gradient(model, base):
    for batch in make_batches(False, rows=2, size=2):
        summed_loss(supervised_logits(model, base, batch)).backward()
    return [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]


@pytest.mark.parametrize("kind", BUILD)
def test_adapters_are_where_text_comes(kind, tmp_path):
    model = BUILD[kind]()
    wanted = reached(model)
    wrapped = add_lora(model, LoraSettings(r=2)).train()
    assert {pair.name for pair in lora_pairs(wrapped)} == wanted
    assert without_gradient(wrapped, model) == []
    save_adapter(wrapped, tmp_path, "base")
    plain = peft.PeftModel.from_pretrained(BUILD[kind](), str(tmp_path))
    assert {pair.name for pair in lora_pairs(plain)} == wanted


def test_what_is_left_out_is_named(caplog):
    caplog.set_level("INFO")
    add_lora(gemma3(), LoraSettings(r=2))
    # Six in each of two blocks, three in the head of the tower.
    message = f"15 linear layers that text does not reach get no adapter (in {', '.join(TOWER)});"
    assert message in caplog.text
    caplog.clear()
    add_lora(gemma3(), LoraSettings(r=2, target_modules=["gate_proj"]))
    assert "get no adapter" not in caplog.text


@pytest.mark.parametrize("exclude", ["q_proj", ["q_proj"], r".*\.q_proj"])
def test_targets_by_name_and_by_regular_expression(exclude):
    named = add_lora(
        gemma3(), LoraSettings(r=2, target_modules=["q_proj", "v_proj"], exclude_modules=exclude)
    )
    wanted = [f"model.language_model.layers.{i}.self_attn.v_proj" for i in range(2)]
    if exclude == "q_proj":  # a regular expression, which has to match a whole name
        wanted = [name.replace("v_", proj) for name in wanted for proj in ("q_", "v_")]
    assert sorted(pair.name for pair in lora_pairs(named)) == sorted(wanted)
    tower = add_lora(gemma3(), LoraSettings(r=2, target_modules=r".*vision_tower.*\.q_proj"))
    assert len(lora_pairs(tower)) == 2


@pytest.mark.parametrize("kind", BUILD)
def test_full_fine_tuning_leaves_the_rest_frozen(kind):
    model = BUILD[kind]()
    settings = SimpleNamespace(gradient_checkpointing=False, adapter_path=None, adapter=None)
    trained = adapt(model, settings).train()
    assert without_gradient(trained, model) == []
    frozen = {name for name, p in trained.named_parameters() if not p.requires_grad}
    assert frozen
    assert all(name.startswith(tuple(modules_beside_text(model))) for name in frozen)


def test_modules_beside_text(tiny_llama, tiny_t5):
    assert modules_beside_text(gemma3()) == modules_beside_text(llava()) == TOWER
    assert modules_beside_text(mllama()) == ["model.layers.1"]
    assert modules_beside_text(tiny_llama()) == modules_beside_text(tiny_t5()) == []
