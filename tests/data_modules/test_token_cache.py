"""Tokens of large data: made once, by content, whatever damages the file."""

import pytest

from data_modules import token_cache
from data_modules.encoding import TextEncoder
from data_modules.rows import TextRow

ROWS = [TextRow(f"is {i} even?", ("no", "yes")[i % 2], i % 2) for i in range(12)]


@pytest.fixture
def encode(monkeypatch, tmp_path):
    """Return `encode(encoder, rows, length)`, which keeps tokens below tmp_path; `encode.times` counts."""
    monkeypatch.setenv("LORA_ONE_CACHE", str(tmp_path))
    monkeypatch.setattr(token_cache, "CACHED_FROM", 0)

    def run(encoder, rows=ROWS, length=20):
        def make():
            run.times += 1
            return encoder.rows(rows, length)

        return token_cache.cached(rows, lambda: encoder.identity(length), make)

    run.times = 0
    return run


def test_a_second_start_reads_what_the_first_one_made(encode, tiny_tokenizer, tmp_path):
    encoder = TextEncoder(tiny_tokenizer)
    first = encode(encoder, length=12)
    assert first == encoder.rows(ROWS, 12)
    assert first[1] > 0
    assert encode(encoder, length=12) == first
    assert encode.times == 1
    [file] = (tmp_path / "tokens").glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:40])
    assert encode(encoder, length=12) == first
    assert encode.times == 2


def test_whatever_changes_the_tokens_makes_them_anew(encode, tiny_tokenizer):
    encoder = TextEncoder(tiny_tokenizer)
    encode(encoder)
    encode(encoder, ROWS[:-1])
    encode(encoder, [*ROWS[:-1], TextRow("is 11 even?", "yes", 0)])
    encode(encoder, length=19)
    encode(TextEncoder(tiny_tokenizer, True))
    tiny_tokenizer.add_tokens(["even"])
    encode(TextEncoder(tiny_tokenizer))
    assert encode.times == 6


def test_a_folder_that_cannot_be_written_costs_nothing(encode, tiny_tokenizer, monkeypatch):
    monkeypatch.setenv("LORA_ONE_CACHE", "/proc/none")
    with pytest.warns(UserWarning, match="tokens are not kept"):
        rows, _ = encode(TextEncoder(tiny_tokenizer))
    assert len(rows) == 12


def test_a_full_disk_costs_nothing_that_is_made(encode, tiny_tokenizer, monkeypatch):
    def full(arrays):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(token_cache, "save", full)
    with pytest.warns(UserWarning, match="keeping the tokens failed"):
        rows, _ = encode(TextEncoder(tiny_tokenizer))
    assert len(rows) == 12
