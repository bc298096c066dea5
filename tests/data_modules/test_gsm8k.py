"""GSM8K's training questions: every row as it is written."""

import gzip
import json

from data_modules.gsm8k import Gsm8kDataModule
from tests.support.paths import DATA, needs_data


@needs_data("gsm8k")
def test_every_row_of_gsm8k():
    """As written: thousands commas, minus signs, characters beyond ASCII, marks in most rows."""
    path = DATA / "gsm8k" / "train.jsonl.gz"
    raw = [json.loads(line) for line in gzip.decompress(path.read_bytes()).splitlines()]
    rows = list(Gsm8kDataModule(str(path)).examples())
    assert rows == [(f"Q: {row['question']}\nA: ", row["answer"]) for row in raw]
    numbers = [answer.rpartition("#### ")[2] for _, answer in rows]
    assert (len(numbers), sum("," in n for n in numbers)) == (7473, 79)
    assert sum(n.startswith("-") for n in numbers) == 3
    assert sum(not (prompt + answer).isascii() for prompt, answer in rows) == 651
    assert sum("<<" not in answer for _, answer in rows) == 95
    bare = list(Gsm8kDataModule(str(path), calculations=False).examples())
    assert not any("<<" in answer or ">>" in answer for _, answer in bare)
    assert [answer.rpartition("#### ")[2] for _, answer in bare] == numbers
    assert bare[0][1].startswith("Natalia sold 48/2 = 24 clips in May.\n")
