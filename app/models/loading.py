"""Load the model, tokenizer and configuration that `model.name` names (see `app.models.source`).

A GGUF file is dequantised once into an ordinary float32 directory in the cache. Weights are read
from safetensors only, code that comes with a model is never run, and transformers is kept quiet.
"""

import functools
import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import (
    is_flash_attn_2_available,
    is_flash_attn_3_available,
    is_flash_attn_4_available,
)
from transformers.utils import logging as transformers_logging

from app.models.gguf import auto_class, converted
from app.models.quantization import (
    check_casts,
    check_kernel,
    dequantize,
    make_quantizer,
    quantized_by,
    round_parameters,
    settle,
)
from app.models.quantized_shapes import empty_codes
from app.models.source import FOUR_WAYS, ModelSource, gguf_sha256
from app.models.text_limits import check_causal
from app.utils.console import say
from app.utils.errors import InputError
from app.utils.files import file_sha256

GPU_ATTENTION = {
    "flex_attention": torch.cuda.is_available,
    "flash_attention_2": is_flash_attn_2_available,
    "flash_attention_3": is_flash_attn_3_available,
    "flash_attention_4": is_flash_attn_4_available,
}
"""Kernels that train on a GPU alone, and what says whether they are installed and find one."""

CPU = torch.device("cpu")
_say_once = functools.cache(say)


def load_config(source: ModelSource) -> PreTrainedConfig:
    """Load the model's configuration."""
    with _loading(source):
        config = AutoConfig.from_pretrained(**_load_args(source), trust_remote_code=False)
    check_causal(config, source.name)
    return config


def load_tokenizer(source: ModelSource) -> PreTrainedTokenizerBase:
    """Load the tokenizer; if it has no padding token, its end-of-text token pads, with a notice."""
    with _loading(source):
        tokenizer = AutoTokenizer.from_pretrained(**_load_args(source), trust_remote_code=False)
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise InputError(f"The tokenizer of model.name={source.name!r} has no padding token.")
        tokenizer.pad_token = tokenizer.eos_token
        _say_once(
            f"The tokenizer of {source.name} has no padding token: {tokenizer.eos_token} pads."
        )
    return tokenizer


