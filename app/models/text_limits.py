"""How long a text a model can read, and how many tokens it knows, before its weights are loaded."""

import re
from itertools import chain

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

_POSITIONS = re.compile("^wpe$|pos")  # GPT-2's table, and all others
_BEHIND_PADDING = {"camembert", "data2vec-text", "roberta", "roberta-prelayernorm", "xlm-roberta"}
_BEHIND_PADDING |= {"xlm-roberta-xl", "xmod"}
"""Models whose first position is pad_token_id + 1, and whose configuration counts the rows before it."""


def context_length(config: PreTrainedConfig) -> int | None:
    """Return the number of positions that a text can have; None if there is no limit (T5)."""
    text = config.get_text_config()
    if not (rows := _position_rows(text)):
        return None
    first = (text.pad_token_id or 0) + 1 if text.model_type in _BEHIND_PADDING else 0
    return rows - first


def _position_rows(text: PreTrainedConfig) -> int:
    return max(getattr(text, "max_position_embeddings", None) or 0, 0)


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
    positions = _position_rows(model.config.get_text_config())
    embeddings = (module for module in model.named_modules() if isinstance(module[1], nn.Embedding))
    buffers = (buffer for buffer in model.named_buffers() if buffer[1].ndim == 2)
    tables = chain(
        ((name, module.num_embeddings) for name, module in embeddings),
        ((name, len(buffer)) for name, buffer in buffers),
    )
    return any(
        _POSITIONS.search(name.rpartition(".")[2]) and positions <= rows <= positions + 2
        for name, rows in tables
    )
