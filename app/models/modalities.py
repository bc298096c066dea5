"""Find the layers of a model of several modalities that a text does not reach."""

import re
from collections.abc import Sequence

from transformers import PreTrainedModel


def modules_beside_text(model: PreTrainedModel) -> list[str]:
    """Name the modules that run for images or sounds alone.

    These are the towers and projectors around the language model, and the decoder layers that attend to an
    image (`cross_attention_layers` of Mllama's configuration), which are skipped where there is none.

    Args:
        model: A transformers model, also on the meta device.

    Returns:
        The outermost modules in module order; none of a model that reads text only.
    """
    config = model.config
    skipped = tuple(f".layers.{i}" for i in getattr(config, "cross_attention_layers", None) or ())
    beside = [name for name, _ in model.named_modules() if name.endswith(skipped)]
    if hasattr(config, "vision_config") or hasattr(config, "audio_config"):
        text = {model.get_decoder(), model.get_output_embeddings()}
        around = {name: m for name, m in model.named_modules() if text & {*m.modules()} - {m}}
        beside += [
            f"{parent}.{name}".removeprefix(".")
            for parent, module in around.items()
            for name, child in module.named_children()
            if module not in text and not text & {*child.modules()}
        ]
    return beside


def excluding(exclude_modules: str | Sequence[str] | None, modules: Sequence[str]) -> str:
    """Return PEFT's `exclude_modules` as a regular expression that leaves out what is below `modules`, too.

    Args:
        exclude_modules: A regular expression, or ends of names.
        modules: Names of modules, at least one.
    """
    inside = rf"(?:{'|'.join(map(re.escape, modules))})\..*"
    if not exclude_modules:
        return inside
    if not isinstance(exclude_modules, str):
        exclude_modules = rf"(?:.*\.)?(?:{'|'.join(map(re.escape, exclude_modules))})"
    return rf"(?:{exclude_modules})|{inside}"
