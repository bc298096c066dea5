"""A reader of adapters that knows lora_alpha / r alone, as those of servers do."""

import json
from collections import defaultdict

import torch
from safetensors.torch import load_file


@torch.no_grad()
def with_adapter(model, folder):
    """Add the adapter in a folder to the weights of a plain model, in place; return the model.

    Of the configuration it reads `r` and `lora_alpha`. It has one rank and one scaling for all layers.
    """
    config = json.loads((folder / "adapter_config.json").read_text())
    scaling = config["lora_alpha"] / config["r"]
    layers = defaultdict(dict)
    for key, value in load_file(folder / "adapter_model.safetensors").items():
        name = key.removeprefix("base_model.model.").removesuffix(".weight")
        layer, _, factor = name.rpartition(".")
        layers[layer][factor] = value
    for layer, factors in layers.items():
        embedding = "lora_embedding_A" in factors
        prefix = "lora_embedding_" if embedding else "lora_"
        A, B = factors.pop(f"{prefix}A"), factors.pop(f"{prefix}B")
        assert not factors, f"{layer} has {sorted(factors)}"
        assert A.shape[0] == B.shape[1] == config["r"], f"{layer} has rank {A.shape[0]}"
        module = model.get_submodule(layer)
        delta = scaling * B @ A
        transposed = embedding or type(module).__name__ == "Conv1D"
        module.weight.add_(delta.T if transposed else delta)
    return model
