"""Files, folders of save_to_disk and the Hub as tables, read row by row."""

import socket
import subprocess
import sys

import datasets
import pytest

from app.utils.errors import InputError
from data_modules.tables import is_published, read_table, read_tables
from tests.support.paths import ROOT
from tests.support.rows import Hub, unplug_hub

ROWS = [{"text": "a", "label": 0}, {"text": "b", "label": 1}]
MEGABYTES = 30, 300
MEASURE = """
import resource, sys
from pathlib import Path
from data_modules.tables import read_table

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

for name in sys.argv[1:]:
    count, length = 0, 0
    for where, row in read_table(name, "--data.path"):
        count += 1
        length += len(row["text"])
    print(count, length, peak())
"""


def test_a_folder_of_save_to_disk(tmp_path):
    rows = datasets.Dataset.from_list(ROWS)
    rows = rows.cast_column("label", datasets.ClassLabel(names=["bad", "good"]))
    rows.save_to_disk(tmp_path / "one")
    parts = {"train": rows, "test": rows.select([1]), "other": rows}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "several")
    one = read_tables(str(tmp_path / "one"), None, "--data.path")
    several = read_tables(str(tmp_path / "several"), None, "--data.path")
    assert (list(one), list(several)) == (["train"], ["train", "test"])
    assert [row for _, row in one["train"]] == ROWS
    assert [row for _, row in several["test"]] == ROWS[1:]
    assert one["train"].class_names("label") == ["bad", "good"]
    assert one["train"].class_names("text") is None
    (tmp_path / "none").mkdir()
    with pytest.raises(InputError, match="none is no folder that save_to_disk of datasets wrote"):
        read_tables(str(tmp_path / "none"), None, "--data.path")
    datasets.DatasetDict({"dev": rows}).save_to_disk(tmp_path / "dev")
    with pytest.raises(InputError, match="has the splits dev: expected train"):
        read_tables(str(tmp_path / "dev"), None, "--data.path")


def test_a_set_of_the_hub(monkeypatch, tmp_path):
    hub = Hub(monkeypatch, train=ROWS, validation=ROWS[:1])
    tables = read_tables("someone/films", "short", "--data.path")
    assert {split: [row for _, row in table] for split, table in tables.items()} == hub.rows
    assert hub.asked == [("someone/films", "short", None)]
    [where, _] = next(iter(tables["validation"]))
    assert where == "row 0 of someone/films (validation)"
    unplug_hub(monkeypatch, tmp_path)
    with pytest.raises(
        InputError, match=r"cannot load someone/films: .*name a local copy in --data"
    ):
        read_tables("someone/films", None, "--data.path")


@pytest.mark.parametrize(
    ("path", "published"),
    [
        ("stanfordnlp/imdb", True),
        ("films", False),
        ("data/films.csv", False),
        ("data/films.jsonl.gz", False),
        ("/data/films", False),
        ("../films/a", False),
        ("a/b/c", False),
    ],
)
def test_what_names_a_set_of_the_hub(path, published):
    assert is_published(path) == published


def test_a_file_is_read_without_a_word_to_the_hub(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(socket, "getaddrinfo", lambda *host, **_: asked.append(host))
    (tmp_path / "rows.csv").write_text("text,label\na,0\nb,1\n")
    assert len(list(read_table(str(tmp_path / "rows.csv"), "--data.path"))) == 2
    assert asked == []
    assert not datasets.config.HF_HUB_OFFLINE, "as it was"


@pytest.mark.slow
@pytest.mark.parametrize("ending", ["csv", "jsonl"])
def test_a_large_file_is_read_in_little_memory(ending, tmp_path):
    """Of two files the larger one takes no more than some 30 MiB beyond the other."""
    text = "the quick brown fox jumps over the lazy dog " * 6
    line = f"{text},good\n" if ending == "csv" else f'{{"text": "{text}", "label": "good"}}\n'
    sizes = {}
    for megabytes in MEGABYTES:
        lines = megabytes * 10**6 // len(line)
        file = tmp_path / f"{megabytes}.{ending}"
        with file.open("w") as stream:
            stream.write("text,label\n" * (ending == "csv"))
            for _ in range(lines // 1000):
                stream.write(line * 1000)
        sizes[str(file)] = lines // 1000 * 1000
    script = [sys.executable, "-c", MEASURE, *sizes]
    told = subprocess.run(script, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    peaks = []
    for report, count in zip(told.splitlines(), sizes.values(), strict=True):
        found, length, peak = report.split()
        assert (int(found), int(length)) == (count, count * len(text))
        peaks.append(float(peak))
    assert peaks[1] - peaks[0] < 30, peaks
