"""Keep the tokens of large data, so that only the first start makes them."""

import hashlib
import json
from array import array
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack

import numpy as np
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from app.utils.console import warn_on_failure
from app.utils.errors import InputError
from app.utils.files import atomic_write, cache_root, locked
from data_modules.rows import EncodedRow, TextRow

FORMAT = "1"
"""Changed with whatever changes the tokens of the same rows."""

CACHED_FROM = 2**19
"""Characters of rows whose tokens are kept: half a second of work."""

Encoded = tuple[list[EncodedRow], int]
"""Encoded rows, and a count: how many were cut, or how many were read."""


def cached(
    rows: Sequence[TextRow], settings: Callable[[], Iterable[str]], encode: Callable[[], Encoded]
) -> Encoded:
    """Return what `encode` makes of rows; of many rows, what it made at an earlier start.

    Of several processes of a machine the first one makes them, the others wait. A damaged file is made anew.

    Args:
        rows: Their text and classes name the file.
        settings: Returns what else the tokens depend on, such as the tokenizer.
        encode: Called where there is no such file.
    """
    if sum(len(row.prompt) + len(row.answer) for row in rows) < CACHED_FROM:
        return encode()
    file = cache_root() / "tokens" / f"{_name(rows, settings())}.safetensors"
    with ExitStack() as stack:
        try:
            stack.enter_context(locked(file))
        except InputError as error:
            rank_zero_warn(f"tokens are not kept for the next start: {error}")
            return encode()
        try:
            return _unpacked(load_file(file))
        except (OSError, SafetensorError, KeyError, ValueError):
            encoded = encode()
            again = "the next start makes them again"
            with warn_on_failure("keeping the tokens", again), atomic_write(file) as stream:
                stream.write(save(_packed(*encoded)))
            return encoded


def _name(rows: Sequence[TextRow], settings: Iterable[str]) -> str:
    name = hashlib.sha256(FORMAT.encode())
    for setting in settings:
        name.update(f"\n{len(setting)} {setting}".encode())
    for row in rows:
        head = f"\n{len(row.prompt)} {len(row.answer)} {row.target}\n"
        turns = json.dumps(row.turns) if row.turns else ""
        name.update(f"{head}{row.prompt}{row.answer}{turns}".encode("utf-8", "surrogatepass"))
    return name.hexdigest()


def _packed(rows: Sequence[EncodedRow], count: int) -> dict[str, np.ndarray]:
    tokens = array("i")
    for row in rows:
        tokens += row.prompt_ids + row.answer_ids
    table = [(len(row.prompt_ids), len(row.answer_ids), row.index, row.target) for row in rows]
    read_only = [(number, *stretch) for number, row in enumerate(rows) for stretch in row.read_only]
    return {
        "read_only": np.array(read_only, dtype=np.int64).reshape(-1, 3),
        "tokens": np.asarray(tokens, dtype=np.int32),
        "rows": np.array(table, dtype=np.int64).reshape(-1, 4),
        "count": np.array([count]),
    }


def _unpacked(arrays: dict[str, np.ndarray]) -> Encoded:
    content, at = arrays["tokens"].tobytes(), 0

    def take(length: int) -> "array[int]":
        nonlocal at
        part = array("i")
        part.frombytes(content[at : at + length * part.itemsize])
        at += length * part.itemsize
        return part

    stretches: dict[int, list[tuple[int, int]]] = {}
    for number, begin, end in arrays["read_only"].tolist():
        stretches.setdefault(number, []).append((begin, end))
    rows = [
        EncodedRow(take(prompt), take(answer), index, target, tuple(stretches.get(number, ())))
        for number, (prompt, answer, index, target) in enumerate(arrays["rows"].tolist())
    ]
    return rows, int(arrays["count"][0])
