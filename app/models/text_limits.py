"""How long a text a model can read, and how many tokens it knows, before its weights are loaded."""

import re
from itertools import chain

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from app.utils.errors import InputError

_POSITIONS = re.compile("^wpe$|pos")  # GPT-2's table, and all others
_BEHIND_PADDING = {"camembert", "data2vec-text", "roberta", "roberta-prelayernorm", "xlm-roberta"}
_BEHIND_PADDING |= {"xlm-roberta-xl", "xmod"}
"""Models whose first position is pad_token_id + 1, and whose configuration counts the rows before it."""


def check_causal(config: PreTrainedConfig, name: str) -> None:
    """Refuse an encoder (BERT, RoBERTa), which transformers gives a language model's head if it is asked.

    Each of its positions sees the tokens behind it, and so the answer that it should learn.

    Raises:
        InputError: The model has no decoder, and its configuration does not make it one; or the configuration
            of a decoder makes it see both ways, as those of embedding models do.
    """
    text, kind = config.get_text_config(), config.model_type
    encoder = kind in {*MODEL_FOR_MASKED_LM_MAPPING_NAMES, "bert-generation", "xlnet"}
    causal = getattr(config, "is_decoder", False) or getattr(config, "causal", False)
    both_ways = getattr(text, "use_bidirectional_attention", None) in (True, "all")
    both_ways |= getattr(text, "is_causal", True) is False
    if not config.is_encoder_decoder and (both_ways or (encoder and not causal)):
        raise InputError(
            f"model.name={name!r} is an encoder ({kind}), whose positions see the tokens behind them: "
            "expected a causal or an encoder-decoder model, or is_decoder: true in the config.json of one "
            "that was trained so"
        )


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
