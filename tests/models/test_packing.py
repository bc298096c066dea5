"""Which models keep packed examples apart: what is said without weights, and what the weights do."""

from itertools import pairwise

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, modeling_flash_attention_utils

from app.models.loss import supervised_logits
from app.models.packing import packing_obstacle
from tests.support.mixtures import build_mixture

LENGTHS = (3, 11, 7, 5)
SIZES = {"vocab_size": 128, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 64}
KINDS = {
    "llama": {},
    "gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 2, "pad_token_id": 0},
    "gpt_neox": {},
    "gemma3_text": {
        "head_dim": 8,
        "sliding_window": 4,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    # Its layers have embeddings of their own, which are looked up by token.
    "gemma4_text": {
        "head_dim": 8,
        "global_head_dim": 8,
        "hidden_size_per_layer_input": 4,
        "vocab_size_per_layer_input": 128,
        "num_kv_shared_layers": 0,
        "sliding_window": 4,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "mistral": {"sliding_window": 4},
    "opt": {"ffn_dim": 24, "word_embed_proj_dim": 16},
    "falcon": {},
    "bloom": {"n_layer": 2, "n_head": 2},
    "mamba": {"state_size": 4},
    "qwen3_next": {
        "num_experts": 10,
        "head_dim": 8,
        "layer_types": ["linear_attention", "full_attention"],
    },
    "lfm2": {"layer_types": ["conv", "full_attention"]},
}
APART = {"llama", "gpt2", "gpt_neox", "gemma3_text", "gemma4_text", "mistral"}


def build(kind):
    if kind == "gpt_oss":
        return build_mixture(kind)
    config = AutoConfig.for_model(kind, **{**SIZES, **KINDS[kind]})
    return AutoModelForCausalLM.from_config(config).eval()


def batches():
    """Return four examples of eight supervised tokens in one packed row, and each alone."""
    examples = [torch.randint(3, 128, (n,)) for n in LENGTHS]
    packed = {
        "input_ids": torch.cat(examples)[None],
        "position_ids": torch.cat([torch.arange(n) for n in LENGTHS])[None],
    }
    packed["labels"] = packed["input_ids"].masked_fill(packed["position_ids"] == 0, -100)
    alone = [{"input_ids": e[None], "attention_mask": torch.ones_like(e)[None]} for e in examples]
    for batch in alone:
        batch["labels"] = batch["input_ids"].clone()
    return packed, alone


@torch.no_grad()
def largest_difference(model):
    """Return by how much the logits of packed examples differ from those of each alone."""
    packed, alone = batches()
    found = supervised_logits(model, model, packed).logits
    wanted = torch.cat([supervised_logits(model, model, batch).logits for batch in alone])
    return float((found - wanted).abs().max() / wanted.std())


@pytest.mark.parametrize("kind", [*KINDS, "gpt_oss"])
def test_a_model_that_mixes_packed_examples_is_known_without_weights(kind):
    model = build(kind)
    try:
        apart = largest_difference(model) < 1e-4
    except TypeError:  # no positions
        apart = False
    assert apart == (kind in APART)
    assert (packing_obstacle(model.to("meta")) is None) == apart


def test_what_no_mask_can_tell(tiny_llama, monkeypatch):
    """A state beside attention, and a flash kernel that is not given the positions."""
    model = tiny_llama().to("meta")
    monkeypatch.setattr(type(model), "_is_stateful", True)
    assert "(a state)" in packing_obstacle(model)
    monkeypatch.setattr(type(model), "_is_stateful", False)
    monkeypatch.setattr(type(model), "_supports_attention_backend", False)
    assert packing_obstacle(model) is None
    model.config._attn_implementation = "flash_attention_2"
    assert "does not hand the positions" in packing_obstacle(model)


def test_a_sequence_to_sequence_model(tiny_t5):
    assert "sequence-to-sequence" in packing_obstacle(tiny_t5())


def varlen(query, key, value, cu_seqlens_q, cu_seqlens_k, causal, softmax_scale=None, **_):
    """What flash attention computes of several examples in a row (total, heads, head size)."""
    out = []
    for begin, end in pairwise(cu_seqlens_q.tolist()):
        parts = [x[begin:end].transpose(0, 1) for x in (query, key, value)]
        attend = torch.nn.functional.scaled_dot_product_attention
        out.append(attend(*parts, is_causal=causal, scale=softmax_scale, enable_gqa=True))
    return torch.cat(out, dim=1).transpose(0, 1)


@pytest.mark.parametrize("kind", ["llama", "gpt_neox"])
def test_flash_attention_is_told_where_examples_begin(kind, monkeypatch):
    """The kernel by its definition, two packed rows, of which one is padded."""
    lazy = modeling_flash_attention_utils
    monkeypatch.setattr(lazy, "_lazy_imports", lambda *_, **__: (None, varlen, None, None, None))
    monkeypatch.setattr(lazy, "_loaded_implementation", None)
    model = build(kind)
    packed, _ = batches()
    rows = {k: torch.cat([v, v]) for k, v in packed.items()}
    cut = sum(LENGTHS[:3])
    rows["input_ids"][1, cut:] = rows["position_ids"][1, cut:] = 0
    rows["labels"][1, cut:] = -100
    wanted = supervised_logits(model, model, rows)
    model.config._attn_implementation = "flash_attention_2"
    assert packing_obstacle(model) is None
    found = supervised_logits(model, model, rows)
    assert torch.equal(found.labels, wanted.labels)
    torch.testing.assert_close(found.logits, wanted.logits)
