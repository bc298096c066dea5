"""A GGUF file as a model directory of float32, which is written once and kept in the cache."""

import importlib.util
import io
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    GgufConfig,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)

from app.models.source import ModelSource, gguf_sha256
from app.utils.console import say
from app.utils.errors import InputError
from app.utils.files import atomic_folder, cache_root, locked

SPECIAL_TOKENS = {
    "bos_token": "bos",
    "eos_token": "eos",
    "pad_token": "padding",
    "unk_token": "unknown",
}
"""The tokenizer's special tokens, and how the keys of a GGUF file name them."""


def converted(source: ModelSource) -> Path:
    """Return the directory of a GGUF file's model and tokenizer, which the first call writes.

    transformers needs about half a minute to read such a file of 100 MB, several times a run.

    Args:
        source: Its `load_args` name a `gguf_file`.

    Raises:
        InputError: The package `gguf` is missing.
        Exception: Whatever transformers raises for a file that it cannot read.
    """
    # Directories without the 2 may hold the end token of transformers 5.17.
    target = cache_root() / "gguf" / f"{gguf_sha256(source)[:16]}-float32-2"
    if not target.is_dir():
        with locked(target):
            if not target.is_dir():
                _convert(source, target)
    return target


def _convert(source: ModelSource, target: Path) -> None:
    """Write the directory, which appears whole or not at all."""
    if importlib.util.find_spec("gguf") is None:
        raise InputError(f"model.name={source.name!r} needs a package: run 'pip install gguf'.")
    say(f"Converting {source.name} once (about a minute), into {target}")
    # Nothing else silences the progress bar of transformers' GGUF reader.
    with redirect_stderr(io.StringIO()), atomic_folder(target) as part:
        config = AutoConfig.from_pretrained(**source.load_args)
        # dequantize=True gives plain weights without the mark of a quantised model.
        model = auto_class(config).from_pretrained(
            **source.load_args,
            config=config,
            dtype=torch.float32,
            quantization_config=GgufConfig(dequantize=True),
        )
        tokenizer = AutoTokenizer.from_pretrained(**source.load_args)
        place, file = (
            source.load_args[key] for key in ("pretrained_model_name_or_path", "gguf_file")
        )
        name_special_tokens(tokenizer, Path(place, file))
        model.save_pretrained(part)
        tokenizer.save_pretrained(part)


def name_special_tokens(tokenizer: PreTrainedTokenizerBase, file: Path) -> None:
    """Give the tokenizer the special tokens that its GGUF file names.

    transformers 5.17 leaves out the padding token and takes the first token of a text for the last.
    """
    from gguf import GGUFReader  # not of everyone, and slow

    fields = GGUFReader(file).fields
    for role, name in SPECIAL_TOKENS.items():
        field = fields.get(f"tokenizer.ggml.{name}_token_id")
        if field is not None:
            setattr(tokenizer, role, tokenizer.convert_ids_to_tokens(int(field.contents())))


def auto_class(config: PreTrainedConfig) -> Any:
    """Return transformers' class of the language models that a configuration is of."""
    return AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
