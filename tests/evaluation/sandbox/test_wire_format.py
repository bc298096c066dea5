"""Plain data: every value comes back as itself, and no bytes come back as anything that acts."""

import enum
import json
import math
import os
from collections import Counter, OrderedDict, defaultdict, deque, namedtuple
from decimal import Decimal
from fractions import Fraction

import pytest

from app.evaluation.sandbox.wire_format import (
    MAX_FRAME_BYTES,
    NotPlainDataError,
    decode,
    encode,
    read_frame,
    write_frame,
)

Point = namedtuple("Point", "x y")


class Colour(enum.IntEnum):
    RED = 3


class Word(enum.StrEnum):
    GO = "go"


VALUES = [
    *(None, True, False, 0, -1, 2**63, -(2**64), 10**5000, -(10**5000)),
    *(0.0, -0.0, 0.1, 1e308, 5e-324, math.inf, math.nan, 1 + 2j),
    *("", "a\0\ud800é\U0001f600", b"\x00\xff", bytearray(b"ab")),
    *([], [1, [2, (3, {4})]], (), (1,), [True, 1, 1.0]),
    *({1, 2.5, "x", (1, 2)}, frozenset({1}), range(3, 9, 2), deque([1, [2]])),
    *({}, {"a": 1, 1: [2], (1, 2): {3: 4}, None: None, False: 2.0}),
    *({"tuple": [1]}, {"int": "0x1"}),
    *(Fraction(1, 3), Decimal("1.10")),
]


def over_the_wire(value):
    return decode(json.loads(json.dumps(encode(value))))


def same(a, b):
    """Compare also the types that `==` takes for equal, at every depth."""
    if type(a) is not type(b):
        return False
    if isinstance(a, list | tuple | deque):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict):
        return same(list(a), list(b)) and same(list(a.values()), list(b.values()))
    return repr(a) == repr(b) if isinstance(a, float) else a == b  # nan, and zeros with their signs


@pytest.mark.parametrize("value", VALUES, ids=lambda value: type(value).__name__)
def test_comes_back(value):
    assert same(over_the_wire(value), value)


SUBCLASSES = [
    (Counter("aab"), {"a": 2, "b": 1}),
    (defaultdict(list, a=[1]), {"a": [1]}),
    (OrderedDict(b=1, a=2), {"b": 1, "a": 2}),
    (Point(1, 2), (1, 2)),
    (Colour.RED, 3),
    (Word.GO, "go"),
    ({Colour.RED: Word.GO}, {3: "go"}),
]


@pytest.mark.parametrize(("value", "plain"), SUBCLASSES, ids=lambda value: type(value).__name__)
def test_subclasses_come_back_as_what_they_equal(value, plain):
    assert value == plain
    assert same(over_the_wire(value), plain)


def test_views_and_iterators():
    assert over_the_wire({1: 2}.keys()) == {1}
    assert over_the_wire({1: 2}.items()) == {(1, 2)}
    assert list(over_the_wire({1: [2]}.values())) == [[2]]
    for iterator in (iter([1, 2]), (x for x in (1, 2)), map(int, "12"), reversed([2, 1])):
        back = over_the_wire(iterator)
        assert back != [1, 2]
        assert list(back) == [1, 2]


class AnyInt(int):
    def __eq__(self, other):
        return True

    __hash__ = int.__hash__


def test_equality_of_its_own_does_not_travel():
    assert over_the_wire(AnyInt(3)) != 4


@pytest.mark.parametrize(
    "value", [[object()], len, int, NotImplemented, ..., os], ids=lambda v: type(v).__name__
)
def test_other_types_cannot_be_sent(value):
    with pytest.raises(NotPlainDataError, match="a value of type"):
        encode(value)


FORGED = [
    *({}, {"object": []}, {"tuple": [1], "set": [1]}, [{"tuple": [{"no": 1}]}]),
    *({"tuple": None}, {"tuple": "ab"}, {"set": [[1]]}, {"deque": {"a": 1}}, {"keys": [[1]]}),
    *({"dict": [[1]]}, {"dict": [[[], 1]]}, {"dict": 3}),
    *({"int": 7}, {"int": "seven"}, {"bytes": "0"}, {"bytes": 10**12}),
    *({"complex": ["a", "b"]}, {"complex": [1, 2, 3]}, {"range": [1, 2, 0]}, {"range": ["a"]}),
    *({"Fraction": "1/0"}, {"Decimal": "x"}),
]


@pytest.mark.parametrize("data", FORGED, ids=str)
def test_forged_data(data):
    with pytest.raises(NotPlainDataError):
        decode(data)


@pytest.fixture
def pipe():
    """Return both ends of a pipe, as files."""
    reader, writer = os.pipe()
    with open(reader, "rb", buffering=0) as end, open(writer, "wb", buffering=0) as beginning:
        yield end, beginning


def test_frames(pipe):
    reader, writer = pipe
    write_frame(writer.fileno(), {"value": [1, "é"]})
    assert read_frame(reader.fileno()) == {"value": [1, "é"]}
    writer.close()
    with pytest.raises(EOFError):
        read_frame(reader.fileno())


NO_JSON = (NotPlainDataError, "no JSON")
FORGED_FRAMES = {
    "bytes": (b"\xff", 1, *NO_JSON),
    "half": (b"{", 1, *NO_JSON),
    "deep": (b"[" * 60_000, 60_000, *NO_JSON),
    "digits": (b"9" * 5000, 5000, *NO_JSON),
    "empty": (b"", 0, *NO_JSON),
    "two": (b"1 2", 3, *NO_JSON),
    "ends early": (b"12", 3, EOFError, ""),
    "too long": (b"", MAX_FRAME_BYTES + 1, NotPlainDataError, "more than"),
}


@pytest.mark.parametrize("name", FORGED_FRAMES)
def test_forged_frames(name, pipe):
    content, size, error, message = FORGED_FRAMES[name]
    reader, writer = pipe
    writer.write(size.to_bytes(4, "big") + content)
    writer.close()
    with pytest.raises(error, match=message):
        read_frame(reader.fileno())
