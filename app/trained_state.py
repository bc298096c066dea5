"""What a checkpoint holds of the model: trained weights, and what they belong to."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from app.errors import InputError


def keep_trained(checkpoint: dict[str, Any], module: nn.Module) -> None:
    """Leave only trainable weights in a checkpoint; the base comes from its name."""
    trainable = {name for name, p in module.named_parameters() if p.requires_grad}
    state = checkpoint["state_dict"]
    checkpoint["state_dict"] = {name: value for name, value in state.items() if name in trainable}


def check_trained(
    checkpoint: Mapping[str, Any], module: nn.Module, model: Mapping[str, Any]
) -> None:
    """Raise InputError for the checkpoint of another base model or of another adapter.

    Args:
        checkpoint: Has "base" and "state_dict".
        module: Whose trainable weights the checkpoint is to fill.
        model: Name and fingerprint of its base model.
    """
    theirs = checkpoint["base"]
    if theirs["fingerprint"] != model["fingerprint"]:
        raise InputError(
            f"the checkpoint belongs to the base model {theirs['name']} ({theirs['fingerprint']}), but "
            f"model.name is {model['name']} ({model['fingerprint']}): set model.name or ckpt_path"
        )
    trainable = {name: p.shape for name, p in module.named_parameters() if p.requires_grad}
    saved = {name: value.shape for name, value in checkpoint["state_dict"].items()}
    for name in (*saved, *trainable):
        if saved.get(name) != trainable.get(name):
            shapes = [
                "no weight" if shape is None else f"one of shape {list(shape)}"
                for shape in (saved.get(name), trainable.get(name))
            ]
            raise InputError(
                f"the checkpoint has {shapes[0]} for {name.removeprefix('model.')}, but this model "
                f"trains {shapes[1]}: set model.adapter as that run had it, or another ckpt_path"
            )
