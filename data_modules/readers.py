"""Rows of a benchmark, from a local file or from the Hub, each with the fields it needs."""

import gzip
import json
import pathlib
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import datasets
from huggingface_hub import HfApi
from huggingface_hub.errors import HTTPError

from app.utils.errors import InputError

PROBE_TIMEOUT_S = 5.0

Row = Mapping[str, Any]


def file_bytes(file: pathlib.Path, setting: str) -> bytes:
    """Return the content of a plain or gzipped file.

    Raises:
        InputError: There is no such file, or it is broken.
    """
    try:
        content = file.read_bytes()
        return gzip.decompress(content) if file.suffix == ".gz" else content
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"cannot read {file} ({error}): change {setting}") from error


def jsonl_rows(
    file: pathlib.Path, fields: Sequence[str], setting: str
) -> Iterator[tuple[str, Row]]:
    """Read one JSON object a line; empty lines are left out.

    Args:
        file: Plain or gzipped UTF-8.
        fields: What each row must have, as text.
        setting: The setting that names the file, for messages.

    Yields:
        Where a row stands, for messages, and the row.

    Raises:
        InputError: The file cannot be read, or a row is no JSON object or lacks a field.
    """
    for number, line in enumerate(file_bytes(file, setting).split(b"\n"), 1):
        if line.strip():
            where = f"line {number} of {file}"
            try:
                row = json.loads(line)
            except ValueError as error:
                raise InputError(
                    f"{where} is no JSON ({error}): expected an object a line; change {setting}"
                ) from error
            yield where, with_fields(row, fields, where, setting)


def json_list_rows(
    file: pathlib.Path, fields: Sequence[str], setting: str
) -> Iterator[tuple[str, Row]]:
    """Read a file that is one JSON list of objects; see `jsonl_rows`."""
    try:
        rows = json.loads(file_bytes(file, setting))
    except ValueError as error:
        raise InputError(f"{file} is no JSON ({error}): change {setting}") from error
    if not isinstance(rows, list):
        raise InputError(
            f"{file} is a JSON {type(rows).__name__}: expected a list of rows; change {setting}"
        )
    for number, row in enumerate(rows):
        where = f"row {number} of {file}"
        yield where, with_fields(row, fields, where, setting)


def json_rows(file: pathlib.Path, fields: Sequence[str], setting: str) -> Iterator[tuple[str, Row]]:
    """Read a file of JSON lines (.jsonl, .jsonl.gz) or one JSON list (.json, .json.gz); see `jsonl_rows`."""
    reader = jsonl_rows if ".jsonl" in file.suffixes else json_list_rows
    yield from reader(file, fields, setting)


def hub_rows(
    hub_id: str, config: str, split: str, fields: Sequence[str], setting: str
) -> Iterator[tuple[str, Row]]:
    """Read a set of the Hub; without a network it comes from its cache. See `jsonl_rows`."""
    offline = datasets.config.HF_HUB_OFFLINE
    try:
        HfApi().dataset_info(hub_id, timeout=PROBE_TIMEOUT_S)
    except (OSError, HTTPError):
        datasets.config.HF_HUB_OFFLINE = True  # else the library retries for half a minute
    try:
        rows = datasets.load_dataset(hub_id, config, split=split)
    except (OSError, ValueError, HTTPError, datasets.exceptions.DatasetsError) as error:
        raise InputError(
            f"cannot load {hub_id} ({config}): {error}. Expected a network or a filled cache; or "
            f"name a local copy in {setting}"
        ) from error
    finally:
        datasets.config.HF_HUB_OFFLINE = offline
    for number, row in enumerate(rows):
        where = f"row {number} of {hub_id} {split}"
        yield where, with_fields(row, fields, where, setting, types=(str, int, list))


def with_fields(
    row: Any,
    fields: Sequence[str],
    where: str,
    setting: str,
    types: tuple[type, ...] = (str,),
) -> Row:
    """Return a row after a look at its fields."""
    if not isinstance(row, Mapping) or not all(isinstance(row.get(f), types) for f in fields):
        found = ", ".join(map(str, row)) if isinstance(row, Mapping) else type(row).__name__
        raise InputError(
            f"{where} has {found or 'nothing'}: expected the fields {', '.join(fields)} as text; "
            f"correct it, or change {setting}"
        )
    return row
