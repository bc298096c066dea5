"""Find out whether a model keeps several examples in one row apart, before its weights are loaded."""

from unittest import mock

import torch
from transformers import PreTrainedModel, masking_utils

BY_POSITION = {"full_attention", "sliding_attention", "chunked_attention"}
"""Layers whose attention stays within an example; states and convolutions run on into the next one."""


class _Separated(Exception):
    """The model has given positions to the mask of its attention."""


def packing_obstacle(model: PreTrainedModel) -> str | None:
    """Return what lets packed examples see each other, or None if nothing does.

    transformers tells packed examples apart by their `position_ids`, each beginning at 0, from which it makes a
    block-causal mask (`masking_utils.find_packed_sequence_indices`; flash attention takes the lengths of the
    examples). Some architectures (OPT, Falcon, GPT-OSS) make the mask without them, which shows when a model
    without weights is called.

    Args:
        model: Also on the meta device, with the attention it will run with.
    """
    if model.config.is_encoder_decoder:
        return "is a sequence-to-sequence model, whose encoder reads one example a row"
    kinds = set(getattr(model.config.get_text_config(), "layer_types", None) or ())
    if model._is_stateful or not kinds <= BY_POSITION:
        others = ", ".join(sorted(kinds - BY_POSITION)) or "a state"
        return f"has layers beside attention ({others}) that run on from one example into the next"
    name = model.config._attn_implementation or "eager"
    if "flash" in name and not model._supports_attention_backend:
        return f"does not hand the positions of its examples to {name}"
    ids = torch.zeros(1, 2, dtype=torch.long, device=model.device)
    embedded = model.get_input_embeddings()(ids)  # type: ignore[operator]
    # Some look for padding tokens (GPT-2), others look embeddings of their layers up by token (Gemma 4).
    for read in ({"inputs_embeds": embedded}, {"input_ids": ids}):
        with mock.patch.object(
            masking_utils, "find_packed_sequence_indices", side_effect=_Separated
        ):
            try:
                model(**read, position_ids=ids, use_cache=False)
            except _Separated:
                return None
            except Exception:  # no argument `position_ids`, or an operation that needs the weights
                pass
    return "makes the mask of its attention without the positions of the examples"
