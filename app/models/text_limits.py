"""How long a text a model can read, and how many tokens it knows, before its weights are loaded."""

import re
from itertools import chain

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

_POSITIONS = re.compile("^wpe$|pos")  # GPT-2's table, and all others


def context_length(config: PreTrainedConfig) -> int | None:
    """Return the number of positions that a model knows; None if there is no limit (T5)."""
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    return positions if positions and positions > 0 else None


def num_embeddings(config: PreTrainedConfig) -> int | None:
    """Return the number of tokens that have an embedding; None if the configuration does not say."""
    return getattr(config.get_text_config(), "vocab_size", None)


def has_position_table(model: PreTrainedModel) -> bool:
    """Return whether positions are rows of a table, so that a model cannot run on more than it knows.

    Tables are learnt (GPT-2, OPT, BART) or computed (Pegasus, GPT-J). Angles (Llama) go on for ever. OPT and
    BART have two rows more than positions, which no text reaches.

    Args:
        model: Also on the meta device.
    """
    context = context_length(model.config) or 0
    embeddings = (module for module in model.named_modules() if isinstance(module[1], nn.Embedding))
    buffers = (buffer for buffer in model.named_buffers() if buffer[1].ndim == 2)
    tables = chain(
        ((name, module.num_embeddings) for name, module in embeddings),
        ((name, len(buffer)) for name, buffer in buffers),
    )
    return any(
        _POSITIONS.search(name.rpartition(".")[2]) and context <= rows <= context + 2
        for name, rows in tables
    )