def load_model(
    source: ModelSource,
    dtype: torch.dtype = torch.float32,
    attn_implementation: str | None = None,
    device: torch.device = CPU,
) -> PreTrainedModel:
    """Load the language model: encoder-decoder or decoder-only, as its configuration says.

    All floating-point weights get the `dtype`, whatever the checkpoint's. Those to be quantised are read one by
    one, in float32: their codes do not depend on `dtype`.

    Args:
        source: Where the model comes from, and whether it is quantised.
        dtype: Of the weights; of quantised ones, what layers of four bits compute in.
        attn_implementation: In transformers' names; None lets transformers choose.
        device: Where a quantised model is, which cannot be moved.

    Returns:
        The model in evaluation mode, every weight of it read from the checkpoint, on the CPU unless quantised.

    Raises:
        InputError: A broken or incomplete checkpoint, no language model, or a quantisation that fails here.
    """
    config = load_config(source)
    quantizer = make_quantizer(source, config, dtype)
    options: dict[str, Any] = {"dtype": dtype}
    if quantizer is not None:
        check_kernel(empty_model(source, dtype, attn_implementation), source.name, device)
        options["device_map"] = {"": device}
    if source.quantization is not None:
        options["quantization_config"] = quantizer and quantizer.quantization_config
        options["dtype"] = torch.float32
    with _loading(source):
        model, report = auto_class(config).from_pretrained(
            **_load_args(source),
            **_attention(attn_implementation),
            **options,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    if missing := sorted(report["missing_keys"]):
        raise InputError(
            f"The checkpoint of model.name={source.name!r} lacks {len(missing)} weights of a "
            f"{type(model).__name__}, such as {missing[0]}: is it a language model's? {FOUR_WAYS}"
        )
    if quantizer is not None:
        settle(round_parameters(model, dtype))
    if source.kind == "hub":  # what an exported adapter names as its base, offline too
        model.name_or_path = source.name.partition("@")[0]
    return model


def empty_model(
    source: ModelSource,
    dtype: torch.dtype = torch.float32,
    attn_implementation: str | None = None,
) -> PreTrainedModel:
    """Build what `load_model` would load on the meta device: shapes and types without numbers."""
    config = load_config(source)
    quantizer = make_quantizer(source, config, dtype)
    with _loading(source):
        with torch.device("meta"):
            options = {"dtype": dtype, **_attention(attn_implementation)}
            model = auto_class(config).from_config(config, **options).eval()
        if quantizer is not None:
            quantizer.pre_quantized = True  # codes are made below
            quantizer.preprocess_model(model=model, device_map={"": "meta"})
            quantizer.postprocess_model(model)
            empty_codes(model)
            settle(model)
            check_casts(model, source.name)
        return model


def load_float32(source: ModelSource, attn_implementation: str | None = None) -> PreTrainedModel:
    """Load the model in float32, with the values that its quantised weights stand for.

    Raises:
        InputError: As `load_model`; or the checkpoint is quantised, and not by bitsandbytes.
    """
    setting = quantized_by(source, load_config(source))
    if setting is not None and source.quantization is None and "bitsandbytes" not in setting:
        raise InputError(
            f"the weights of model.name {source.name!r} are quantised ({setting}), and their values are known "
            "to their own kernels only: leave --merge (--merged) out, and serve the adapter beside the base"
        )
    return dequantize(load_model(source, torch.float32, attn_implementation))


def available_attention(name: str | None, anywhere: bool = False) -> str | None:
    """Return the name of an attention kernel that runs here; None is what transformers chooses.

    With `anywhere` it may be one of another machine, which a comparison is written for.

    Raises:
        InputError: It is unknown, or not installed.
    """
    here = ["eager", "sdpa"]
    here += [kernel for kernel, is_available in GPU_ATTENTION.items() if is_available()]
    if name is None or name in here or (anywhere and name in GPU_ATTENTION):
        return name
    wrong = "is not installed here, or finds no GPU" if name in GPU_ATTENTION else "is unknown"
    raise InputError(
        f"model.attn_implementation={name!r} {wrong}: expected {', '.join(here)}, or null for what "
        "transformers chooses"
    )


def _attention(name: str | None) -> dict[str, str]:
    return {} if name is None else {"attn_implementation": name}


def model_fingerprint(source: ModelSource) -> str:
    """Return what identifies the weights: `namespace/name@commit`, or `sha256:` and a checksum.

    Weights that are quantised while they are loaded have `+nf4` or `+int8` behind it.
    """
    quantized = f"+{source.quantization}" if source.quantization else ""
    return f"{_checkpoint_fingerprint(source)}{quantized}"


def _checkpoint_fingerprint(source: ModelSource) -> str:
    arguments = source.load_args
    place = arguments["pretrained_model_name_or_path"]
    if source.kind == "hub":
        return f"{source.name.partition('@')[0]}@{arguments['revision']}"
    if "gguf_file" in arguments:
        return f"sha256:{gguf_sha256(source)}"
    files = sorted(Path(place).glob("*.safetensors"))
    listing = "".join(f"{file.name} {file_sha256(file)}\n" for file in files)
    return f"sha256:{hashlib.sha256(listing.encode()).hexdigest()}"


def local_directory(source: ModelSource) -> Path | None:
    """Return the directory that is loaded, converting a GGUF file first; None for a Hub model."""
    if source.kind == "hub":
        return None
    with _loading(source):
        return Path(_load_args(source)["pretrained_model_name_or_path"])


def base_reference(source: ModelSource) -> tuple[str, str | None]:
    """Return how an adapter names its base model, so that PEFT loads it from any working directory.

    A Hub model by its id and commit. Anything else by the absolute path of the directory that is loaded, which
    for a GGUF file is its float32 copy in the cache: PEFT would take a relative path for one below the working
    directory, or for a Hub id. The adapter's folder may be moved; on another machine, which has the base
    elsewhere, load the base yourself and give it to `PeftModel.from_pretrained`.

    Returns:
        `base_model_name_or_path` and `revision` of PEFT's configuration.
    """
    folder = local_directory(source)
    if folder is None:
        return source.name.partition("@")[0], source.load_args["revision"]
    return str(folder.expanduser().absolute()), None


def _load_args(source: ModelSource) -> dict[str, Any]:
    """Return where to load from, after a GGUF file has become a directory."""
    if "gguf_file" not in source.load_args:
        return source.load_args
    return {"pretrained_model_name_or_path": str(converted(source)), "local_files_only": True}


@contextmanager
def _loading(source: ModelSource) -> Iterator[None]:
    """Keep transformers quiet, and turn its complaints about a checkpoint into an InputError."""
    verbosity = transformers_logging.get_verbosity()
    shows_progress = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # a broken file makes it raise anything, such as struct.error
        reason = " ".join(str(error).split())[:600]
        raise InputError(
            f"model.name={source.name!r} cannot be loaded: {type(error).__name__}: {reason}"
        ) from error
    finally:
        transformers_logging.set_verbosity(verbosity)
        if shows_progress:
            transformers_logging.enable_progress_bar()
