"""Tiny models that write, and what tests of their outputs and likelihoods share."""

import torch
from transformers import MistralConfig, MistralForCausalLM

from app.models.adapter_config import LoraSettings
from app.models.lora import add_lora, base_model, lora_pairs

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


def one_at_a_time(model, tokenizer, prompts, new):
    """Return text, number of tokens and whether EOS came, of transformers' own greedy outputs."""
    base = base_model(model)
    ends = base.generation_config.eos_token_id
    outputs = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        out = model.generate(input_ids=ids, max_new_tokens=new, do_sample=False)[0].tolist()
        tokens = out[1 if base.config.is_encoder_decoder else len(prompt) :]
        ended = tokens[-1] in (ends if isinstance(ends, list) else [ends])
        text = tokenizer.decode(tokens[:-1] if ended else tokens, skip_special_tokens=True)
        outputs.append((text, len(tokens), ended))
    return outputs


@torch.no_grad()
def likelihoods_by_hand(model, prompts, choices):
    """Sum the log-probabilities of each choice in float64, one prompt and one choice at a time."""
    model = model.double()
    sums = torch.zeros(len(prompts), len(choices))
    for i, prompt in enumerate(prompts):
        for j, choice in enumerate(choices):
            if model.config.is_encoder_decoder:
                decoder = torch.tensor([[model.config.decoder_start_token_id, *choice[:-1]]])
                logits = model(input_ids=torch.tensor([prompt]), decoder_input_ids=decoder).logits
            else:
                logits = model(input_ids=torch.tensor([[*prompt, *choice]])).logits
                logits = logits[:, len(prompt) - 1 : -1]
            logs = logits[0] - logits[0].exp().sum(dim=-1, keepdim=True).log()
            sums[i, j] = sum(logs[t, token] for t, token in enumerate(choice))
    model.float()
    return sums
