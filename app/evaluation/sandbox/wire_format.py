"""Plain data over pipes: what a program under test may send, and nothing that runs when it is read.

A value is JSON; what JSON has no form for is an object of one key, the tag. Reading makes objects of Python's
own types only, so whatever a hostile program writes, its reader compares data with data. Run inside the
sandbox: imports the standard library alone.
"""

import importlib
import json
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

MAX_FRAME_BYTES = 8 * 2**20
JSON_INT_BITS = 64
"""Longer integers travel as hexadecimal digits, which have no limit and take linear time."""


class NotPlainDataError(ValueError):
    """Report a value that cannot be sent, or bytes that are no value."""


def encode(value: Any) -> Any:
    """Return a value in JSON's types.

    Subclasses travel as what they are for `==`: a Counter or defaultdict as its dict, a namedtuple as its
    tuple, an IntEnum as its int. An iterator is run to its end.

    Args:
        value: None, bool, int, float, complex, str, bytes, bytearray, list, tuple, set, frozenset, dict and
            its views, deque, range, Fraction, Decimal, iterators, and all of these inside each other.

    Raises:
        NotPlainDataError: Another type.
    """
    if value is None or value is True or value is False:
        return value
    if isinstance(value, int):
        number = int.__int__(value)
        return number if number.bit_length() <= JSON_INT_BITS else {"int": hex(number)}
    if isinstance(value, float):
        return float.__float__(value)
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, list):
        return _encode_all(value)
    for kind, (tag, parts, _) in _KINDS.items():
        if isinstance(value, kind):
            return {tag: parts(value)}
    kind = type(value)
    if _EXACT.get(kind.__name__) == kind.__module__:
        return {kind.__name__: str(value)}
    raise NotPlainDataError(f"a value of type {kind.__module__}.{kind.__qualname__}")


def decode(data: Any) -> Any:
    """Return the value that `encode` made `data` of.

    Raises:
        NotPlainDataError: `encode` makes no such data.
    """
    try:
        return _decode(data)
    except NotPlainDataError:
        raise
    except (TypeError, ValueError, KeyError, ArithmeticError, RecursionError) as error:
        raise NotPlainDataError(f"data that stands for no value: {error}") from None


def write_frame(fd: int, message: Any) -> None:
    """Write a message of JSON's types, its length first."""
    content = json.dumps(message).encode()
    rest = memoryview(len(content).to_bytes(4, "big") + content)
    while rest:
        rest = rest[os.write(fd, rest) :]


def read_frame(fd: int) -> Any:
    """Read what `write_frame` wrote.

    Raises:
        EOFError: The other side has closed the pipe.
        NotPlainDataError: It wrote too much, or no JSON.
    """
    size = int.from_bytes(_read(fd, 4), "big")
    if size > MAX_FRAME_BYTES:
        raise NotPlainDataError(f"a message of {size} bytes, more than {MAX_FRAME_BYTES}")
    try:
        return json.loads(_read(fd, size))
    except (ValueError, RecursionError) as error:
        raise NotPlainDataError(f"a message that is no JSON: {error}") from None


def _read(fd: int, size: int) -> bytes:
    content = bytearray()
    while len(content) < size:
        part = os.read(fd, min(size - len(content), 1 << 16))
        if not part:
            raise EOFError
        content += part
    return bytes(content)


def _encode_all(values: Iterable[Any]) -> list[Any]:
    return [encode(value) for value in values]


def _encode_pairs(pairs: Iterable[tuple[Any, Any]]) -> list[Any]:
    return [[encode(key), encode(value)] for key, value in pairs]


def _decode(data: Any) -> Any:
    if isinstance(data, list):
        return [_decode(item) for item in data]
    if isinstance(data, dict):
        ((tag, parts),) = data.items()
        if tag in _EXACT:  # imported here: few programs have one, and every start would pay for it
            return getattr(importlib.import_module(_EXACT[tag]), tag)(parts)
        return _VALUES[tag](parts)
    return data


def _decode_all(parts: Any) -> list[Any]:
    if not isinstance(parts, list):
        raise TypeError(f"expected a list, got {type(parts).__name__}")
    return [_decode(part) for part in parts]


def _decode_pairs(parts: Any) -> dict[Any, Any]:
    return {_decode(key): _decode(value) for key, value in parts}


_EXACT = {"Fraction": "fractions", "Decimal": "decimal"}
"""Classes that travel as their text, and their modules."""
_KINDS: dict[Any, tuple[str, Callable[[Any], Any], Callable[[Any], Any]]] = {
    complex: ("complex", lambda z: [z.real, z.imag], lambda parts: complex(*parts)),
    bytes: ("bytes", bytes.hex, bytes.fromhex),
    bytearray: ("bytearray", bytearray.hex, bytearray.fromhex),
    range: (
        "range",
        lambda value: _encode_all((value.start, value.stop, value.step)),
        lambda parts: range(*_decode_all(parts)),
    ),
    tuple: ("tuple", _encode_all, lambda parts: tuple(_decode_all(parts))),
    set: ("set", _encode_all, lambda parts: set(_decode_all(parts))),
    frozenset: ("frozenset", _encode_all, lambda parts: frozenset(_decode_all(parts))),
    deque: ("deque", _encode_all, lambda parts: deque(_decode_all(parts))),
    dict: ("dict", lambda value: _encode_pairs(value.items()), _decode_pairs),
    type({}.keys()): ("keys", _encode_all, lambda p: dict.fromkeys(_decode_all(p)).keys()),
    type({}.values()): ("values", _encode_all, lambda p: dict(enumerate(_decode_all(p))).values()),
    type({}.items()): ("items", _encode_pairs, lambda parts: _decode_pairs(parts).items()),
    Iterator: ("iterator", _encode_all, lambda parts: iter(_decode_all(parts))),
}
"""Tag, what is sent and how it is read, in the order in which types are tried: no class before a subclass."""
_VALUES = {tag: read for tag, _, read in _KINDS.values()}
_VALUES["int"] = lambda digits: int(digits, 16)
