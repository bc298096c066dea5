"""Tiny models that write, and what tests of their outputs and likelihoods share."""

import torch
from transformers import MistralConfig, MistralForCausalLM

from app.models.adapter_config import LoraSettings
from app.models.lora import add_lora, lora_pairs

ENDS = [1, *range(5, 128, 7)]
"""EOS of the tiny models: so many that outputs end at many different steps."""


def mistral(**config):
    """Return a model of which every token sees the last 16 alone."""
    torch.manual_seed(1)
    sizes = {"vocab_size": 128, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "sliding_window": 16}
    return MistralForCausalLM(MistralConfig(**sizes, **heads, **config)).eval()


def in_training(plain, std):
    """Return a model in the middle of training: adapted, with dropout, checkpointing and mixed modes."""
    plain.gradient_checkpointing_enable({"use_reentrant": False})
    model = add_lora(plain, LoraSettings(r=2, lora_dropout=0.5)).train()
    plain.enable_input_require_grads()
    for pair in lora_pairs(model):
        torch.nn.init.normal_(pair.lora_B.data, std=std)
    next(module for module in model.modules() if isinstance(module, torch.nn.Dropout)).eval()
    return model


def modes(model):
    return [module.training for module in model.modules()]


def batch_sizes(model):
    """Return a list that fills with (rows, tokens) of each call of a decoder."""
    sizes = []
    embeddings = getattr(model, "decoder", model).get_input_embeddings()
    embeddings.register_forward_hook(lambda _, args, out: sizes.append(tuple(args[0].shape)))
    return sizes
