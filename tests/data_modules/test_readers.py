"""Files and sets of the Hub as rows: their forms, and what is said of others."""

import gzip
import io
import tarfile
import time

import datasets
import pytest

from app.utils.errors import InputError
from data_modules.readers import archive_content, csv_cells, file_rows, hub_rows, published_rows
from tests.support.rows import Hub, unplug_hub

FIELDS = ("question", "answer")
ROW = {"question": "a", "answer": "b"}
CUT_SHORT = gzip.compress(b"question\tanswer\n" + b"a\t1\n" * 99, mtime=0)[:-9]


def read(file, content, **options):
    file.write_bytes(content)
    return list(file_rows(file, FIELDS, "--data.path", **options))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("name", "content", "where"),
    [
        ("rows.jsonl", b'\xef\xbb\xbf{"question": "a", "answer": "b"}\r\n\n', "line 1 of"),
        ("rows.json", b' [{"question": "a", "answer": "b"}]', "row 0 of"),
        ("rows.json", b'\xef\xbb\xbf[{"question": "a",\n"answer": "b"}]', "row 0 of"),
        ("rows.json", b'{"question": "a", "answer": "b"}', "line 1 of"),
        ("rows.tsv", b"\xef\xbb\xbfid\tquestion\tanswer\r\n7\ta\tb\r\n", "line 2 of"),
    ],
)
def test_forms(name, content, where, packed, tmp_path):
    """A byte order mark is no text; empty lines are no rows."""
    file = tmp_path / (name + ".gz" * packed)
    [(place, row)] = read(file, gzip.compress(content) if packed else content)
    assert {field: row[field] for field in FIELDS} == ROW
    assert place == f"{where} {file}"


@pytest.mark.parametrize("mark", ["\r", "\u2028", "\u0085", "\f", '"', "#"])
def test_cells_of_tsv_are_text(mark, tmp_path):
    """Only a line feed ends a line, and quotes are letters."""
    content = f"{mark}one{mark}two\t{mark}\r\n".encode()
    [(_, row)] = read(tmp_path / "rows.tsv", content, header=("question", "answer"))
    assert row["question"] == f"{mark}one{mark}two"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.jsonl", b'{"question": "", "answer": ""}\n{"question": "a"}', "line 2 of .*answer"),
        ("rows.jsonl", b'{"question": "a", "answer": "b"}\n{"questi', "line 2 of .*no JSON"),
        ("rows.jsonl", b"{'question': 1}\n", "line 1 of .*no JSON.*an object a line"),
        ("rows.jsonl", b"7\n", "line 1 of .* has int: expected the fields question, answer"),
        ("rows.jsonl", b"{}\n", "has nothing: expected the fields question, answer"),
        ("rows.jsonl", b'{"question": "Wh\xff', r"cannot read .*rows.jsonl .*expected UTF-8"),
        ("rows.jsonl", b'{"question": "a", "answer": 5}', "has 5 as answer: expected text"),
        ("rows.json", b'[{"question": "a", "answer": "b"}, {"question": 7}]', "row 1 of .*answer"),
        ("rows.json", b"[", "no JSON"),
        ("rows.json", b"question,answer\na,b\n", "no JSON"),
        ("rows.json.gz", b"[]", "cannot read .*rows.json.gz"),
        ("rows.tsv.gz", CUT_SHORT, "cannot read"),
        ("rows.tsv", b"question\tanswer\n\xff\xfe\t1\n", "cannot read .*expected UTF-8"),
        ("rows.tsv", b"question\tanswer\nno tab\n", "line 2 of .* has 1 columns: expected 2"),
        ("rows.tsv", b"question\tanswer\tanswer\na\tb\tc\n", "rows.tsv has two columns 'answer'"),
        ("rows.tsv", b"a\tb\n1\t2\n", "line 2 of .* has a, b: expected the fields question, "),
    ],
)
def test_files_of_another_form(name, content, message, tmp_path):
    with pytest.raises(InputError, match=f"(?s){message}.*change --data.path"):
        read(tmp_path / name, content)


def test_a_missing_file_and_a_folder(tmp_path):
    for path in (tmp_path / "none.jsonl", tmp_path):
        with pytest.raises(InputError, match=r"cannot read .*change --data.path"):
            list(published_rows(str(path), "hub", "main", "train", FIELDS, "--data.path"))


def test_cells_of_csv_are_text():
    [row] = csv_cells(b'"1 +\n1?",None,TRUE\n', "x.csv", "path")
    assert row == ("row 0 of x.csv", ["1 +\n1?", "None", "TRUE"])
    with pytest.raises(InputError, match=r"cannot read x.csv \(.*utf-8.*: change path"):
        list(csv_cells(b"\xff,1", "x.csv", "path"))


def archive(folder, **members):
    """Write an archive with a file of each name, or a link where there is no content."""
    with tarfile.open(folder / "x.tar.gz", "w:gz") as packed:
        for name, content in members.items():
            member = tarfile.TarInfo(f"folder/{name}")
            if content is None:
                member.type, member.linkname = tarfile.SYMTYPE, "/etc/hostname"
            else:
                member.size = len(content)
            packed.addfile(member, io.BytesIO(content or b""))
    return folder / "x.tar.gz"


def test_files_of_an_archive(tmp_path):
    file = archive(tmp_path, a=b"one", b=b"two", link=None)
    assert archive_content(file, ["b", "a"], "path") == {"a": b"one", "b": b"two"}
    with pytest.raises(InputError, match=r"x.tar.gz has no file link: .*change path"):
        archive_content(file, ["a", "link"], "path")
    with pytest.raises(InputError, match=r"b of .*x.tar.gz has more than 2 bytes"):
        archive_content(file, ["b"], "path", most_bytes=2)
    file.write_bytes(file.read_bytes()[:-40])
    with pytest.raises(InputError, match=r"cannot read .*x.tar.gz .*change path"):
        archive_content(file, ["b"], "path")


def test_the_hub(monkeypatch):
    hub = Hub(monkeypatch, test=[ROW, {"question": "a", "answer": None}])
    rows = published_rows(None, "namespace/name", "main", "test", FIELDS, "--data.path")
    assert next(rows) == ("row 0 of namespace/name test", ROW)
    with pytest.raises(InputError, match="row 1 of namespace/name test has null as answer"):
        next(rows)
    assert hub.asked == [("namespace/name", "main", "test")]


def test_a_hub_out_of_reach_fails_in_seconds(monkeypatch, tmp_path):
    unplug_hub(monkeypatch, tmp_path)
    offline = datasets.config.HF_HUB_OFFLINE
    started = time.monotonic()
    with pytest.raises(InputError, match=r"cannot load nyu-mll/glue \(sst2\).*copy in --data.path"):
        list(hub_rows("nyu-mll/glue", "sst2", "train", FIELDS, "--data.path"))
    assert time.monotonic() - started < 5
    assert offline == datasets.config.HF_HUB_OFFLINE
