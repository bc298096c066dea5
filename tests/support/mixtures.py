"""Tiny mixtures of experts: how five families hold their experts, and their weights by pair without PEFT."""

import copy

import torch
from transformers import (
    GptOssConfig,
    GptOssForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    SwitchTransformersConfig,
    SwitchTransformersForConditionalGeneration,
)

from tests.support.one_step_oracle import model_inputs

EXPERTS = 4
_SIZES = {
    "vocab_size": 128,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 1024,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
}
_SWITCH = {
    "vocab_size": 128,
    "d_model": 16,
    "d_kv": 8,
    "d_ff": 24,
    "num_layers": 2,
    "num_decoder_layers": 2,
    "num_sparse_encoder_layers": 1,
    "num_sparse_decoder_layers": 1,
    "num_heads": 2,
    "num_experts": EXPERTS,
    "expert_capacity": 4096,
    "dropout_rate": 0.0,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "decoder_start_token_id": 0,
}
_KINDS = {
    "mixtral": (MixtralForCausalLM, MixtralConfig, _SIZES | {"num_local_experts": EXPERTS}),
    "qwen3_moe": (
        Qwen3MoeForCausalLM,
        Qwen3MoeConfig,
        _SIZES | {"num_experts": EXPERTS, "moe_intermediate_size": 12, "head_dim": 8},
    ),
    "olmoe": (OlmoeForCausalLM, OlmoeConfig, _SIZES | {"num_experts": EXPERTS}),
    "gpt_oss": (
        GptOssForCausalLM,
        GptOssConfig,
        _SIZES | {"num_local_experts": EXPERTS, "head_dim": 8},
    ),
    "switch": (SwitchTransformersForConditionalGeneration, SwitchTransformersConfig, _SWITCH),
}
MIXTURES = list(_KINDS)
TARGETS = {"gpt_oss": {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}}
"""Settings of the adapter that reach the experts beside the defaults."""


def build_mixture(kind, seed=0, **config):
    """Make a model of a family, whose experts differ."""
    model, settings, options = _KINDS[kind]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        built = model(settings(**{**options, **config})).eval()
        for name, p in built.named_parameters():
            if "bias" in name or "sinks" in name:  # GPT-OSS leaves these as they are in memory
                torch.nn.init.normal_(p, std=0.1)
    return built


def save_mixture(kind, folder, tokenizer):
    """Write a model of a family, with the tokenizer of another folder; return the folder."""
    build_mixture(kind).save_pretrained(folder)
    for file in tokenizer.glob("token*"):
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def weights_by_pair(model):
    """View every weight of a plain model as W (m, n) by the name of its pair."""
    return _by_pair(model, {name: p.detach() for name, p in model.named_parameters()})


def gradients_by_pair(model, batch):
    """Return the loss, and the gradient of every weight by autograd likewise; zeros where there is none."""
    plain = copy.deepcopy(model).requires_grad_(True)
    loss = plain(**model_inputs(batch), use_cache=False).loss
    loss.backward()
    return float(loss.detach()), _by_pair(
        plain,
        {
            name: torch.zeros_like(p) if p.grad is None else p.grad
            for name, p in plain.named_parameters()
        },
    )


def _by_pair(model, tensors):
    views = {}
    for name, tensor in tensors.items():
        if tensor.ndim == 3:
            transposed = type(model) is GptOssForCausalLM
            views |= {
                f"{name}.{e}": tensor[e].T if transposed else tensor[e] for e in range(EXPERTS)
            }
        elif tensor.ndim == 2:
            views[name] = views[name.removesuffix(".weight")] = tensor
    return views
