"""Outputs and likelihoods of tiny models, whole or sharded over two processes."""

import json
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    PreTrainedModel,
)

from app.distributed.fsdp import blocks
from app.models.adapter_config import LoraSettings
from app.models.decoding import Decoding
from app.models.generation import generate
from app.models.likelihood import SHORTEST_PREFIX, choice_log_likelihoods
from app.models.lora import add_lora, base_model, lora_pairs

KINDS = ("llama", "gpt2", "t5")
ENDS = [1, *range(20, 32)]
LONG = list(range(4, 4 + SHORTEST_PREFIX))
# Prompts of each process: many steps and few, a shared beginning and none, nobody on either side.
PROMPTS = [
    ([[5, 6], [7], [8] * 9, [9, 10], [33, 34, 35]], [[40, 41]]),
    ([[*LONG, 5], [*LONG, 6, 7]], [[5], [6, 7, 8], [50]]),
    ([], [[5, 6], [7]]),
    ([[5, 6], [7]], []),
    ([], []),
]
DECODINGS = [
    Decoding(16),
    Decoding(9, stop=["a", "7"], num_samples=3, temperature=0.9, top_p=0.9, seed=1),
]
CHOICES = [[[5], [6]], [[5], [6, 7], [6, 8], [9, 10, 11]]]


def adapted(kind: str, folder: Path) -> torch.nn.Module:
    """Return a model with an adapter that does something; of one kind the whole model, as trained."""
    auto = AutoModelForSeq2SeqLM if kind == "t5" else AutoModelForCausalLM
    model: PreTrainedModel = auto.from_pretrained(folder / kind)
    model.generation_config.eos_token_id = ENDS
    if kind == "gpt2":
        return model.requires_grad_(False)
    torch.manual_seed(0)
    model = add_lora(model, LoraSettings(r=2))
    for pair in lora_pairs(model):
        torch.nn.init.normal_(pair.lora_B.data, std=0.3)
    return model


def outputs_and_likelihoods(model: torch.nn.Module, tokenizer, prompts, together: bool) -> list:
    """Return texts of every decoding and likelihoods of every set of choices, as JSON data."""
    base, keys = base_model(model), [str(prompt) for prompt in prompts]
    written = [
        generate(model, base, tokenizer, prompts, keys, decoding, together=together)
        for decoding in DECODINGS
    ]
    texts = [[[vars(o) for o in outputs] for outputs in rows] for rows in written]
    likely = [
        choice_log_likelihoods(model, base, prompts, choices, together=together).tolist()
        for choices in CHOICES
    ]
    return [texts, likely]


def sharded_generation(folder: str) -> None:
    """Shard each model as app/distributed/fsdp.py does, and write down what this process generated."""
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2,))
    results = {}
    for kind in KINDS:
        model = adapted(kind, Path(folder))
        whole = {parameter for parameter in model.parameters() if parameter.requires_grad}
        for block in blocks(model):
            fully_shard(block, mesh=mesh, ignored_params=whole)
        fully_shard(model, mesh=mesh, ignored_params=whole)
        tokenizer = AutoTokenizer.from_pretrained(Path(folder) / kind)
        results[kind] = [
            outputs_and_likelihoods(model, tokenizer, prompts[dist.get_rank()], together=True)
            for prompts in PROMPTS
        ]
    (Path(folder) / f"results_{dist.get_rank()}.json").write_text(json.dumps(results))
    dist.destroy_process_group()
