"""Plain data over pipes: what a program under test may say, and nothing that runs when it is read.

A value is JSON; what JSON cannot say is an object of one key, the tag. Reading makes objects of
Python's own types only, so whatever a hostile program writes, its reader compares data with data.
This file also runs inside the sandbox: it imports the standard library alone.
"""

import json
import os
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

MAX_FRAME_BYTES = 8 * 2**20
JSON_INT_BITS = (
    64  # longer ones travel as hexadecimal digits, which have no limit and take linear time
)


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
    for kind, (tag, parts) in _PARTS.items():
        if isinstance(value, kind):
            return {tag: parts(value)}
    kind = type(value)
    if (kind.__module__, kind.__name__) in (("fractions", "Fraction"), ("decimal", "Decimal")):
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


def _encode_all(values: Any) -> list[Any]:
    return [encode(value) for value in values]


def _encode_pairs(pairs: Any) -> list[Any]:
    return [[encode(key), encode(value)] for key, value in pairs]


def _decode(data: Any) -> Any:
    if isinstance(data, list):
        return [_decode(item) for item in data]
    if isinstance(data, dict):
        ((tag, parts),) = data.items()
        return _VALUE[tag](parts)
    return data


def _decode_all(parts: Any) -> list[Any]:
    if not isinstance(parts, list):
        raise TypeError(f"expected a list, got {type(parts).__name__}")
    return [_decode(part) for part in parts]


def _decode_pairs(parts: Any) -> dict[Any, Any]:
    return {_decode(key): _decode(value) for key, value in parts}


def _fraction(text: str) -> Any:
    from fractions import Fraction  # few programs have one, and each start would pay for the import

    return Fraction(text)


def _decimal(text: str) -> Any:
    from decimal import Decimal

    return Decimal(text)


# In the order in which they are tried: no class stands before one of its subclasses.
_PARTS: dict[Any, tuple[str, Callable[[Any], Any]]] = {
    complex: ("complex", lambda value: [value.real, value.imag]),
    bytes: ("bytes", lambda value: value.hex()),
    bytearray: ("bytearray", lambda value: value.hex()),
    range: ("range", lambda value: _encode_all((value.start, value.stop, value.step))),
    tuple: ("tuple", _encode_all),
    set: ("set", _encode_all),
    frozenset: ("frozenset", _encode_all),
    deque: ("deque", _encode_all),
    dict: ("dict", lambda value: _encode_pairs(value.items())),
    type({}.keys()): ("keys", _encode_all),
    type({}.values()): ("values", _encode_all),
    type({}.items()): ("items", _encode_pairs),
    Iterator: ("iterator", _encode_all),
}
_VALUE: dict[str, Callable[[Any], Any]] = {
    "int": lambda digits: int(digits, 16),
    "complex": lambda parts: complex(*parts),
    "bytes": bytes.fromhex,
    "bytearray": bytearray.fromhex,
    "range": lambda parts: range(*_decode_all(parts)),
    "tuple": lambda parts: tuple(_decode_all(parts)),
    "set": lambda parts: set(_decode_all(parts)),
    "frozenset": lambda parts: frozenset(_decode_all(parts)),
    "deque": lambda parts: deque(_decode_all(parts)),
    "dict": _decode_pairs,
    "keys": lambda parts: dict.fromkeys(_decode_all(parts)).keys(),
    "values": lambda parts: dict(enumerate(_decode_all(parts))).values(),
    "items": lambda parts: _decode_pairs(parts).items(),
    "iterator": lambda parts: iter(_decode_all(parts)),
    "Fraction": _fraction,
    "Decimal": _decimal,
}
